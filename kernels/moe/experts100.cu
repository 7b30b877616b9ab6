// moe_gate_up100_*, moe_down100_*: the routed experts of a step by block-scaled products, E2M1 weights
// times E4M3 activations.
//
// Source   `Expert.forward`, `fp4_gemm` of the official release.
// Inputs   weights: tensor map, boxes of 128 rows x 128. gate_up: of [n_experts][2][channels / 16][16]
//          rows of E2M1, gate then up, as dimensions (k, 16, 2, channels / 16, n_experts): a tile has 16
//          gate channels, then the same of up, four times. down: [n_experts][width] rows
//          w_scales of `moe_pack_scales100`
//          items [.., 3] u32 (expert, first, count), n_items [2] and pairs of `moe_group` with lists
//          padded to 8: the pairs `pairs[first .. first + count]` go through the item's expert
//          codes, x_scales: tiles of `act_quant_tiles100` of the pairs' rows
//          _8: rows [.., k] bf16 instead: x by token (pair = token * top_k + slot), or h by pair
//          weights_of_pairs [n_pairs] f32
// Outputs  gate_up: h[pair] = bf16(weight * silu(min(gate, limit)) * clamp(up, -limit, limit))
//          down: out[pair] [n_pairs, width] bf16
// Launch   grid (row tiles, maximum number of items), 224 threads; blocks beyond `n_items[0]` end at
//          once, so one grid serves every routing. _8, _32, _128: tokens of an item at most. Widths are
//          multiples of 128, channels of 16.
// Limit    few tokens: memory, each FP4 byte is read once per item. Many: tensor cores.
// Arch     sm_100f. Unproven until a B200 ran it.
// CPU twin `MoeOps::moe`: the official products and scales exactly, sums within K f32 roundings, then 1
//          bf16 ulp.

#include "../include/pipeline100.cuh"

constexpr u32 ITEM = 3, CHANNELS_PER_TILE = 64, HALF = 16;

struct Experts {
    const u8* w_scales;
    const u32 *items, *n_items, *pairs;
    const float* weights; // gate_up
    bf16* out;
    u32 n_rows, k; // of a matrix: channels and width, or width and channels
    float limit;
};

// Lanes 0 to 15 hold gate channels, 16 to 31 the same of up: the first take even tokens, the others odd
// ones.
INLINE void store_gate_up(const Experts& e, u32 channel, const u32* pairs, u32 count, u32 token, const float (&v)[8]) {
    const bool is_up = lane_id() >= HALF;
    UNROLL
    for (u32 i = 0; i < 8; i += 2) {
        const float other = shfl_xor(is_up ? v[i] : v[i + 1], HALF);
        const float g = is_up ? other : v[i], u = is_up ? v[i + 1] : other;
        if (token + i + is_up >= count || channel >= e.n_rows) continue;
        const float gate = min_f32(round_bf16(g), e.limit);
        const float up = max_f32(min_f32(round_bf16(u), e.limit), -e.limit);
        const float silu = mul_rn(gate, div_rn(1.0f, 1.0f + exp_f32(-gate)));
        const u64 pair = pairs[token + i + is_up];
        e.out[pair * e.n_rows + channel] = bf16_from_f32(mul_rn(mul_rn(silu, up), e.weights[pair]));
    }
}

// `x_of(pairs, count)`: where the activations of an item come from.
template <bool Down, u32 N, u32 Stages, class XOf>
INLINE void experts(const Experts& e, const TensorMap& weights, const XOf& x_of) {
    if (blockIdx.y >= e.n_items[0]) return;
    using P = Pipeline<Format::Fp4, N, Stages>;
    P& s = shared<P>();
    const u32 *item = e.items + blockIdx.y * ITEM, *pairs = e.pairs + item[1];
    const u32 expert = item[0], count = item[2], tile = blockIdx.x, n_blocks = ceil_div(e.k, K_BLOCK);
    const u8* w_scales = e.w_scales + (static_cast<u64>(expert) * gridDim.x + tile) * n_blocks * SCALES;
    const Work work = {w_scales, item[1], ceil_div(count, 8) * 8, 0, n_blocks, n_blocks};
    pipeline_start<Format::Fp4>(s);
    if (warp_id() >= STORE_WARPS) {
        feed<Format::Fp4>(
            s, work, x_of(pairs, count),
            [&](u8* to, u32 column, u64* full) {
                if constexpr (Down) {
                    const u32 at[3] = {column, tile * TILE_ROWS, expert};
                    tensor_load<true>(to, weights, at, full);
                } else {
                    const u32 at[5] = {column, 0, 0, tile * (CHANNELS_PER_TILE / HALF), expert};
                    tensor_load<true>(to, weights, at, full);
                }
            },
            [] {});
    } else {
        const u32 warp = warp_id(), lane = lane_id();
        for_sums(s, work, [&](u32 token, const float (&v)[8]) {
            if constexpr (Down) {
                const u32 row = tile * TILE_ROWS + warp * WARP + lane;
                UNROLL
                for (u32 i = 0; i < 8; ++i)
                    if (token + i < count && row < e.n_rows)
                        e.out[static_cast<u64>(pairs[token + i]) * e.n_rows + row] = bf16_from_f32(v[i]);
            } else {
                store_gate_up(e, tile * CHANNELS_PER_TILE + warp * HALF + lane % HALF, pairs, count, token, v);
            }
        });
    }
    pipeline_end(s);
}

