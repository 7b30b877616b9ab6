// index_top_k90: `index_top_k` by a cluster of eight blocks per token, for long contexts.
//
// Source   `Indexer.forward` of the official release; equal scores go to the lower entry.
// Inputs   scores [n_tokens, max_entries] f32 of `index_scores`
// Outputs  chosen [n_tokens, top_k] u32, ascending    counts [n_tokens] u32
// Launch   grid (8 n_tokens), 512 threads, clusters of 8: each block has an eighth of the entries.
//          Four passes of 8 bits over the order-preserving integers find the threshold: every block
//          sends its 256 counts to all others and adds up what it got, so all find the same. Blocks
//          know from the counts where their entries go. No more candidates than top_k: all of them.
// Limit    the second-level cache, which holds the scores: 4 bytes five times per entry, by eight SMs.
// Arch     sm_90a.
// CPU twin `ops::cpu::indexer::top_k`; equal for equal scores.

#include "../include/step.cuh"
#include "../include/top_k.cuh"

constexpr u32 THREADS = 512, WARPS = THREADS / WARP, BLOCKS = 8;

struct SelectShared {
    u32 bins[BINS];
    u32 gathered[2][BLOCKS][BINS]; // counts of all blocks, in alternate passes
    u32 totals[BINS];
    u32 counts[BLOCKS][2]; // entries above the threshold and equal to it, of all blocks
    u32 threshold, wanted; // bits found so far; how many more to take below them
    u32 own_above;
    u32 above[WARPS], equal[WARPS];
};

// One warp: the next digit of the threshold.
INLINE void find_digit(SelectShared& s, u32 shift) {
    const u32 lane = lane_id(), known = s.threshold, wanted = s.wanted;
    u32 found, wanted_there;
    const bool is_mine = find_bin(s.totals, wanted, found, wanted_there);
    warp_sync(); // all lanes have read `threshold` and `wanted`
    if (is_mine) s.threshold = known | found << shift, s.wanted = wanted_there;
    warp_sync();
    // This block's entries in higher bins are above the threshold for good.
    const u32 bin = s.threshold >> shift & (BINS - 1);
    u32 above = 0;
    for (u32 j = 0; j < 8; ++j)
        if (8 * lane + j > bin) above += s.bins[8 * lane + j];
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) above += shfl_xor(above, lanes);
    if (lane == 0) s.own_above += above;
}

extern "C" __global__ void __cluster_dims__(8) __launch_bounds__(THREADS) index_top_k90(
    const float* __restrict__ scores, const u32* __restrict__ positions, u32* __restrict__ chosen,
    u32* __restrict__ counts, u32 max_entries, u32 top_k) {
    dependency_begin(scores, positions);
    const u32 token = blockIdx.x / BLOCKS, rank = cluster_rank(), t = threadIdx.x, warp = warp_id();
    const u32 n_entries = (positions[token] + 1) / 4;
    scores += static_cast<u64>(token) * max_entries;
    chosen += static_cast<u64>(token) * top_k;
    if (rank == 0 && t == 0) counts[token] = min_u32(n_entries, top_k);
    if (n_entries <= top_k) {
        for (u32 i = t; rank == 0 && i < n_entries; i += THREADS) chosen[i] = i;
        return;
    }
    SelectShared& s = shared<SelectShared>();
    const u32 per_block = ceil_div(n_entries, BLOCKS);
    const u32 first_entry = min_u32(n_entries, rank * per_block), end_entry = min_u32(n_entries, first_entry + per_block);
    warp_sync(); // whole warps arrive
    cluster_arrive(); // nobody may be sent anything before it has begun
    if (t == 0) s.threshold = 0, s.wanted = top_k, s.own_above = 0;
    for (u32 pass = 0; pass < 4; ++pass) {
        const u32 shift = 24 - 8 * pass;
        if (t < BINS) s.bins[t] = 0;
        block_sync();
        const u32 known = s.threshold;
        for (u32 i = first_entry + t; i < end_entry; i += THREADS) {
            const u32 value = ordered(scores[i]);
            // Only what agrees with the bits found so far.
            if (agrees(value, known, shift)) atomic_add(&s.bins[value >> shift & (BINS - 1)], 1);
        }
        block_sync();
        if (pass == 0) cluster_wait();
        if (t < BINS)
            for (u32 block = 0; block < BLOCKS; ++block) cluster_store(&s.gathered[pass % 2][rank][t], block, s.bins[t]);
        cluster_arrive();
        cluster_wait();
        if (t < BINS) {
            u32 total = 0;
            for (u32 block = 0; block < BLOCKS; ++block) total += s.gathered[pass % 2][block][t];
            s.totals[t] = total;
        }
        block_sync();
        if (warp == 0) find_digit(s, shift);
        block_sync();
    }
    const u32 threshold = s.threshold, wanted = s.wanted;
    if (t < BLOCKS) {
        cluster_store(&s.counts[rank][0], t, s.own_above);
        cluster_store(&s.counts[rank][1], t, s.bins[threshold & (BINS - 1)]);
    }
    warp_sync();
    cluster_arrive();
    cluster_wait();
    // Everything above the threshold, and the first `wanted` equal to it: so far, over all blocks.
    u32 n_above = 0, n_equal = 0;
    for (u32 block = 0; block < rank; ++block) n_above += s.counts[block][0], n_equal += s.counts[block][1];
    write_chosen(scores, first_entry, end_entry, threshold, wanted, n_above, n_equal, s.above, s.equal, chosen);
}
EMU_KERNEL(index_top_k90, .cluster = 8)
