// attn_sparse100: attention of each token over its window and its compressed entries, 64 heads a block.
//
// Source   `sparse_attn` of the official release.
// Inputs, outputs: those of `attn_sparse` (`sparse.cu`): per split of `split_blocks` blocks of 64
//          keys, sums that are not normalised, maximum and denominator; `attn_merge` adds the splits.
// Launch   grid (n_splits, ceil(n_heads / 64), n_tokens), 416 threads, 209 KB of shared memory and all
//          of tensor memory: one block per SM. Warps 0 to 3 take the softmax, 4 to 11 gather and expand
//          keys (two groups in turn, three slots), warp 12 multiplies: the scores of a block, then
//          the values of the one before. Shared memory holds keys and weights, tensor memory queries
//          and scores in the lower lanes, the output in the upper ones.
//          The maximum that weights refer to follows only where a block exceeds it by far: else the
//          output, half of tensor memory, would be multiplied for nearly every block.
// Limit    tensor cores, if 64 rows take them as long as 128: 2,048 cycles per 64 keys, against 1,728 of
//          operand traffic and 1,290 in which a token's share of memory bandwidth brings the rows.
// Arch     sm_100f. Unproven until a B200 ran it.
// CPU twin `ops::cpu::attention`: the same blocks of 64 and the same bf16 rounding of weights;
//          splits have their own maxima, so weights may round otherwise: 2^-8 of the largest value.

#include "../include/reduce.cuh"
#include "../include/sparse_keys.cuh"
#include "../include/swizzle100.cuh"

constexpr u32 HEADS = 64, GROUP = 4 * WARP, GATHERERS = 2, SLOTS = 3;
constexpr u32 MULTIPLIER = 4 + 4 * GATHERERS, THREADS = (MULTIPLIER + 1) * WARP;
// Tensor memory. Lower lanes of each warp's 32: pairs of query channels, scores of two blocks of keys. Upper
// lanes: the output.
constexpr u32 COLUMNS = 512, QUERIES = 0, SCORES = HEAD_DIM / 2, OUTPUT = 16u << 16, HALF = HEAD_DIM / 2;
// How far a score may exceed the maximum that its head's weights refer to: these are at most e^5.
constexpr float SLACK = 5.0f;

struct SparseShared {
    alignas(1024) u8 keys[SLOTS][TILES][TILE];
    alignas(1024) u8 p[2][HEADS * KEYS * 2]; // weights, a row per head
    u64 full[SLOTS], empty[SLOTS];           // of the keys
    u64 scored[2], weighted[2], added[2];    // scores are there, weights are, values are added; every second block
    u32 memory;                              // address in tensor memory
    Keys source; // here, since registers of those who read it hold rows on their way
};

// Two threads per key; the groups take every second block.
INLINE void gather(SparseShared& s, u32 first, u32 n_blocks) {
    const u32 t = threadIdx.x % GROUP, key = t / 2, half = t % 2;
    ROLLED
    for (u32 i = threadIdx.x / GROUP - 1; i < n_blocks; i += GATHERERS) {
        const u32 slot = i % SLOTS;
        HalfRow row = {}; // behind the last key: zeros, whose weight is zero
        if (key < s.source.count(first + i)) load_half(s.source.row(first + i, key), half, row);
        const u32 parity = (i / SLOTS % 2) ^ 1;
        mbarrier_wait(&s.empty[slot], parity);
        // The other group filled the slot last. Its stores are ordered by its arrival, not by that of tensor cores.
        mbarrier_wait(&s.full[slot], parity);
        store_half(row, half, key, s.keys[slot]);
        fence_proxy_async();
        warp_sync();
        if (lane_id() == 0) mbarrier_arrive(&s.full[slot]);
    }
}

// One thread.
INLINE void multiply(SparseShared& s, u32 n_blocks) {
    const u32 memory = s.memory;
    for (u32 i = 0; i <= n_blocks; ++i) {
        if (i < n_blocks) {
            // Scores of the block before the last have been read: its weights were waited for.
            const u32 slot = i % SLOTS, scores = memory + SCORES + i % 2 * KEYS;
            mbarrier_wait(&s.full[slot], i / SLOTS % 2);
            tmem_fence_after();
            for (u32 tile = 0; tile < TILES; ++tile) {
                const u64 keys = tensor_matrix(s.keys[slot][tile]);
                UNROLL
                for (u32 step = 0; step < 4; ++step)
                    mma_bf16(scores, memory + QUERIES + 32 * tile + 8 * step, keys + 2 * step,
                             bf16_kind<false>(HEADS, KEYS), tile + step > 0);
            }
            tmem_commit(&s.scored[i % 2]);
        }
        if (i == 0) continue;
        const u32 block = i - 1, slot = block % SLOTS;
        mbarrier_wait(&s.weighted[block % 2], block / 2 % 2);
        tmem_fence_after();
        const u64 weights = tensor_matrix(s.p[block % 2]);
        for (u32 half = 0; half < 2; ++half) {
            const u64 values = tensor_matrix_mn(s.keys[slot][TILES / 2 * half], TILE);
            UNROLL
            for (u32 step = 0; step < KEYS / 16; ++step)
                mma_bf16_shared(memory + OUTPUT + HALF * half, weights + 2 * step, values + 128 * step,
                                bf16_kind<true>(HEADS, HALF), block + step > 0);
        }
        tmem_commit(&s.empty[slot]);
        tmem_commit(&s.added[block % 2]);
    }
}

