// Choosing the largest of many values, equal ones by the lower number: integers in the order of floats, whose
// digits of 8 bits are counted from the highest on until the smallest chosen value is known.
//
// Source   `torch.topk` of the official release, whose order of equal values is not defined; ours is.
// CPU twin `ops::cpu::indexer::top_k`, `ops::cpu::moe`.
#pragma once

#include "device.cuh"

// Unsigned integers in the order of floats.
INLINE u32 ordered(float x) {
    const u32 bits = float_bits(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

constexpr u32 DIGIT_BITS = 8, BINS = 1u << DIGIT_BITS;

// Whether the digits of `value` above the one at `shift` are those of `known`.
INLINE bool agrees(u32 value, u32 known, u32 shift) {
    return shift == 32 - DIGIT_BITS || value >> (shift + DIGIT_BITS) == known >> (shift + DIGIT_BITS);
}

// One warp: in which of 256 bins the `wanted`-th largest value lies, and how many of that bin are wanted. True
// in the one lane that has the answer; in none if there are fewer values. Lane l owns the bins
// 255 - 8 l .. 248 - 8 l: sums run from the highest bin down.
INLINE bool find_bin(const u32* bins, u32 wanted, u32& bin, u32& wanted_there) {
    constexpr u32 OWN = BINS / WARP;
    const u32 lane = lane_id();
    u32 own = 0;
    for (u32 j = 0; j < OWN; ++j) own += bins[BINS - 1 - OWN * lane - j];
    u32 end = own;
    for (u32 delta = 1; delta < WARP; delta *= 2) {
        const u32 below = shfl_up(end, delta);
        if (lane >= delta) end += below;
    }
    u32 before = end - own;
    if (before >= wanted || end < wanted) return false;
    for (u32 j = 0; j < OWN; ++j) {
        bin = BINS - 1 - OWN * lane - j;
        if (before + bins[bin] >= wanted) break;
        before += bins[bin];
    }
    wanted_there = wanted - before;
    return true;
}

// The whole block: numbers of the entries `first_entry .. end_entry` above `threshold`, and of those equal to it
// as long as there are `wanted`, ascending. `n_above` and `n_equal` entries of these kinds come before.
template <u32 Warps>
INLINE void write_chosen(const float* scores, u32 first_entry, u32 end_entry, u32 threshold, u32 wanted, u32 n_above,
                         u32 n_equal, u32 (&above_of)[Warps], u32 (&equal_of)[Warps], u32* chosen) {
    constexpr u32 THREADS = Warps * WARP;
    const u32 lane = lane_id(), warp = warp_id(), lower = (1u << lane) - 1;
    for (u32 first = first_entry; first < end_entry; first += THREADS) {
        const u32 i = first + threadIdx.x;
        const u32 value = i < end_entry ? ordered(scores[i]) : 0;
        const bool is_above = i < end_entry && value > threshold;
        const bool is_equal = i < end_entry && value == threshold;
        const u32 above = ballot(is_above), equal = ballot(is_equal);
        if (lane == 0) above_of[warp] = popcount(above), equal_of[warp] = popcount(equal);
        block_sync();
        u32 above_before = n_above + popcount(above & lower), equal_before = n_equal + popcount(equal & lower);
        for (u32 w = 0; w < Warps; ++w) {
            if (w < warp) above_before += above_of[w], equal_before += equal_of[w];
            n_above += above_of[w], n_equal += equal_of[w];
        }
        if (is_above || (is_equal && equal_before < wanted))
            chosen[above_before + min_u32(equal_before, wanted)] = i;
        block_sync();
    }
}
