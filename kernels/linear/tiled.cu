// linear_fp8_64, linear_bf16_64, linear_bf16_each_64: `out = x W^T` for many tokens, 64 per block.
//
// Source   `fp8_gemm` (block scales 128 x 128) and `F.linear` of the official release.
// Inputs, outputs, groups: as in `skinny.cu`, whose bits these have.
// Launch   grid (ceil(n_rows / 128), ceil(n_tokens / 64), groups), 256 threads, `TILED_BYTES` of shared memory.
//          May start before the launch before it has ended.
// Limit    instructions: a warp has 64 products of the tensor cores among 470 instructions of a K block (sm_80).
// Arch     sm_80 and later; no FP8 arithmetic needed.
// CPU twin `CpuLinear::matmul`, within K f32 roundings of the sum of magnitudes (2^-21).

#include "../include/bf16_each.cuh"
#include "../include/tiled_gemm.cuh"

template <Format F>
INLINE void linear(Weights w, const bf16* x, void* out, u32 x_stride, u32 n_tokens, u32 out_stride, u32 is_f32,
                   u32 row_block) {
    dependency_begin(x);
    const u32 group = blockIdx.z, row_bytes = F == Format::Bf16 ? 2 * w.k : w.k;
    w.data += static_cast<u64>(group) * w.n_rows * row_bytes;
    if (F == Format::Fp8) w.scales += static_cast<u64>(group) * (w.n_rows / K_BLOCK) * ceil_div(w.k, K_BLOCK);
    x += static_cast<u64>(group) * w.k;
    auto& s = shared<TiledShared<F>>();
    const u32 first_token = blockIdx.y * TILED_TOKENS, first_row = row_block * TILED_ROWS;
    const u32 count = min_u32(TILED_TOKENS, n_tokens - first_token);
    tiled_gemm<F>(s, OneMatrix{w, first_row}, w.k, x, x_stride, count, [&](u32 token) { return first_token + token; });
    for (u32 i = threadIdx.x; i < count * TILED_ROWS; i += GEMM_THREADS) {
        const u32 row = i % TILED_ROWS, token = i / TILED_ROWS;
        if (first_row + row >= w.n_rows) continue;
        const u64 at = static_cast<u64>(first_token + token) * out_stride + group * w.n_rows + first_row + row;
        if (is_f32) static_cast<float*>(out)[at] = s.sums[token][row];
        else static_cast<bf16*>(out)[at] = bf16_from_f32(s.sums[token][row]);
    }
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) linear_fp8_64(
    const u8* __restrict__ data, const float* __restrict__ scales, const bf16* __restrict__ x, void* __restrict__ out,
    u32 n_rows, u32 k, u32 x_stride, u32 n_tokens, u32 out_stride, u32 is_f32) {
    linear<Format::Fp8>({data, scales, nullptr, n_rows, k}, x, out, x_stride, n_tokens, out_stride, is_f32, blockIdx.x);
}
EMU_KERNEL(linear_fp8_64)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) linear_bf16_64(
    const u8* __restrict__ data, const bf16* __restrict__ x, void* __restrict__ out, u32 n_rows, u32 k, u32 x_stride,
    u32 n_tokens, u32 out_stride, u32 is_f32) {
    linear<Format::Bf16>({data, nullptr, nullptr, n_rows, k}, x, out, x_stride, n_tokens, out_stride, is_f32, blockIdx.x);
}
EMU_KERNEL(linear_bf16_64)

INLINE void linear_each(const Matrices& m, const bf16* x, u32 k, u32 n_tokens) {
    const MatrixPart part = part_of(m, k, TILED_ROWS);
    linear<Format::Bf16>(part.w, x, part.out, k, n_tokens, part.w.n_rows, part.is_f32, part.row_block);
}
LINEAR_BF16_EACH(linear_bf16_each_64, linear_each)
