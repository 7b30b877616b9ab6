// linear90_bf16_*, linear90_wo_*: layers whose activations stay bf16, on tensor cores, many tokens:
// `out = x W^T` of bf16 weights, or (wo) of FP8 weights expanded in registers.
//
// Source   `F.linear` of the official release; wo_a, which it keeps in bf16.
// Inputs   weights: tensor map of [groups n_rows, k] bf16, boxes of 64 rows x 64, or E4M3, boxes of
//          64 x 128, with w_scales [groups ceil(n_rows / 128), ceil(k / 128)] f32
//          x: tensor map of [n_tokens, >= groups k] bf16, boxes of as many rows as a block has tokens
//          (64 or 128) x 64
// Outputs  out [n_tokens, out_stride], written as bf16 (`is_f32` = 0) or f32
//          Groups: group z has rows z n_rows ..+ n_rows of the matrix, columns z k ..+ k of x and columns
//          z n_rows ..+ n_rows of out; n_rows in whole 128s then.
// Launch   384 threads. _64: grid (C ceil(n_rows / 64), ceil(n_tokens / 64), groups) in clusters of C,
//          which split K. _128: grid (ceil(n_rows / 128), ceil(n_tokens / 128), groups), `n_segments`
//          = 2 C of the other form: C belongs to the matrix, so the order of addition is the same.
//          May start before the launch before it has ended: weights come first.
// Limit    tensor cores; memory below some 200 tokens.
// Arch     sm_90a; up to 8 tokens and elsewhere `skinny.cu`.
// CPU twin `CpuLinear::matmul`, within K f32 roundings of the sum of magnitudes.

#include "../include/linear90.cuh"

#define LINEAR(name, cluster, body)                                                                    \
    extern "C" __global__ void __launch_bounds__(PIPELINE_THREADS, 1) cluster name(                    \
        const __grid_constant__ TensorMap weights, [[maybe_unused]] const float* __restrict__ w_scales, \
        const __grid_constant__ TensorMap rows, void* __restrict__ out, u32 n_rows, u32 k, u32 n_tokens, \
        u32 out_stride, u32 is_f32, [[maybe_unused]] u32 n_segments) {                                 \
        const Linear l = {w_scales, out, n_rows, k, n_tokens, out_stride, is_f32, blockIdx.z};         \
        const Input x = {nullptr, 0, {}, &rows};                                                       \
        body;                                                                                          \
    }
#define SPLIT(name, format, stages, c)                                                                 \
    LINEAR(name, __cluster_dims__(c), (split<Format::format, 64, stages, c>(l, weights, x, blockIdx.x / c))) \
    EMU_KERNEL(name, .cluster = c)

SPLIT(linear90_bf16_64_c1, Bf16, 5, 1)
SPLIT(linear90_bf16_64_c2, Bf16, 5, 2)
SPLIT(linear90_bf16_64_c4, Bf16, 5, 4)
LINEAR(linear90_bf16_128, , (whole<Format::Bf16, 4>(l, weights, x, n_segments)))
EMU_KERNEL(linear90_bf16_128)
SPLIT(linear90_wo_64_c1, Fp8ByBf16, 3, 1)
SPLIT(linear90_wo_64_c2, Fp8ByBf16, 3, 2)
SPLIT(linear90_wo_64_c4, Fp8ByBf16, 3, 4)
LINEAR(linear90_wo_128, , (whole<Format::Fp8ByBf16, 3>(l, weights, x, n_segments)))
EMU_KERNEL(linear90_wo_128)
