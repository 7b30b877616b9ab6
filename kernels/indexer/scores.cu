// index_scores: how much each compressed entry matters to each token, by the index heads.
//
// Source   `Indexer.forward` of the official release: `sum_h relu(q_h . k) * w_h`, here in f32.
// Inputs   q [n_tokens, n_heads, 128] bf16, on the FP4 grid    w [n_tokens, n_heads] bf16, unscaled
//          keys: block store of 68-byte rows
// Outputs  scores [n_tokens, max_entries] f32, for entries below (position + 1) / 4; written only
//          where more than `top_k` entries compete
// Launch   grid (ceil(max_entries / 64), n_tokens), 128 threads: 4 warps of 16 keys. n_heads a
//          multiple of 8, at most 64.
// Limit    memory at long context: 68 bytes per key; the products are 64 x 128 per key.
// Arch     sm_80 and later. Keys and queries are exact in bf16.
// CPU twin `CpuOps::select`: heads are added in another order, 2^-20 of the sum of magnitudes.

#include "../include/formats.cuh"
#include "../include/step.cuh"

constexpr u32 KEYS = 64, THREADS = 128, STRIDE = INDEX_DIM + 8, MAX_HEADS = 64;

struct ScoreShared {
    bf16 keys[KEYS][STRIDE];
    bf16 q[MAX_HEADS][STRIDE];
    float w[MAX_HEADS];
};

extern "C" __global__ void __launch_bounds__(THREADS) index_scores(
    const bf16* __restrict__ q, const bf16* __restrict__ w, const u8* __restrict__ keys,
    const u32* __restrict__ positions, const u32* __restrict__ sequence_of,
    const Sequence* __restrict__ sequences, const u32* __restrict__ blocks,
    float* __restrict__ scores, u32 n_heads, u32 max_entries, u32 top_k, float scale) {
    dependency_begin(w, keys, positions, sequence_of, sequences, blocks);
    const u32 token = blockIdx.y, t = threadIdx.x;
    const u32 n_entries = (positions[token] + 1) / 4, first = blockIdx.x * KEYS;
    if (n_entries <= top_k || first >= n_entries) return;
    ScoreShared& s = shared<ScoreShared>();
    const Step step = {positions, sequence_of, sequences, blocks};
    const Sequence& sequence = sequences[sequence_of[token]];

    for (u32 i = t; i < n_heads * (INDEX_DIM / 8); i += THREADS) {
        const u32 head = i / (INDEX_DIM / 8), column = i % (INDEX_DIM / 8) * 8;
        cp_async16(&s.q[head][column], q + (static_cast<u64>(token) * n_heads + head) * INDEX_DIM + column, true);
    }
    cp_async_commit();
    for (u32 i = t; i < n_heads; i += THREADS)
        s.w[i] = round_bf16(mul_rn(bf16_to_f32(w[static_cast<u64>(token) * n_heads + i]), scale));
    // Two threads per key, 32 bytes of codes each; behind the last key, zeros.
    const u32 key = t / 2, entry = first + key;
    const u8* row = entry < n_entries ? keys + block_row(step, sequence, entry, BLOCK_TOKENS / 4) * KEY_ROW_BYTES : nullptr;
    UNROLL
    for (u32 word = 0; word < 8; ++word) {
        const u32 column = t % 2 * 64 + word * 8;
        u32 pairs[4] = {};
        if (row) {
            const u32 codes = *reinterpret_cast<const u32*>(row + column / 2);
            // Two exact steps: the scale alone may leave bf16's range for `fp4_multiplier`.
            expand_e2m1(codes, fp4_multiplier(127), pairs);
            const float scale_of_block = e8m0_to_f32(row[INDEX_DIM / 2 + column / 32]);
            const u32 factor = pack_bf16x2(scale_of_block, scale_of_block);
            UNROLL
            for (u32 i = 0; i < 4; ++i) pairs[i] = mul_bf16x2(pairs[i], factor);
        }
        u32x4 natural;
        natural.v[0] = byte_perm(pairs[0], pairs[1], 0x5410), natural.v[1] = byte_perm(pairs[2], pairs[3], 0x5410);
        natural.v[2] = byte_perm(pairs[0], pairs[1], 0x7632), natural.v[3] = byte_perm(pairs[2], pairs[3], 0x7632);
        *reinterpret_cast<u32x4*>(&s.keys[key][column]) = natural;
    }
    cp_async_wait<0>();
    block_sync();

    const u32 lane = lane_id(), g = lane / 4, quad = lane % 4, first_key = warp_id() * 16;
    u32 a[INDEX_DIM / 16][4];
    UNROLL
    for (u32 k = 0; k < INDEX_DIM / 16; ++k)
        ldmatrix_x4(a[k], &s.keys[first_key + lane % 16][k * 16 + lane / 16 * 8]);
    float sum[2] = {};
    for (u32 head = 0; head < n_heads; head += 8) {
        float d[4] = {};
        UNROLL
        for (u32 k = 0; k < INDEX_DIM / 32; ++k) {
            u32 b[4];
            ldmatrix_x4(b, &s.q[head + lane % 8][k * 32 + lane / 8 * 8]);
            mma_bf16_16816(d, a[2 * k][0], a[2 * k][1], a[2 * k][2], a[2 * k][3], b[0], b[1]);
            mma_bf16_16816(d, a[2 * k + 1][0], a[2 * k + 1][1], a[2 * k + 1][2], a[2 * k + 1][3], b[2], b[3]);
        }
        UNROLL
        for (u32 i = 0; i < 4; ++i)
            sum[i / 2] = fma_rn(max_f32(d[i], 0.0f), s.w[head + 2 * quad + i % 2], sum[i / 2]);
    }
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        sum[i] = add_rn(sum[i], shfl_xor(sum[i], 1));
        sum[i] = add_rn(sum[i], shfl_xor(sum[i], 2));
        const u32 at = first + first_key + g + 8 * i;
        if (quad == 0 && at < n_entries) scores[static_cast<u64>(token) * max_entries + at] = sum[i];
    }
}
EMU_KERNEL(index_scores)