#define GATE_UP(name, tokens, stages)                                                                  \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 2) name(                            \
        const __grid_constant__ TensorMap weights, const u8* __restrict__ w_scales,                    \
        const u32* __restrict__ items, const u32* __restrict__ n_items, const u32* __restrict__ pairs, \
        const u8* __restrict__ codes, const u32* __restrict__ x_scales, u32 x_rows,                    \
        const float* __restrict__ weights_of_pairs, bf16* __restrict__ h, u32 channels, u32 width, float limit) { \
        dependency_begin(items, n_items, pairs, weights_of_pairs);                                     \
        experts<false, tokens, stages>(                                                                \
            {w_scales, items, n_items, pairs, weights_of_pairs, h, channels, width, limit}, weights,   \
            [&](const u32*, u32) { return XTiles{codes, x_scales, x_rows}; });                         \
    }                                                                                                  \
    EMU_KERNEL(name)
#define DOWN(name, tokens, stages)                                                                     \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 2) name(                            \
        const __grid_constant__ TensorMap weights, const u8* __restrict__ w_scales,                    \
        const u32* __restrict__ items, const u32* __restrict__ n_items, const u32* __restrict__ pairs, \
        const u8* __restrict__ codes, const u32* __restrict__ x_scales, u32 x_rows, bf16* __restrict__ out, \
        u32 width, u32 channels) {                                                                     \
        dependency_begin(items, n_items, pairs);                                                       \
        experts<true, tokens, stages>({w_scales, items, n_items, pairs, nullptr, out, width, channels, 0.0f}, \
                                      weights, [&](const u32*, u32) { return XTiles{codes, x_scales, x_rows}; }); \
    }                                                                                                  \
    EMU_KERNEL(name)

GATE_UP(moe_gate_up100_32, 32, 5)
GATE_UP(moe_gate_up100_128, 128, 3)
DOWN(moe_down100_32, 32, 5)
DOWN(moe_down100_128, 128, 3)

extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 2) moe_gate_up100_8(
    const __grid_constant__ TensorMap weights, const u8* __restrict__ w_scales, const u32* __restrict__ items,
    const u32* __restrict__ n_items, const u32* __restrict__ pairs, const bf16* __restrict__ rows, u32 top_k,
    const float* __restrict__ weights_of_pairs, bf16* __restrict__ h, u32 channels, u32 width, float limit) {
    dependency_begin(items, n_items, pairs, rows, weights_of_pairs);
    experts<false, 8, 6>({w_scales, items, n_items, pairs, weights_of_pairs, h, channels, width, limit}, weights,
                         [&](const u32* own, u32 count) { return XRows{rows, own, top_k, count, width}; });
}
EMU_KERNEL(moe_gate_up100_8)

extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 2) moe_down100_8(
    const __grid_constant__ TensorMap weights, const u8* __restrict__ w_scales, const u32* __restrict__ items,
    const u32* __restrict__ n_items, const u32* __restrict__ pairs, const bf16* __restrict__ rows,
    bf16* __restrict__ out, u32 width, u32 channels) {
    dependency_begin(items, n_items, pairs, rows);
    experts<true, 8, 6>({w_scales, items, n_items, pairs, nullptr, out, width, channels, 0.0f}, weights,
                        [&](const u32* own, u32 count) { return XRows{rows, own, 1, count, channels}; });
}
EMU_KERNEL(moe_down100_8)
