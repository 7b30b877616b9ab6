// embed: the embedding of each token, in as many copies as wanted.
//
// Source   `Transformer.forward`, `ParallelEmbedding` of the official release.
// Inputs   table [vocab, width] bf16    tokens [n_tokens] u32, each below vocab
// Outputs  x [n_tokens, n_copies, width] bf16
// Launch   one block per token. Width is a multiple of 8.
// Limit    memory: 2 width (1 + n_copies) bytes per token.
// Arch     sm_80 and later.
// CPU twin `HyperConnectionOps::embed`; equal bits.

#include "../include/rows.cuh"

extern "C" __global__ void __launch_bounds__(128) embed(
    const bf16* __restrict__ table, const u32* __restrict__ tokens, bf16* __restrict__ x,
    u32 width, u32 n_copies) {
    dependency_begin(tokens);
    const bf16* source = table + static_cast<u64>(tokens[blockIdx.x]) * width;
    bf16* out = x + static_cast<u64>(blockIdx.x) * n_copies * width;
    for (u32 i = threadIdx.x * PER_THREAD; i < width; i += blockDim.x * PER_THREAD) {
        const u32x4 values = *reinterpret_cast<const u32x4*>(source + i);
        for (u32 copy = 0; copy < n_copies; ++copy) {
            *reinterpret_cast<u32x4*>(out + copy * width + i) = values;
        }
    }
}
EMU_KERNEL(embed)
