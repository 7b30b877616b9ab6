// moe_gate_up90_*_wide, moe_down90_*_wide: `experts90.cu` for scales too far apart to be folded.
//
// Source   `Expert.forward`, `fp4_gemm` of the official release, which adds up every 32 columns too.
// Inputs, outputs, launch: as in `experts90.cu`; tiles packed with `wide`, every 32 columns with a
//          scale of their own.
// Limit    as there; the products of 32 columns wait for each other, about half its rate for many
//          tokens. Used only for matrices that need it.
// Arch     sm_90a.
// CPU twin `MoeOps::moe`, 1 bf16 ulp.

#include "../include/experts90.cuh"

GATE_UP(moe_gate_up90_8_wide, 2, Format::Fp4Wide, Share::K, 8, 8)
GATE_UP(moe_gate_up90_128_wide, 1, Format::Fp4Wide, Share::Rows, 128, 5)
DOWN(moe_down90_8_wide, 2, Format::Fp4Wide, Share::K, 8, 8)
DOWN(moe_down90_128_wide, 1, Format::Fp4Wide, Share::Rows, 128, 5)
