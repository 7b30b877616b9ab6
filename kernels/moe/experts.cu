// moe_gate_up_fp4, moe_down_fp4, moe_down_fp4_grid: the routed experts of a step, FP4 weights expanded in registers.
//
// Source   `Expert.forward`, `fp4_gemm` of the official release.
// Inputs   w1, w3 [n_experts, channels, width] E2M1, two per byte, with E8M0 exponents per 32
//          w2 [n_experts, width, channels] likewise
//          items [.., 3] u32 (expert, first, count) and pairs [..] u32 of `moe_group`: the pairs
//          `pairs[first .. first + count]` go through the item's expert; pair = token * top_k + slot
//          x [n_tokens, width] bf16    h [n_pairs, channels] bf16    weights [n_pairs] f32
// Outputs  gate_up: h[pair] = bf16(weight * silu(min(gate, limit)) * clamp(up, -limit, limit))
//          down: out[pair] [n_pairs, width], bf16 or f32; down_grid: of h on the FP8 grid of its blocks of
//          128, with shared memory for all of an item's, rows of `resident_stride(channels)` values
// Launch   grid (ceil(channels / 16) or ceil(width / 32), maximum number of items), 256 threads;
//          blocks beyond `n_items[0]` end at once, so one grid serves every routing.
//          Widths are multiples of 32. Exponents must be at most 128 (a factor of 2).
// Limit    memory: each expert's bytes are read once per item, and an item holds up to 8 tokens.
// Arch     sm_80 and later. Exact products: E2M1 times its scale is exact in bf16.
// CPU twin `MoeOps::moe`, within K f32 roundings of the sum of magnitudes, then 1 bf16 ulp.

#include "../include/experts80.cuh"

EXPERTS(Fp4, u8, moe_gate_up_fp4, moe_down_fp4, moe_down_fp4_grid)
