// copy_pieces: many short copies inside of device memory, or between it and a buffer, in one launch.
//
// Source   none: what snapshots, blocks for lower cache tiers and their return consist of.
// Inputs   pieces [n] of (from, to, n_words): addresses of 4-byte words, both multiples of 4
// Outputs  the words at `to`; pieces do not overlap
// Launch   one block of 128 threads per piece.
// Limit    memory; a piece is some hundred bytes to some KiB.
// Arch     sm_80 and later.
// CPU twin `DeviceCache` on the host, `cpu::snapshot`; equal bits.

#include "../include/device.cuh"

struct Piece {
    u64 from, to;
    u64 n_words;
};

extern "C" __global__ void __launch_bounds__(128) copy_pieces(const Piece* __restrict__ pieces) {
    const Piece piece = pieces[blockIdx.x];
    const u32* from = reinterpret_cast<const u32*>(piece.from);
    u32* to = reinterpret_cast<u32*>(piece.to);
    for (u64 i = threadIdx.x; i < piece.n_words; i += blockDim.x) to[i] = from[i];
}
EMU_KERNEL(copy_pieces)
