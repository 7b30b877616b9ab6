// moe_gate_score, moe_gate_hash: for few tokens, logits of all experts, then which experts each token goes to and
// each expert's list of tokens; `linear_bf16`, `moe_route` and `moe_group` in one launch.
//
// Source   `Gate.forward` of the official release; the grouping of `MoE.forward`.
// Inputs   gate [n_experts, k] bf16    x [n_tokens, k] bf16    bias, or table and tokens, as of `moe_route`
//          ended [1] u32: zero, and zero again afterwards. Launches that may run at the same time have one each.
// Outputs  ids, weights, order of `moe_route`, items, n_items, pairs of `moe_group`. Equal bits.
//          sums [n_tokens, 4, n_experts] f32: logits by segments of k, to be added in order
// Launch   grid (ceil(n_experts / 16), 4), 512 threads: 16 experts and a segment of k; a warp has 128 columns. k is a
//          multiple of 8, at most 8,192; at most 16 tokens, 512 experts, top_k 32. The last block to end, by
//          a count in memory, routes (a warp per token) and groups.
//          May start before the launch before it has ended: weights come first.
// Limit    gate (2 MB for Flash, 33 KB a block), then latency.
// Arch     sm_80 and later.
// CPU twin as of `linear_bf16`, `moe_route` and `moe_group`.

#include "../include/formats.cuh"
#include "../include/route.cuh"

// As of `skinny_gemm.cuh`, for the same bits.
constexpr u32 K_BLOCK = 128, SEGMENTS = 4;
constexpr u32 THREADS = GROUP_THREADS, WARPS = THREADS / WARP, ROWS = 16, TILE_TOKENS = 8, TILES = 2, TOKENS = TILE_TOKENS * TILES;
// Vectors of 16 bytes of a lane in a row's block of k: columns 32 v + 8 (lane % 4) on.
constexpr u32 VECTORS = 4;

struct GateShared {
    union {
        float parts[WARPS][TOKENS][ROWS + 1];
        GroupShared groups; // where `group` expects it
    };
    u32 is_last;
};

struct Gate {
    const bf16 *gate, *x;
    float* sums;
    u32* ended;
    u32 k, n_tokens;
};

template <bool Hash>
INLINE void gate(Gate m, Routes r, const Lists& lists) {
    GateShared& s = shared<GateShared>();
    const u32 t = threadIdx.x, lane = lane_id(), g = lane / 4, quad = lane % 4, warp = warp_id();
    const u32 segment = blockIdx.y, first_row = blockIdx.x * ROWS, n_blocks = ceil_div(m.k, K_BLOCK);
    const u32 per_segment = ceil_div(n_blocks, SEGMENTS), block = segment * per_segment + warp;
    const bool has_block = warp < per_segment && block < n_blocks;
    const u32 n_parts = min_u32(per_segment, n_blocks - min_u32(n_blocks, segment * per_segment));
    dependency_trigger();
    u32x4 w[2][VECTORS] = {};
    UNROLL
    for (u32 half = 0; half < 2; ++half)
        UNROLL
        for (u32 v = 0; v < VECTORS; ++v) {
            const u32 row = first_row + g + 8 * half, column = block * K_BLOCK + 32 * v + 8 * quad;
            if (has_block && row < r.n_experts && column < m.k)
                w[half][v] = load_stream16(m.gate + static_cast<u64>(row) * m.k + column);
        }
    dependency_wait();
    m.x = after_wait(m.x), r.tokens = after_wait(r.tokens);
    if (has_block) {
        UNROLL
        for (u32 tile = 0; tile < TILES; ++tile) {
            const u32 token = tile * TILE_TOKENS + g;
            if (tile * TILE_TOKENS >= m.n_tokens) break;
            float part[4] = {};
            UNROLL
            for (u32 v = 0; v < VECTORS; ++v) {
                const u32 column = block * K_BLOCK + 32 * v + 8 * quad;
                u32x4 x = {};
                if (token < m.n_tokens && column < m.k)
                    x = *reinterpret_cast<const u32x4*>(m.x + static_cast<u64>(token) * m.k + column);
                UNROLL
                for (u32 word = 0; word < 4; word += 2)
                    mma_bf16_16816(part, w[0][v].v[word], w[1][v].v[word], w[0][v].v[word + 1], w[1][v].v[word + 1],
                                   x.v[word], x.v[word + 1]);
            }
            UNROLL
            for (u32 i = 0; i < 4; ++i) s.parts[warp][tile * TILE_TOKENS + 2 * quad + i % 2][g + 8 * (i / 2)] = part[i];
        }
    }
    block_sync();
    for (u32 i = t; i < m.n_tokens * ROWS; i += THREADS) {
        const u32 token = i / ROWS, row = i % ROWS;
        if (first_row + row >= r.n_experts) continue;
        float sum = 0.0f;
        for (u32 part = 0; part < n_parts; ++part) sum = add_rn(s.parts[part][token][row], sum);
        m.sums[(token * SEGMENTS + segment) * r.n_experts + first_row + row] = sum;
    }
    block_sync();
    if (t == 0) {
        const bool is_last = atomic_add_ordered(m.ended, 1) == gridDim.x * gridDim.y - 1;
        if (is_last) *m.ended = 0;
        s.is_last = is_last;
    }
    block_sync();
    if (!s.is_last) return;
    for (u32 token = warp; token < m.n_tokens; token += WARPS) {
        const float* sums = m.sums + token * SEGMENTS * r.n_experts;
        route<Hash>(r, token, [&](u32 expert) {
            float sum = sums[expert];
            UNROLL
            for (u32 of = 1; of < SEGMENTS; ++of) sum = add_rn(sum, sums[of * r.n_experts + expert]);
            return sum;
        });
    }
    block_sync(); // the ids of all tokens are there
    group(r.ids, lists);
}

// `sums` and `ids` are read where other threads wrote them.
extern "C" __global__ void __launch_bounds__(THREADS) moe_gate_score(
    const bf16* __restrict__ weight, const bf16* __restrict__ x, float* sums, u32* ended, u32 k,
    const float* __restrict__ bias, u32* ids, u32* __restrict__ order, float* __restrict__ weights, u32 n_tokens,
    u32 n_experts, u32 top_k, float scaling, u32* __restrict__ items, u32* __restrict__ n_items,
    u32* __restrict__ pairs, u32 first_expert, u32 n_local, u32 max_count, u32 align) {
    gate<false>({weight, x, sums, ended, k, n_tokens},
                {bias, nullptr, nullptr, ids, order, weights, n_tokens, n_experts, top_k, scaling},
                {items, n_items, pairs, n_tokens * top_k, first_expert, n_local, max_count, align});
}
EMU_KERNEL(moe_gate_score)

extern "C" __global__ void __launch_bounds__(THREADS) moe_gate_hash(
    const bf16* __restrict__ weight, const bf16* __restrict__ x, float* sums, u32* ended, u32 k,
    const u16* __restrict__ table, const u32* __restrict__ tokens, u32* ids, u32* __restrict__ order,
    float* __restrict__ weights, u32 n_tokens, u32 n_experts, u32 top_k, float scaling, u32* __restrict__ items,
    u32* __restrict__ n_items, u32* __restrict__ pairs, u32 first_expert, u32 n_local, u32 max_count, u32 align) {
    gate<true>({weight, x, sums, ended, k, n_tokens},
               {nullptr, table, tokens, ids, order, weights, n_tokens, n_experts, top_k, scaling},
               {items, n_items, pairs, n_tokens * top_k, first_expert, n_local, max_count, align});
}
EMU_KERNEL(moe_gate_hash)
