// moe_route, moe_group, moe_route_group: which experts each token goes to, and each expert's list of
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
//          expert (at most 512). route_group: the same block, whose warps route a token each before;
//          for few tokens.
// Limit    latency.
// Arch     sm_80 and later.
// CPU twin `MoeOps::route` (ids equal unless scores differ by less than 1e-6; weights 1e-5 relative);
//          `Groups` of `ops::cpu::moe` (equal).

#include "../include/reduce.cuh"

constexpr u32 ROUTE_WARPS = 4, MAX_PER_LANE = 16, GROUP_THREADS = 512;

INLINE float sqrt_softplus(float x) {
    // The identity above 20, as in PyTorch.
    return sqrt_rn(x > 20.0f ? x : log1p_f32(exp_f32(x)));
}
// Unsigned integers in the order of floats.
INLINE u32 ordered(float x) {
    const u32 bits = float_bits(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// What decides the choices of all tokens, and where they go.
struct Routes {
    const float *logits, *bias; // bias null: by hash
    const u16* table;
    const u32* tokens;
    u32 *ids, *order;
    float* weights;
    u32 n_tokens, n_experts, top_k;
    float scaling;
};

// One warp.
template <bool Hash>
INLINE void route(const Routes& r, u32 token) {
    const u32 lane = lane_id(), top_k = r.top_k, n_experts = r.n_experts;
    const float* logits = r.logits + static_cast<u64>(token) * n_experts;
    // Lane i keeps the id and score of choice i.
    u32 id = 0;
    if (Hash) {
        if (lane < top_k) id = r.table[static_cast<u64>(r.tokens[token]) * top_k + lane];
    } else {
        u32 rank[MAX_PER_LANE];
        UNROLL
        for (u32 i = 0; i < MAX_PER_LANE; ++i) {
            const u32 expert = i * WARP + lane;
            rank[i] = expert < n_experts ? ordered(sqrt_softplus(logits[expert]) + r.bias[expert]) : 0;
        }
        for (u32 choice = 0; choice < top_k; ++choice) {
            u32 best = 0, best_id = 0xffffffffu;
            UNROLL
            for (u32 i = 0; i < MAX_PER_LANE; ++i)
                if (rank[i] > best) best = rank[i], best_id = i * WARP + lane;
            for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
                const u32 other = shfl_xor(best, lanes), other_id = shfl_xor(best_id, lanes);
                if (other > best || (other == best && other_id < best_id)) best = other, best_id = other_id;
            }
            if (lane == choice) id = best_id;
            UNROLL
            for (u32 i = 0; i < MAX_PER_LANE; ++i)
                if (i * WARP + lane == best_id) rank[i] = 0;
        }
    }
    const float score = lane < top_k ? sqrt_softplus(logits[id]) : 0.0f;
    float sum = 0.0f;
    u32 place = 0;
    for (u32 i = 0; i < top_k; ++i) {
        sum = add_rn(sum, shfl(score, i));
        place += shfl(id, i) < id;
    }
    if (lane >= top_k) return;
    r.ids[token * top_k + lane] = id;
    r.order[token * top_k + place] = lane;
    r.weights[token * top_k + lane] = mul_rn(div_rn(score, sum), r.scaling);
}

extern "C" __global__ void __launch_bounds__(ROUTE_WARPS* WARP) moe_route_score(
    const float* __restrict__ logits, const float* __restrict__ bias, u32* __restrict__ ids,
    u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens, u32 n_experts, u32 top_k,
    float scaling) {
    dependency_begin(logits);
    const u32 token = blockIdx.x * ROUTE_WARPS + warp_id();
    if (token >= n_tokens) return;
    route<false>({logits, bias, nullptr, nullptr, ids, order, weights, n_tokens, n_experts, top_k, scaling}, token);
}
EMU_KERNEL(moe_route_score)

extern "C" __global__ void __launch_bounds__(ROUTE_WARPS* WARP) moe_route_hash(
    const float* __restrict__ logits, const u16* __restrict__ table, const u32* __restrict__ tokens,
    u32* __restrict__ ids, u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens,
    u32 n_experts, u32 top_k, float scaling) {
    dependency_begin(logits, tokens);
    const u32 token = blockIdx.x * ROUTE_WARPS + warp_id();
    if (token >= n_tokens) return;
    route<true>({logits, nullptr, table, tokens, ids, order, weights, n_tokens, n_experts, top_k, scaling}, token);
}
EMU_KERNEL(moe_route_hash)

constexpr u32 GROUP_WARPS = GROUP_THREADS / WARP;

struct GroupShared {
    u32 n_pairs[GROUP_WARPS], n_items[GROUP_WARPS];
    // Of each warp's part of the pairs: how many each expert has, then where the next one goes.
    u32 counts[GROUP_WARPS][GROUP_THREADS];
};

// The lanes with the same expert; none for a lane that is not valid.
INLINE u32 same_expert(u32 expert, bool valid) {
    u32 mask = ballot(valid);
    UNROLL
    for (u32 bit = 0; bit < 9; ++bit) {
        const bool is_set = expert >> bit & 1;
        const u32 lanes = ballot(is_set);
        mask &= is_set ? lanes : ~lanes;
    }
    return valid ? mask : 0;
}

// The pairs to group, and where their lists go.
struct Lists {
    u32 *items, *n_items, *pairs;
    u32 n_pairs, first_expert, n_experts, max_count, align;
};

// The whole block.
INLINE void group(const u32* ids, const Lists& lists) {
    GroupShared& s = shared<GroupShared>();
    u32 *items = lists.items, *n_items = lists.n_items, *pairs = lists.pairs;
    const u32 n_pairs = lists.n_pairs, first_expert = lists.first_expert, n_experts = lists.n_experts,
              max_count = lists.max_count, align = lists.align;
    const u32 expert = threadIdx.x, lane = lane_id(), warp = warp_id(), lower = (1u << lane) - 1;
    // Each warp has a run of pairs and goes through it 32 at a time: places ascend with the pairs.
    const u32 per_warp = ceil_div(ceil_div(n_pairs, GROUP_WARPS), WARP) * WARP;
    const u32 start = warp * per_warp, end = min_u32(n_pairs, start + per_warp);
    u32* counts = s.counts[warp];
    for (u32 i = lane; i < GROUP_THREADS; i += WARP) counts[i] = 0;
    warp_sync();
    for (u32 first = start; first < end; first += WARP) {
        const u32 pair = first + lane, own = pair < end ? ids[pair] - first_expert : ~0u;
        const u32 mask = same_expert(own, own < n_experts);
        if (mask != 0 && (mask & lower) == 0) counts[own] += popcount(mask);
        warp_sync();
    }
    block_sync();
    u32 count = 0;
    UNROLL
    for (u32 w = 0; w < GROUP_WARPS; ++w) {
        const u32 of_warp = s.counts[w][expert];
        s.counts[w][expert] = count;
        count += of_warp;
    }
    const u32 own_items = ceil_div(count, max_count);
    const u32 length = ceil_div(count, align) * align;
    u32 pair_end = length, item_end = own_items; // running sums over the experts so far
    for (u32 delta = 1; delta < WARP; delta *= 2) {
        const u32 p = shfl_up(pair_end, delta), i = shfl_up(item_end, delta);
        if (lane >= delta) pair_end += p, item_end += i;
    }
    if (lane == WARP - 1) s.n_pairs[warp] = pair_end, s.n_items[warp] = item_end;
    block_sync();
    for (u32 w = 0; w < warp; ++w) pair_end += s.n_pairs[w], item_end += s.n_items[w];
    const u32 at = pair_end - length;
    for (u32 i = 0; i < own_items; ++i) {
        u32* item = items + (item_end - own_items + i) * 3;
        item[0] = expert;
        item[1] = at + i * max_count;
        item[2] = min_u32(max_count, count - i * max_count);
    }
    for (u32 i = count; i < length; ++i) pairs[at + i] = ~0u;
    UNROLL
    for (u32 w = 0; w < GROUP_WARPS; ++w) s.counts[w][expert] += at;
    if (expert == GROUP_THREADS - 1) n_items[0] = item_end, n_items[1] = pair_end;
    block_sync();
    for (u32 first = start; first < end; first += WARP) {
        const u32 pair = first + lane, own = pair < end ? ids[pair] - first_expert : ~0u;
        const u32 mask = same_expert(own, own < n_experts);
        if (mask != 0) pairs[counts[own] + popcount(mask & lower)] = pair;
        warp_sync();
        if (mask != 0 && (mask & lower) == 0) counts[own] += popcount(mask);
        warp_sync();
    }
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS) moe_group(
    const u32* __restrict__ ids, u32* __restrict__ items, u32* __restrict__ n_items,
    u32* __restrict__ pairs, u32 n_pairs, u32 first_expert, u32 n_experts, u32 max_count,
    u32 align) {
    dependency_begin(ids);
    group(ids, {items, n_items, pairs, n_pairs, first_expert, n_experts, max_count, align});
}
EMU_KERNEL(moe_group)

template <bool Hash>
INLINE void route_group(const Routes& r, const Lists& lists) {
    for (u32 token = warp_id(); token < r.n_tokens; token += GROUP_WARPS) route<Hash>(r, token);
    block_sync(); // the ids of all tokens are there
    group(r.ids, lists);
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS) moe_route_group_score(
    const float* __restrict__ logits, const float* __restrict__ bias, u32* ids,
    u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens, u32 n_experts, u32 top_k,
    float scaling, u32* __restrict__ items, u32* __restrict__ n_items, u32* __restrict__ pairs,
    u32 first_expert, u32 n_local, u32 max_count, u32 align) {
    dependency_begin(logits);
    route_group<false>({logits, bias, nullptr, nullptr, ids, order, weights, n_tokens, n_experts, top_k, scaling},
                       {items, n_items, pairs, n_tokens * top_k, first_expert, n_local, max_count, align});
}
EMU_KERNEL(moe_route_group_score)

extern "C" __global__ void __launch_bounds__(GROUP_THREADS) moe_route_group_hash(
    const float* __restrict__ logits, const u16* __restrict__ table, const u32* __restrict__ tokens,
    u32* ids, u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens, u32 n_experts,
    u32 top_k, float scaling, u32* __restrict__ items, u32* __restrict__ n_items,
    u32* __restrict__ pairs, u32 first_expert, u32 n_local, u32 max_count, u32 align) {
    dependency_begin(logits, tokens);
    route_group<true>({logits, nullptr, table, tokens, ids, order, weights, n_tokens, n_experts, top_k, scaling},
                      {items, n_items, pairs, n_tokens * top_k, first_expert, n_local, max_count, align});
}
EMU_KERNEL(moe_route_group_hash)