// By warps 0 to 3: 16 heads each. A thread has those of rows g and g + 8 of its warp, g = lane / 4, and the
// columns 8 j + 2 (lane % 4) and the next, as accumulators of a warp's product.
INLINE u32 own_lanes() { return warp_id() * WARP << 16; }

// Queries to tensor memory, zeros for heads that there are not.
INLINE void store_queries(SparseShared& s, const bf16* q, u32 n_heads) {
    const u32 head = warp_id() * 16 + lane_id() / 4, quad = lane_id() % 4;
    ROLLED
    for (u32 column = 0; column < HALF; column += 64) {
        u32 tile[32];
        UNROLL
        for (u32 i = 0; i < 16; ++i) {
            const u32 row = head + i % 2 * 8, channel = 2 * (column + i / 2 * 8 + 2 * quad);
            u32x2 pairs = {};
            if (row < n_heads) pairs = *reinterpret_cast<const u32x2*>(q + static_cast<u64>(row) * HEAD_DIM + channel);
            tile[2 * i] = pairs.v[0], tile[2 * i + 1] = pairs.v[1];
        }
        tmem_store_tile(s.memory + own_lanes() + QUERIES + column, tile);
    }
    tmem_store_wait();
    tmem_fence_before();
}

// The output times a factor for each row.
INLINE void rescale_output(SparseShared& s, const float (&factor)[2]) {
    ROLLED
    for (u32 column = 0; column < HEAD_DIM; column += 64) {
        const u32 at = s.memory + own_lanes() + OUTPUT + column;
        float o[32];
        u32 tile[32];
        tmem_load_tile(o, at);
        tmem_load_wait(o);
        UNROLL
        for (u32 i = 0; i < 32; ++i) tile[i] = float_bits(mul_rn(o[i], factor[i / 2 % 2]));
        tmem_store_tile(at, tile);
    }
    tmem_store_wait();
}

INLINE void soften(SparseShared& s, const Keys& keys, u32 first, u32 n_blocks, float (&max)[2], float (&sum)[2]) {
    const u32 head = warp_id() * 16 + lane_id() / 4, quad = lane_id() % 4;
    for (u32 i = 0; i < n_blocks; ++i) {
        const u32 n_keys = keys.count(first + i), pair = i % 2;
        float d[32];
        // Scores are committed behind the values of the block before the last, so its weights have been used, too.
        mbarrier_wait(&s.scored[pair], i / 2 % 2);
        tmem_fence_after();
        tmem_load_tile(d, s.memory + own_lanes() + SCORES + pair * KEYS);
        tmem_load_wait(d);
        float factor[2], shift[2];
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float most = negative_infinity();
            UNROLL
            for (u32 j = 0; j < 16; ++j) {
                float& x = d[j / 2 * 4 + 2 * r + j % 2];
                if (j / 2 * 8 + 2 * quad + j % 2 >= n_keys) x = negative_infinity();
                most = max_f32(most, x);
            }
            most = mul_rn(group_max<4>(most), SOFTMAX_SCALE);
            const float next = most > max[r] + SLACK ? most : max[r];
            factor[r] = next == max[r] ? 1.0f : exp2_approx(mul_rn(max[r] - next, LOG2_E));
            max[r] = next;
            shift[r] = mul_rn(next, LOG2_E);
        }
        // Four lanes have the same two rows; a row that keeps its maximum is multiplied by one.
        if (ballot(factor[0] != 1.0f || factor[1] != 1.0f) && i > 0) {
            mbarrier_wait(&s.added[pair ^ 1], (i - 1) / 2 % 2);
            tmem_fence_after();
            rescale_output(s, factor);
        }
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float part = 0.0f;
            UNROLL
            for (u32 j = 0; j < 8; ++j) {
                const u32 at = 4 * j + 2 * r;
                const float low = exp2_approx(fma_rn(d[at], SOFTMAX_SCALE * LOG2_E, -shift[r]));
                const float high = exp2_approx(fma_rn(d[at + 1], SOFTMAX_SCALE * LOG2_E, -shift[r]));
                // The denominator takes the unrounded weights.
                part = add_rn(part, add_rn(low, high));
                *reinterpret_cast<u32*>(&s.p[pair][swizzled(head + 8 * r, 16 * j + 4 * quad)]) = pack_bf16x2(low, high);
            }
            sum[r] = fma_rn(sum[r], factor[r], part);
        }
        fence_proxy_async();
        tmem_fence_before();
        warp_sync();
        if (lane_id() == 0) mbarrier_arrive(&s.weighted[pair]);
    }
    UNROLL
    for (u32 r = 0; r < 2; ++r) {
        sum[r] = add_rn(sum[r], shfl_xor(sum[r], 1));
        sum[r] = add_rn(sum[r], shfl_xor(sum[r], 2));
    }
}

