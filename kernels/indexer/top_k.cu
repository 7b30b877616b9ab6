// index_top_k: the entries with the highest scores of each token, ascending by number.
//
// Source   `Indexer.forward` of the official release; equal scores go to the lower entry.
// Inputs   scores [n_tokens, max_entries] f32 of `index_scores`
// Outputs  chosen [n_tokens, top_k] u32    counts [n_tokens] u32
// Launch   one block of 512 threads per token: four passes of 8 bits over the order-preserving
//          integers find the threshold, a fifth writes. No more candidates than top_k: all of them.
// Limit    up to 32,768 candidates latency; beyond that one block's bandwidth to the second-level
//          cache (a cluster per token is the faster form).
// Arch     sm_80 and later.
// CPU twin `ops::cpu::indexer::top_k`; equal for equal scores.

#include "../include/step.cuh"
#include "../include/top_k.cuh"

constexpr u32 THREADS = 512;

struct SelectShared {
    u32 bins[BINS];
    u32 threshold, wanted; // bits found so far; how many more to take below them
    u32 above[THREADS / WARP], equal[THREADS / WARP];
};

extern "C" __global__ void __launch_bounds__(THREADS) index_top_k(
    const float* __restrict__ scores, const u32* __restrict__ positions, u32* __restrict__ chosen,
    u32* __restrict__ counts, u32 max_entries, u32 top_k) {
    dependency_begin(scores, positions);
    const u32 token = blockIdx.x, t = threadIdx.x, warp = warp_id();
    const u32 n_entries = (positions[token] + 1) / 4;
    scores += static_cast<u64>(token) * max_entries;
    chosen += static_cast<u64>(token) * top_k;
    if (t == 0) counts[token] = min_u32(n_entries, top_k);
    if (n_entries <= top_k) {
        for (u32 i = t; i < n_entries; i += THREADS) chosen[i] = i;
        return;
    }
    SelectShared& s = shared<SelectShared>();
    if (t == 0) s.threshold = 0, s.wanted = top_k;
    for (u32 shift = 32; shift > 0;) {
        shift -= 8;
        if (t < BINS) s.bins[t] = 0;
        block_sync();
        const u32 known = s.threshold, wanted = s.wanted;
        for (u32 i = t; i < n_entries; i += THREADS) {
            const u32 value = ordered(scores[i]);
            // Only what agrees with the bits found so far.
            if (agrees(value, known, shift)) atomic_add(&s.bins[value >> shift & (BINS - 1)], 1);
        }
        block_sync();
        if (warp == 0) {
            u32 bin, wanted_there;
            if (find_bin(s.bins, wanted, bin, wanted_there)) s.threshold = known | bin << shift, s.wanted = wanted_there;
        }
        block_sync();
    }
    // Everything above the threshold, and the first `wanted` equal to it.
    write_chosen(scores, 0, n_entries, s.threshold, s.wanted, 0, 0, s.above, s.equal, chosen);
}
EMU_KERNEL(index_top_k)
