// linear_fp8_*, linear_bf16_*: `out = x W^T` for up to 8 (_8) or 32 (_32) tokens per block row;
// linear_bf16_each_*: the same for up to five matrices and one x in one launch; linear_fp8_pair_8: for two FP8
// ones; linear_fp8_grid_8: of an x that is put on the FP8 grid first.
//
// Source   `fp8_gemm` (block scales 128 x 128) and `F.linear` of the official release.
// Inputs   data [n_rows, k] E4M3 or bf16    scales [ceil(n_rows / 128), ceil(k / 128)] f32 (FP8)
//          x: token m's values begin at x + m x_stride; bf16. For FP8 semantics with quantised
//          activations x holds values on the FP8 grid (exact in bf16): the result is then that of
//          E4M3 x E4M3 products; otherwise it is W8A16.
// Outputs  out [n_tokens, out_stride], written as bf16 (`is_f32` = 0) or f32
//          Groups (wo_a): group z has rows z n_rows ..+ n_rows of the matrix, columns z k ..+ k of x and
//          columns z n_rows ..+ n_rows of out; n_rows in whole 128s then.
//          _each, _pair: matrices one after the other along the grid's first axis; no rows: none.
// Launch   grid (ceil(n_rows / 32), ceil(n_tokens / Tokens), groups), 256 threads. k is a multiple of 16
//          (FP8) or 8 (bf16); scales of FP8 rows need n_rows in whole 128s or a last partial one.
//          linear_fp8_grid_8: shared memory for all of x, rows of `resident_stride(k)` values.
//          May start before the launch before it has ended: weights come first.
// Limit    memory for few tokens: every weight byte is read once per block row of tokens.
// Arch     sm_80 and later; no FP8 arithmetic needed.
// CPU twin `CpuLinear::matmul`, within K f32 roundings of the sum of magnitudes (2^-21).

#include "../include/bf16_each.cuh"

// `row_block`: which 32 rows of the matrix.
template <Format F, u32 Tokens, u32 Stages>
INLINE void linear(Weights w, const bf16* x, void* out, u32 x_stride, u32 n_tokens, u32 out_stride, u32 is_f32,
                   u32 row_block) {
    dependency_trigger();
    // Where this group's part of each begins.
    const u32 group = blockIdx.z, row_bytes = F == Format::Bf16 ? 2 * w.k : w.k;
    w.data += static_cast<u64>(group) * w.n_rows * row_bytes;
    if (F == Format::Fp8) w.scales += static_cast<u64>(group) * (w.n_rows / K_BLOCK) * ceil_div(w.k, K_BLOCK);
    x += static_cast<u64>(group) * w.k;
    const u32 first_column = group * w.n_rows;
    auto& s = shared<GemmShared<Tokens, Stages>>();
    const u32 first_token = blockIdx.y * Tokens, first_row = row_block * ROW_TILES * TILE_ROWS;
    const u32 tile = warp_id() % ROW_TILES;
    prefetch_rows<F>(w, first_row + tile * TILE_ROWS);
    dependency_wait();
    gemm<F, Tokens, Stages>(s, w, first_row + tile * TILE_ROWS, x, x_stride, n_tokens,
                            [&](u32 token) { return first_token + token; });
    for (u32 i = threadIdx.x; i < Tokens * ROW_TILES * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % (ROW_TILES * TILE_ROWS), token = i / (ROW_TILES * TILE_ROWS);
        if (first_row + row >= w.n_rows || first_token + token >= n_tokens) continue;
        const float sum = gemm_sum(s, row / TILE_ROWS, row % TILE_ROWS, token);
        const u64 at = static_cast<u64>(first_token + token) * out_stride + first_column + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = sum;
        else static_cast<bf16*>(out)[at] = bf16_from_f32(sum);
    }
}

// `per_sm`: blocks per SM; two are asked for where the compiler, left to itself, saves registers by spilling.
#define LINEAR_FP8(name, tokens, stages, per_sm)                                                  \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, per_sm) name(                      \
        const u8* __restrict__ data, const float* __restrict__ scales, const bf16* __restrict__ x, \
        void* __restrict__ out, u32 n_rows, u32 k, u32 x_stride, u32 n_tokens,        \
        u32 out_stride, u32 is_f32) {                                                             \
        const Weights w = {data, scales, nullptr, n_rows, k};                                     \
        linear<Format::Fp8, tokens, stages>(w, x, out, x_stride, n_tokens, out_stride, is_f32,    \
                                            blockIdx.x);                                          \
    }                                                                                             \
    EMU_KERNEL(name)