// Sums, maxima and denominators of this warp's heads; zeros where there was no key.
INLINE void store_output(SparseShared& s, float* acc, float* stats, u32 n_heads, u32 n_blocks, const float (&max)[2],
                         const float (&sum)[2]) {
    const u32 head = warp_id() * 16 + lane_id() / 4, quad = lane_id() % 4;
    if (n_blocks > 0) mbarrier_wait(&s.added[(n_blocks - 1) % 2], (n_blocks - 1) / 2 % 2);
    tmem_fence_after();
    warp_sync();
    ROLLED
    for (u32 column = 0; column < HEAD_DIM; column += 64) {
        float o[32] = {};
        if (n_blocks > 0) {
            tmem_load_tile(o, s.memory + own_lanes() + OUTPUT + column);
            tmem_load_wait(o);
        }
        UNROLL
        for (u32 i = 0; i < 16; ++i) {
            const u32 row = head + i % 2 * 8;
            if (row < n_heads)
                *reinterpret_cast<u32x2*>(acc + static_cast<u64>(row) * HEAD_DIM + column + i / 2 * 8 + 2 * quad) =
                    u32x2{{float_bits(o[2 * i]), float_bits(o[2 * i + 1])}};
        }
    }
    tmem_fence_before();
    UNROLL
    for (u32 r = 0; r < 2; ++r)
        if (quad == 0 && head + 8 * r < n_heads) {
            stats[2 * (head + 8 * r)] = max[r];
            stats[2 * (head + 8 * r) + 1] = sum[r];
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attn_sparse100(
    const bf16* __restrict__ q, const u8* __restrict__ window, const u8* __restrict__ pending,
    const u8* __restrict__ entries, const u32* __restrict__ chosen, const u32* __restrict__ counts,
    const u32* __restrict__ positions, const u32* __restrict__ sequence_of,
    const Sequence* __restrict__ sequences, const u32* __restrict__ blocks,
    float* __restrict__ acc_out, float* __restrict__ stats, u32 first_token, u32 n_heads, u32 ring,
    u32 ratio, u32 top_k, u32 split_blocks) {
    // Of `window` and `blocks` nothing that is read here is written in this step.
    dependency_begin(q, pending, entries, chosen, counts, positions, sequence_of, sequences);
    SparseShared& s = shared<SparseShared>();
    // Outputs are numbered from the first token of this launch, inputs from that of the step.
    const u32 token = first_token + blockIdx.z, first_head = blockIdx.y * HEADS, warp = warp_id();
    const Keys keys = keys_of({positions, sequence_of, sequences, blocks}, token, window, pending, entries, chosen, counts,
                              ring, ratio, top_k);
    const u32 n_all = keys.window_blocks + ceil_div(keys.n_entries, KEYS);
    const u32 first = min_u32(n_all, blockIdx.x * split_blocks), n_blocks = min_u32(split_blocks, n_all - first);

    if (threadIdx.x == 0) {
        s.source = keys;
        for (u32 slot = 0; slot < SLOTS; ++slot) mbarrier_init(&s.full[slot], 4), mbarrier_init(&s.empty[slot], 1);
        for (u32 i = 0; i < 2; ++i)
            mbarrier_init(&s.scored[i], 1), mbarrier_init(&s.weighted[i], 4), mbarrier_init(&s.added[i], 1);
        fence_mbarrier_init();
    }
    if (warp == MULTIPLIER) tmem_alloc<COLUMNS>(&s.memory);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();

    // Heads from this block's first on.
    const u32 n = n_heads - first_head;
    if (warp < 4) {
        give_up_registers<112>();
        store_queries(s, q + (static_cast<u64>(token) * n_heads + first_head) * HEAD_DIM, n);
        named_sync<1>(GROUP + WARP);
        float max[2] = {negative_infinity(), negative_infinity()}, sum[2] = {};
        soften(s, keys, first, n_blocks, max, sum);
        const u64 at = (static_cast<u64>(blockIdx.z) * gridDim.x + blockIdx.x) * n_heads + first_head;
        store_output(s, acc_out + at * HEAD_DIM, stats + 2 * at, n, n_blocks, max, sum);
    } else if (warp < MULTIPLIER) {
        take_registers<136>();
        gather(s, first, n_blocks);
    } else {
        named_sync<1>(GROUP + WARP);
        if (elect()) multiply(s, n_blocks);
        warp_sync();
    }
    block_sync();
    tmem_fence_after();
    if (warp == MULTIPLIER) tmem_dealloc<COLUMNS>(s.memory);
}
EMU_KERNEL(attn_sparse100)
