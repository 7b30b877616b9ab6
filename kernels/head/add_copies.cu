// add_copies: a row added to each of four copies; the last step of an MTP block's input.
//
// Source   `MTPBlock.forward` of the official release: `e_proj(..) + h_proj(..)`.
// Inputs   e [n_tokens, width] bf16    h [n_tokens, 4, width] bf16
// Outputs  h in place: bf16(e + h)
// Launch   grid (ceil(width / 1024), 4 n_tokens), 128 threads of 8 values; width a multiple of 8.
// Limit    memory.
// Arch     sm_80 and later.
// CPU twin `HeadOps::mtp_input`; equal bits.

#include "../include/rows.cuh"

extern "C" __global__ void __launch_bounds__(128) add_copies(
    const bf16* __restrict__ e, bf16* __restrict__ h, u32 width) {
    dependency_begin(e, h);
    const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (i >= width) return;
    bf16* mine = h + static_cast<u64>(blockIdx.y) * width + i;
    float a[8], b[8];
    load8(e + static_cast<u64>(blockIdx.y / 4) * width + i, a);
    load8(mine, b);
    UNROLL
    for (u32 k = 0; k < 8; ++k) b[k] = add_rn(a[k], b[k]);
    store8(mine, b);
}
EMU_KERNEL(add_copies)
