// gather_rows: the rows of a matrix named by a list, in that order.
//
// Inputs   x [n, n_words] u32 words    rows [n_rows] u32, each below n
// Outputs  out [n_rows, n_words]
// Launch   one block per row. Any element type whose row is a multiple of 4 bytes.
// Limit    memory: every wanted row is read and written once.
// Arch     sm_80 and later.
// CPU twin `Backend::select_rows`; equal bits.

#include "../include/device.cuh"

extern "C" __global__ void __launch_bounds__(128) gather_rows(
    const u32* __restrict__ x, const u32* __restrict__ rows, u32* __restrict__ out, u32 n_words) {
    const u32* source = x + static_cast<u64>(rows[blockIdx.x]) * n_words;
    u32* target = out + static_cast<u64>(blockIdx.x) * n_words;
    for (u32 i = threadIdx.x; i < n_words; i += blockDim.x) target[i] = source[i];
}
EMU_KERNEL(gather_rows)
