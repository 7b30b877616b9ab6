// Which experts each token goes to, and each expert's list of tokens: what the kernels of `moe/route.cu` and
// `moe/gate.cu` do, whose headers say what goes in and comes out.
#pragma once

#include "reduce.cuh"
#include "top_k.cuh"

constexpr u32 MAX_PER_LANE = 16, GROUP_THREADS = 512;

INLINE float sqrt_softplus(float x) {
    // The identity above 20, as in PyTorch.
    return sqrt_rn(x > 20.0f ? x : log1p_f32(exp_f32(x)));
}
// What decides the choices of all tokens, beside the logits, and where they go.
struct Routes {
    const float* bias; // null: by hash
    const u16* table;
    const u32* tokens;
    u32 *ids, *order;
    float* weights;
    u32 n_tokens, n_experts, top_k;
    float scaling;
};

// One warp. `logit(expert)` is that of the token.
template <bool Hash, class Logit>
INLINE void route(const Routes& r, u32 token, const Logit& logit) {
    const u32 lane = lane_id(), top_k = r.top_k, n_experts = r.n_experts;
    // Lane i keeps the id and score of choice i.
    u32 id = 0;
    if (Hash) {
        if (lane < top_k) id = r.table[static_cast<u64>(r.tokens[token]) * top_k + lane];
    } else {
        u32 rank[MAX_PER_LANE];
        UNROLL
        for (u32 i = 0; i < MAX_PER_LANE; ++i) {
            const u32 expert = i * WARP + lane;
            rank[i] = expert < n_experts ? ordered(sqrt_softplus(logit(expert)) + r.bias[expert]) : 0;
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
    const float score = lane < top_k ? sqrt_softplus(logit(id)) : 0.0f;
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