#define LINEAR_BF16(name, tokens, stages)                                                         \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) name(                           \
        const u8* __restrict__ data, const bf16* __restrict__ x, void* __restrict__ out,          \
        u32 n_rows, u32 k, u32 x_stride, u32 n_tokens, u32 out_stride, u32 is_f32) {              \
        const Weights w = {data, nullptr, nullptr, n_rows, k};                                    \
        linear<Format::Bf16, tokens, stages>(w, x, out, x_stride, n_tokens, out_stride, is_f32,   \
                                             blockIdx.x);                                         \
    }                                                                                             \
    EMU_KERNEL(name)

LINEAR_FP8(linear_fp8_8, 8, 4, 2)
LINEAR_FP8(linear_fp8_32, 32, 2, 1)
LINEAR_BF16(linear_bf16_8, 8, 4)
LINEAR_BF16(linear_bf16_32, 32, 2)

template <u32 Tokens, u32 Stages>
INLINE void linear_each(const Matrices& m, const bf16* x, u32 k, u32 n_tokens) {
    const MatrixPart part = part_of(m, k, ROW_TILES * TILE_ROWS);
    linear<Format::Bf16, Tokens, Stages>(part.w, x, part.out, k, n_tokens, part.w.n_rows, part.is_f32, part.row_block);
}
LINEAR_BF16_EACH(linear_bf16_each_8, (linear_each<8, 4>))
LINEAR_BF16_EACH(linear_bf16_each_32, (linear_each<32, 2>))

// Two FP8 matrices times the same x, for up to eight tokens.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) linear_fp8_pair_8(
    const bf16* __restrict__ x, u32 k, u32 n_tokens, const u8* __restrict__ data0, const float* __restrict__ scales0,
    void* __restrict__ out0, u32 rows0, const u8* __restrict__ data1, const float* __restrict__ scales1,
    void* __restrict__ out1, u32 rows1) {
    const u32 n_first = ceil_div(rows0, ROW_TILES * TILE_ROWS);
    const bool is_first = blockIdx.x < n_first;
    const Weights w = {is_first ? data0 : data1, is_first ? scales0 : scales1, nullptr, is_first ? rows0 : rows1, k};
    linear<Format::Fp8, 8, 4>(w, x, is_first ? out0 : out1, k, n_tokens, w.n_rows, 0, is_first ? blockIdx.x : blockIdx.x - n_first);
}
EMU_KERNEL(linear_fp8_pair_8)

// `act_quant_grid` and `linear_fp8_8` for up to eight tokens.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) linear_fp8_grid_8(
    const u8* __restrict__ data, const float* __restrict__ scales, const bf16* __restrict__ x, void* __restrict__ out,
    u32 n_rows, u32 k, u32 n_tokens, u32 is_f32) {
    auto& s = shared<GemmShared<8, 4>>();
    const Weights w = {data, scales, nullptr, n_rows, k};
    const u32 first_row = blockIdx.x * ROW_TILES * TILE_ROWS, tile = warp_id() % ROW_TILES;
    dependency_trigger();
    prefetch_rows<Format::Fp8>(w, first_row + tile * TILE_ROWS);
    dependency_wait();
    x = after_wait(x);
    gemm_resident<Format::Fp8>(s, w, first_row + tile * TILE_ROWS, n_tokens, [&](bf16* to) {
        fill_on_grid(to, x, k, k, n_tokens, [](u32 token) { return token; });
    });
    for (u32 i = threadIdx.x; i < n_tokens * ROW_TILES * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % (ROW_TILES * TILE_ROWS), token = i / (ROW_TILES * TILE_ROWS);
        if (first_row + row >= n_rows) continue;
        const float sum = gemm_sum(s, row / TILE_ROWS, row % TILE_ROWS, token);
        const u64 at = static_cast<u64>(token) * n_rows + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = sum;
        else static_cast<bf16*>(out)[at] = bf16_from_f32(sum);
    }
}
EMU_KERNEL(linear_fp8_grid_8)
