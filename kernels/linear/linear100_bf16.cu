// linear100_bf16_*, linear100_wo_*: layers whose activations stay bf16, many tokens: `out = x W^T` of up to
// five bf16 matrices and one x, or (wo) of FP8 weights expanded to bf16.
//
// Source   `F.linear` of the official release; wo_a, which it keeps in bf16.
// Inputs   weights: tensor map of [groups n_rows, k] bf16, boxes of 128 rows x 64, or E4M3, boxes of
//          128 x 128, with w_scales [groups ceil(n_rows / 128), ceil(k / 128)] f32, powers of two
//          x: tensor map of [n_tokens, >= groups k] bf16, boxes of as many rows as a block has tokens
//          (64, 128 or 256) x 64
// Outputs  out [n_tokens, out_stride] of each matrix, written as bf16 (`is_f32` = 0) or f32
//          Groups (one matrix): group z has rows z n_rows ..+ n_rows of it, columns z k ..+ k of x and
//          columns z n_rows ..+ n_rows of out; n_rows in whole 128s then.
//          Matrices one after the other along the grid's first axis; no rows: none.
// Launch   224 threads. _64: grid (C row tiles, ceil(n_tokens / 64), groups) in clusters of C = 1, 2 or 4,
//          which split K. _256_s1, _256_s2, _128_s4: grid (row tiles, ceil(n_tokens / _), groups), 1, 2 or 4
//          segments of K one after the other: as many as C is, so a token's bits are the same. Segments
//          belong to the matrices of a launch, whatever the number of tokens.
//          Two blocks share an SM where tensor memory (256 columns each) and shared memory (113 KB) allow.
//          May start before the launch before it has ended: weights come first.
// Limit    many tokens: the second-level cache, 96 bytes per cycle and SM for products of 128 x 256. Few: memory.
// Arch     sm_100f. Unproven until a B200 ran it. Up to 8 tokens and elsewhere `skinny.cu`.
// CPU twin `CpuLinear::matmul`, within K f32 roundings of the sum of magnitudes.

#include "../include/linear100.cuh"

template <Format F, u32 N, u32 Stages, u32 Cluster, u32 Segments>
INLINE void linear(const Linear& l, const TensorMap& weights, const float* scales, const TensorMap& rows, u32 k, u32 tile) {
    Pipeline<F, N, Stages, Segments>& s = shared<Pipeline<F, N, Stages, Segments>>();
    const Work work = work_of<N, Cluster, Segments>(l, nullptr, k, tile, 16);
    pipeline_start<F>(s);
    dependency_trigger();
    const u32 first_row = tile * TILE_ROWS;
    if (warp_id() >= STORE_WARPS) {
        feed<F>(
            s, work, XMap{&rows, l.group * k},
            [&](u8* to, u32 column, u64* full) {
                const u32 at[2] = {column, l.group * l.n_rows + first_row};
                tensor_load<Segments == 1 && N == 64>(to, weights, at, full);
            },
            [] { dependency_wait(); });
        let_others_add<Cluster>();
    } else {
        if constexpr (F == Format::Fp8ByBf16)
            expand_weights(s, work, scales + static_cast<u64>(l.group * (l.n_rows / K_BLOCK) + tile) * ceil_div(k, K_BLOCK));
        dependency_wait();
        store_sums<Cluster>(s, l, work, first_row);
    }
    pipeline_end(s);
}

// Which matrix a block has, and the first tile of it.
struct Matrix {
    const TensorMap* weights;
    void* out;
    u32 n_rows, out_stride, is_f32;
};

#define BF16(name, tokens, stages, c, segments, blocks)                                                \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, blocks) __cluster_dims__(c) name(   \
        const __grid_constant__ TensorMap rows, u32 k, u32 n_tokens, const __grid_constant__ TensorMap weights0, \
        void* __restrict__ out0, u32 rows0, u32 stride0, u32 f32_0, const __grid_constant__ TensorMap weights1, \
        void* __restrict__ out1, u32 rows1, u32 stride1, u32 f32_1, const __grid_constant__ TensorMap weights2, \
        void* __restrict__ out2, u32 rows2, u32 stride2, u32 f32_2, const __grid_constant__ TensorMap weights3, \
        void* __restrict__ out3, u32 rows3, u32 stride3, u32 f32_3, const __grid_constant__ TensorMap weights4, \
        void* __restrict__ out4, u32 rows4, u32 stride4, u32 f32_4) {                                  \
        Matrix m = {&weights0, out0, rows0, stride0, f32_0};                                           \
        u32 tile = blockIdx.x / c, behind = ceil_div(rows0, TILE_ROWS), first = 0;                     \
        const auto next = [&](const TensorMap* w, void* out, u32 n_rows, u32 stride, u32 is_f32) {     \
            if (n_rows > 0 && tile >= behind) m = {w, out, n_rows, stride, is_f32}, first = behind;    \
            behind += ceil_div(n_rows, TILE_ROWS);                                                     \
        };                                                                                             \
        next(&weights1, out1, rows1, stride1, f32_1), next(&weights2, out2, rows2, stride2, f32_2);    \
        next(&weights3, out3, rows3, stride3, f32_3), next(&weights4, out4, rows4, stride4, f32_4);    \
        linear<Format::Bf16, tokens, stages, c, segments>(                                             \
            {m.out, m.n_rows, n_tokens, m.out_stride, m.is_f32, blockIdx.z}, *m.weights, nullptr, rows, k, tile - first); \
    }                                                                                                  \
    EMU_KERNEL(name, .cluster = c)
#define WO(name, tokens, stages, c, segments, blocks)                                                  \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, blocks) __cluster_dims__(c) name(   \
        const __grid_constant__ TensorMap rows, u32 k, u32 n_tokens, const __grid_constant__ TensorMap weights, \
        const float* __restrict__ w_scales, void* __restrict__ out, u32 n_rows, u32 out_stride, u32 is_f32) { \
        linear<Format::Fp8ByBf16, tokens, stages, c, segments>(                                        \
            {out, n_rows, n_tokens, out_stride, is_f32, blockIdx.z}, weights, w_scales, rows, k, blockIdx.x / c); \
    }                                                                                                  \
    EMU_KERNEL(name, .cluster = c)

BF16(linear100_bf16_64_c1, 64, 4, 1, 1, 2)
BF16(linear100_bf16_64_c2, 64, 4, 2, 1, 2)
BF16(linear100_bf16_64_c4, 64, 4, 4, 1, 2)
BF16(linear100_bf16_256_s1, 256, 2, 1, 1, 2)
BF16(linear100_bf16_256_s2, 256, 4, 1, 2, 1)
BF16(linear100_bf16_128_s4, 128, 6, 1, 4, 1)
WO(linear100_wo_64_c1, 64, 3, 1, 1, 2)
WO(linear100_wo_64_c2, 64, 3, 2, 1, 2)
WO(linear100_wo_64_c4, 64, 3, 4, 1, 2)
WO(linear100_wo_256_s1, 256, 4, 1, 1, 1)
WO(linear100_wo_256_s2, 256, 4, 1, 2, 1)
WO(linear100_wo_128_s4, 128, 6, 1, 4, 1)
