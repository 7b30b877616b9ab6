// moe_route, moe_group: which experts each token goes to, and each expert's list of
// tokens.
//
// Source   `Gate.forward` of the official release; the grouping of `MoE.forward`.
// Inputs   logits [n_tokens, n_experts] f32
//          moe_route_score: bias [n_experts] f32, for the choice only
//          moe_route_hash: table [vocab, top_k] u16, tokens [n_tokens] u32
// Outputs  ids [n_tokens, top_k] u32 in the order chosen (equal scores: lower id first)
//          weights [n_tokens, top_k] f32, score / sum * scaling
//          order [n_tokens, top_k] u32: the choices by ascending id
//          moe_group: items [<= n_pairs, 3] u32 (local expert, first, count <= max_count),
//          n_items [2]: items, and the length of `pairs`: pairs of each local expert, ascending,
//          each expert's list filled up with ~0 to a multiple of `align` (max_count is one too)
// Launch   route: one warp per token, 4 per block; n_experts at most 512, top_k at most 32.
//          group: one block of 512 threads: counted and placed by warps, added up by a thread per
//          expert (at most 512). For few tokens both are part of `moe/gate.cu`.
// Limit    latency.
// Arch     sm_80 and later.
// CPU twin `MoeOps::route` (ids equal unless scores differ by less than 1e-6; weights 1e-5 relative);
//          `Groups` of `ops::cpu::moe` (equal).

#include "../include/route.cuh"

constexpr u32 ROUTE_WARPS = 4;

// The logits of a token.
INLINE auto of_token(const float* logits, u32 token, u32 n_experts) {
    return [=](u32 expert) { return logits[static_cast<u64>(token) * n_experts + expert]; };
}

extern "C" __global__ void __launch_bounds__(ROUTE_WARPS* WARP) moe_route_score(
    const float* __restrict__ logits, const float* __restrict__ bias, u32* __restrict__ ids,
    u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens, u32 n_experts, u32 top_k,
    float scaling) {
    dependency_begin(logits);
    const u32 token = blockIdx.x * ROUTE_WARPS + warp_id();
    if (token >= n_tokens) return;
    route<false>({bias, nullptr, nullptr, ids, order, weights, n_tokens, n_experts, top_k, scaling}, token, of_token(logits, token, n_experts));
}
EMU_KERNEL(moe_route_score)

extern "C" __global__ void __launch_bounds__(ROUTE_WARPS* WARP) moe_route_hash(
    const float* __restrict__ logits, const u16* __restrict__ table, const u32* __restrict__ tokens,
    u32* __restrict__ ids, u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens,
    u32 n_experts, u32 top_k, float scaling) {
    dependency_begin(logits, tokens);
    const u32 token = blockIdx.x * ROUTE_WARPS + warp_id();
    if (token >= n_tokens) return;
    route<true>({nullptr, table, tokens, ids, order, weights, n_tokens, n_experts, top_k, scaling}, token, of_token(logits, token, n_experts));
}
EMU_KERNEL(moe_route_hash)

extern "C" __global__ void __launch_bounds__(GROUP_THREADS) moe_group(
    const u32* __restrict__ ids, u32* __restrict__ items, u32* __restrict__ n_items,
    u32* __restrict__ pairs, u32 n_pairs, u32 first_expert, u32 n_experts, u32 max_count,
    u32 align) {
    dependency_begin(ids);
    group(ids, {items, n_items, pairs, n_pairs, first_expert, n_experts, max_count, align});
}
EMU_KERNEL(moe_group)
