// moe_gate_up_fp8, moe_down_fp8, moe_down_fp8_grid: the routed experts of a step, for checkpoints whose experts are FP8.
//
// Source   `Expert.forward`, `fp8_gemm` of the official release.
// Inputs   w1, w3 [n_experts, channels, width] E4M3, with f32 scales per 128 x 128 of each expert
//          w2 [n_experts, width, channels] likewise
//          the rest as in `experts.cu`
// Outputs  gate_up: h[pair] = bf16(weight * silu(min(gate, limit)) * clamp(up, -limit, limit))
//          down: out[pair] [n_pairs, width], bf16 or f32; down_grid: of h on the FP8 grid of its blocks of
//          128, with shared memory for all of an item's, rows of `resident_stride(channels)` values
// Launch   as in `experts.cu`: grid (ceil(channels / 16) or ceil(width / 32), maximum number of
//          items), 256 threads. Widths are multiples of 16; an expert's rows are whole 128s or end in
//          a partial one.
// Limit    memory: each expert's bytes are read once per item, and an item holds up to 8 tokens.
// Arch     sm_80 and later.
// CPU twin `MoeOps::moe`, within K f32 roundings of the sum of magnitudes, then 1 bf16 ulp.

#include "../include/experts80.cuh"

EXPERTS(Fp8, float, moe_gate_up_fp8, moe_down_fp8, moe_down_fp8_grid)
