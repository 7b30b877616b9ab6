// index_scores90: `index_scores` for 64 heads, products of a warpgroup with keys in registers.
//
// Source   `Indexer.forward` of the official release: `sum_h relu(q_h . k) * w_h`, here in f32.
// Inputs   q [n_tokens, 64, 128] bf16, on the FP4 grid    w [n_tokens, 64] bf16, unscaled
//          keys: block store of 68-byte rows
// Outputs  scores [n_tokens, max_entries] f32, for entries below (position + 1) / 4; written only
//          where more than `top_k` entries compete
// Launch   grid (ceil(max_entries / 256), n_tokens), 128 threads: four tiles of 64 keys, which are the
//          rows of A; heads are the columns of B. A lane takes 32 values of a key that lie side by
//          side, with their one scale; q is put into that order of K when it is stored.
// Limit    memory at long context: 68 bytes per key; the products are 64 x 128 per key.
// Arch     sm_90a. Keys and queries are exact in bf16.
// CPU twin `CpuOps::select`: heads are added in another order, 2^-20 of the sum of magnitudes.

#include "../include/formats.cuh"
#include "../include/step.cuh"
#include "../include/swizzle.cuh"

constexpr u32 KEYS = 64, TILES = 4, THREADS = 128, HEADS = 64, STEPS = INDEX_DIM / 16, PANEL = HEADS * SWIZZLE_ROW;

struct ScoreShared {
    alignas(1024) u8 q[2 * PANEL]; // panels of 64 positions of K
    float w[HEADS];
};

// This lane's part of the keys g and g + 8 of a warp's 16: 32 codes and their scale.
struct KeyPart {
    u32 codes[2][4], scales[2];
};

INLINE void load_keys(const Step& step, const Sequence& sequence, const u8* keys, u32 first, u32 n_entries, KeyPart& out) {
    const u32 lane = lane_id(), t = lane % 4;
    UNROLL
    for (u32 r = 0; r < 2; ++r) {
        const u32 entry = first + warp_id() * 16 + lane / 4 + 8 * r;
        UNROLL
        for (u32 word = 0; word < 4; ++word) out.codes[r][word] = 0;
        out.scales[r] = 127;
        if (entry >= n_entries) continue;
        const u8* row = keys + block_row(step, sequence, entry, BLOCK_TOKENS / 4) * KEY_ROW_BYTES;
        UNROLL
        for (u32 word = 0; word < 4; ++word) out.codes[r][word] = *reinterpret_cast<const u32*>(row + t * 16 + word * 4);
        out.scales[r] = row[INDEX_DIM / 2 + t];
    }
}

// Registers of A: step 2 w takes pairs 0 and 1 of word w, step 2 w + 1 pairs 2 and 3; pair p of word w is
// k = 32 t + 8 w + {p, p + 4}.
INLINE void expand_keys(const KeyPart& keys, u32 (&a)[STEPS][4]) {
    UNROLL
    for (u32 r = 0; r < 2; ++r) {
        const float scale = e8m0_to_f32(keys.scales[r]);
        const u32 factor = pack_bf16x2(scale, scale);
        UNROLL
        for (u32 word = 0; word < 4; ++word) {
            u32 pairs[4];
            // Two exact steps: the scale alone may leave bf16's range for `fp4_multiplier`.
            expand_e2m1(keys.codes[r][word], fp4_multiplier(127), pairs);
            UNROLL
            for (u32 p = 0; p < 4; ++p) a[2 * word + p / 2][r + p % 2 * 2] = mul_bf16x2(pairs[p], factor);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) index_scores90(
    const bf16* __restrict__ q, const bf16* __restrict__ w, const u8* __restrict__ keys,
    const u32* __restrict__ positions, const u32* __restrict__ sequence_of,
    const Sequence* __restrict__ sequences, const u32* __restrict__ blocks,
    float* __restrict__ scores, u32 n_heads, u32 max_entries, u32 top_k, float scale) {
    dependency_begin(q, w, keys, positions, sequence_of, sequences, blocks);
    const u32 token = blockIdx.y, thread = threadIdx.x, lane = lane_id(), t = lane % 4;
    const u32 n_entries = (positions[token] + 1) / 4, first = blockIdx.x * KEYS * TILES;
    if (n_entries <= top_k || first >= n_entries) return;
    ScoreShared& s = shared<ScoreShared>();
    const Step step = {positions, sequence_of, sequences, blocks};
    const Sequence& sequence = sequences[sequence_of[token]];
    KeyPart next;
    load_keys(step, sequence, keys, first, n_entries, next);

    for (u32 i = thread; i < HEADS * (INDEX_DIM / 8); i += THREADS) {
        const u32 head = i / (INDEX_DIM / 8), vector = i % (INDEX_DIM / 8), word = vector % 4, part = vector / 4;
        const u32x4 x = *reinterpret_cast<const u32x4*>(q + (static_cast<u64>(token) * n_heads + head) * INDEX_DIM + vector * 8);
        UNROLL
        for (u32 p = 0; p < 4; ++p) {
            const u32 pair = byte_perm(x.v[p / 2], x.v[2 + p / 2], p % 2 ? 0x7632 : 0x5410);
            const u32 k_step = 2 * word + p / 2, byte = k_step % 4 * 32 + part * 4 + p % 2 * 16;
            *reinterpret_cast<u32*>(s.q + k_step / 4 * PANEL + swizzled(head, byte)) = pair;
        }
    }
    if (thread < HEADS) s.w[thread] = round_bf16(mul_rn(bf16_to_f32(w[static_cast<u64>(token) * n_heads + thread]), scale));
    fence_proxy_async();
    block_sync();

    for (u32 tile = 0; tile < TILES && first + tile * KEYS < n_entries; ++tile) {
        u32 a[STEPS][4];
        expand_keys(next, a);
        float d[HEADS / 2];
        wgmma_fence();
        UNROLL
        for (u32 k = 0; k < STEPS; ++k)
            wgmma_bf16<HEADS>(d, a[k], matrix_k_major(s.q + k / 4 * PANEL) + k % 4 * 2, k > 0);
        wgmma_commit();
        if (tile + 1 < TILES) load_keys(step, sequence, keys, first + (tile + 1) * KEYS, n_entries, next);
        wgmma_wait<0>(d);
        float sum[2] = {};
        UNROLL
        for (u32 i = 0; i < HEADS / 2; ++i)
            sum[i / 2 % 2] = fma_rn(max_f32(d[i], 0.0f), s.w[i / 4 * 8 + 2 * t + i % 2], sum[i / 2 % 2]);
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            sum[r] = add_rn(sum[r], shfl_xor(sum[r], 1));
            sum[r] = add_rn(sum[r], shfl_xor(sum[r], 2));
            const u32 at = first + tile * KEYS + warp_id() * 16 + lane / 4 + 8 * r;
            if (t == 0 && at < n_entries) scores[static_cast<u64>(token) * max_entries + at] = sum[r];
        }
    }
}
EMU_KERNEL(index_scores90)
