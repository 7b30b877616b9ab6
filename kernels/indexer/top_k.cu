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

#include "../include/reduce.cuh"
#include "../include/step.cuh"

constexpr u32 THREADS = 512, BINS = 256;

struct SelectShared {
    u32 bins[BINS];
    u32 threshold, wanted; // bits found so far; how many more to take below them
    u32 above[THREADS / WARP], equal[THREADS / WARP];
};

// Unsigned integers in the order of floats.
INLINE u32 ordered(float x) {
    const u32 bits = float_bits(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

extern "C" __global__ void __launch_bounds__(THREADS) index_top_k(
    const float* __restrict__ scores, const u32* __restrict__ positions, u32* __restrict__ chosen,
    u32* __restrict__ counts, u32 max_entries, u32 top_k) {
    dependency_begin(scores, positions);
    const u32 token = blockIdx.x, t = threadIdx.x, lane = lane_id(), warp = warp_id();
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
            if (shift == 24 || value >> (shift + 8) == known >> (shift + 8))
                atomic_add(&s.bins[value >> shift & (BINS - 1)], 1);
        }
        block_sync();
        if (warp == 0) {
            // Lane l owns the bins 255 - 8 l .. 248 - 8 l: sums run from the highest bin down.
            u32 own = 0;
            for (u32 j = 0; j < 8; ++j) own += s.bins[BINS - 1 - 8 * lane - j];
            u32 end = own;
            for (u32 delta = 1; delta < WARP; delta *= 2) {
                const u32 below = shfl_up(end, delta);
                if (lane >= delta) end += below;
            }
            u32 before = end - own;
            if (before < wanted && end >= wanted) {
                for (u32 j = 0; j < 8; ++j) {
                    const u32 bin = BINS - 1 - 8 * lane - j;
                    if (before + s.bins[bin] >= wanted) {
                        s.threshold = known | bin << shift;
                        s.wanted = wanted - before;
                        break;
                    }
                    before += s.bins[bin];
                }
            }
        }
        block_sync();
    }
    // Everything above the threshold, and the first `wanted` equal to it.
    const u32 threshold = s.threshold, wanted = s.wanted;
    u32 n_above = 0, n_equal = 0; // so far, over all threads
    for (u32 first = 0; first < n_entries; first += THREADS) {
        const u32 i = first + t;
        const u32 value = i < n_entries ? ordered(scores[i]) : 0;
        const bool is_above = i < n_entries && value > threshold;
        const bool is_equal = i < n_entries && value == threshold;
        const u32 above = ballot(is_above), equal = ballot(is_equal);
        if (lane == 0) s.above[warp] = popcount(above), s.equal[warp] = popcount(equal);
        block_sync();
        const u32 lower = (1u << lane) - 1;
        u32 above_before = n_above + popcount(above & lower), equal_before = n_equal + popcount(equal & lower);
        for (u32 w = 0; w < THREADS / WARP; ++w) {
            if (w < warp) above_before += s.above[w], equal_before += s.equal[w];
            n_above += s.above[w], n_equal += s.equal[w];
        }
        if (is_above || (is_equal && equal_before < wanted))
            chosen[above_before + min_u32(equal_before, wanted)] = i;
        block_sync();
    }
}
EMU_KERNEL(index_top_k)
