// moe_gate_up90_*, moe_down90_*: the routed experts of a step on tensor cores in FP8.
//
// Source   `Expert.forward`, `fp4_gemm` of the official release.
// Inputs   tiles: the experts' matrices as `moe_pack_fp4` packs them, [n_experts][row tiles][k / 128]
//          items [.., 3] u32 (expert, first, count), n_items [2] and pairs of `moe_group` with lists
//          padded to 8: the pairs `pairs[first .. first + count]` go through the item's expert
//          _8: x [n_tokens, width] bf16, h [n_pairs, channels] bf16, quantised on the way
//          _128: tiles of `act_quant_tiles` of the pairs' rows
//          weights [n_pairs] f32
// Outputs  gate_up: h[pair] = bf16(weight * silu(min(gate, limit)) * clamp(up, -limit, limit))
//          down: out[pair] [n_pairs, width] bf16
// Launch   any number of blocks of 384 threads, at most one per SM: they stride over (item, row tiles).
//          _8: items of up to 8 tokens, a block takes a row tile (32 channels of gate and up, or 64 of
//          down) with K split between its two groups. _128: items of up to 128 tokens, two row tiles.
//          Scales further apart than 2^11 within a row's block of 128: `experts90_wide.cu`.
// Limit    few tokens: memory, each FP4 byte is read once per item. Many: tensor cores.
// Arch     sm_90a.
// CPU twin `MoeOps::moe`: FP8 products summed per 128 (model.md section 12 row 22), 1 bf16 ulp.

#include "../include/experts90.cuh"

GATE_UP(moe_gate_up90_8, 2, Format::Fp4, Share::K, 8, 8)
GATE_UP(moe_gate_up90_128, 1, Format::Fp4, Share::Rows, 128, 5)
DOWN(moe_down90_8, 2, Format::Fp4, Share::K, 8, 8)
DOWN(moe_down90_128, 1, Format::Fp4, Share::Rows, 128, 5)
