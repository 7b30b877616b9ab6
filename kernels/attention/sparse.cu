// attn_sparse, attn_merge: attention of each token over its window and its compressed entries.
//
// Source   `sparse_attn` and the inverse rotation of `Attention.forward`, official release.
// Inputs   q [n_tokens, n_heads, 512] bf16    sink [n_heads] f32
//          window [n_slots, ring, 584] u8, pending [n_tokens, 584] u8 (this step's rows), entries:
//          block store of 584-byte rows
//          chosen [n_tokens, top_k] u32, counts [n_tokens]: ratio 4; null for ratio 128 (all
//          complete entries) and for window-only layers (ratio 0)
// Outputs  attn_sparse: per split of `split_blocks` blocks of 64 keys, acc [n_tokens, n_splits,
//          n_heads, 512] f32 not normalised, stats [n_tokens, n_splits, n_heads, 2] f32 (maximum, sum)
//          attn_merge: o [n_tokens, n_heads, 512] bf16, rotated back to position 0
//          ended [n_tokens, ceil(n_heads / tile_heads)] u32: zeros, and zeros again afterwards; where it is not
//          null attn_sparse leaves o, too: the last split of a tile to end adds its heads up
// Launch   attn_sparse: grid (n_splits, ceil(n_heads / tile_heads), n_tokens), 128 threads. A block holds
//          up to 16 heads; fewer where blocks are idle otherwise, since one of them adds all of a tile up. Keys
//          come in blocks of 64: the window's, then the entries'. Each warp scores
//          16 keys and owns 128 channels of the output.
//          attn_merge: one warp per head, 4 per block.
// Limit    for many heads the expansion of FP8 rows, done once per 16 heads; 64 heads per block on
//          sm_90a is the faster form.
// Arch     sm_80 and later, 88 KB of shared memory.
// CPU twin `ops::cpu::attention`: the same blocks of 64 and the same bf16 rounding of weights;
//          splits have their own maxima, so weights may round otherwise: 2^-8 of the largest value.

#include "../include/merge.cuh"

constexpr u32 HEADS = 16, KEYS = 64, THREADS = 128, WARPS = 4;
constexpr u32 STRIDE = HEAD_DIM + 8, P_STRIDE = KEYS + 8;
constexpr float SOFTMAX_SCALE = 0.044194173f; // 512^-0.5

struct SparseShared {
    bf16 q[HEADS][STRIDE];
    bf16 keys[KEYS][STRIDE];
    bf16 p[HEADS][P_STRIDE];
    float max[WARPS][HEADS];
    float sum[WARPS][HEADS];
    u32 is_last;
};

// One quarter of a row of 512 channels, from 584 bytes: 112 codes and 16 rope channels.
INLINE void expand_row(const u8* row, u32 quarter, bf16* out) {
    UNROLL
    for (u32 i = 0; i < 14; ++i) {
        const u32 channel = quarter * 112 + i * 8;
        const u32x2 codes = *reinterpret_cast<const u32x2*>(row + channel);
        const float scale = e8m0_to_f32(row[NOPE_DIM + 2 * ROPE_DIM + channel / 64]);
        const u32 factor = pack_bf16x2(scale, scale);
        u32x4 values;
        expand_e4m3(codes.v[0], values.v[0], values.v[1]);
        expand_e4m3(codes.v[1], values.v[2], values.v[3]);
        UNROLL
        for (u32 j = 0; j < 4; ++j) values.v[j] = mul_bf16x2(values.v[j], factor);
        *reinterpret_cast<u32x4*>(out + channel) = values;
    }
    UNROLL
    for (u32 i = 0; i < 4; ++i) {
        const u32 channel = quarter * 16 + i * 4;
        *reinterpret_cast<u32x2*>(out + NOPE_DIM + channel) =
            *reinterpret_cast<const u32x2*>(row + NOPE_DIM + 2 * channel);
    }
}

// One warp: a head of the step's token `token`, which is number `row` of the launch.
INLINE void merge(const float* acc, const float* stats, const float* sink, const float* frequencies, u32 position,
                  bf16* o, u32 row, u32 token, u32 head, u32 n_heads, u32 n_splits) {
    const u64 at = static_cast<u64>(row) * n_splits * n_heads + head;
    float v[KV_PER_LANE];
    merge_head<4>(acc + at * HEAD_DIM, stats + 2 * at, n_heads, n_splits, sink[head], v);
    rope_row(v, frequencies, position, -1.0f);
    store_row(v, o + (static_cast<u64>(token) * n_heads + head) * HEAD_DIM);
}

// `acc_out` and `stats` are read where other blocks wrote them.
extern "C" __global__ void __launch_bounds__(THREADS) attn_sparse(
    const bf16* __restrict__ q, const u8* __restrict__ window, const u8* __restrict__ pending,
    const u8* __restrict__ entries, const u32* __restrict__ chosen, const u32* __restrict__ counts,
    const u32* __restrict__ positions, const u32* __restrict__ sequence_of,
    const Sequence* __restrict__ sequences, const u32* __restrict__ blocks,
    float* acc_out, float* stats, const float* __restrict__ sink, const float* __restrict__ frequencies,
    bf16* __restrict__ o, u32* ended, u32 tile_heads, u32 first_token, u32 n_heads, u32 ring, u32 ratio, u32 top_k,
    u32 split_blocks) {
    dependency_begin(window, pending, entries, chosen, counts, positions, sequence_of, sequences, blocks);
    SparseShared& s = shared<SparseShared>();
    // Outputs are numbered from the first token of this launch, inputs from that of the step.
    const u32 token = first_token + blockIdx.z, first_head = blockIdx.y * tile_heads;
    const u32 end_head = min_u32(n_heads, first_head + tile_heads);
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), g = lane / 4, quad = lane % 4;
    const u32 position = positions[token];
    const Step step = {positions, sequence_of, sequences, blocks};
    const Sequence& sequence = sequences[sequence_of[token]];
    const u32 n_window = min_u32(position + 1, WINDOW);
    const u32 n_entries = ratio == 0 ? 0 : chosen ? counts[token] : (position + 1) / ratio;
    const u32 window_blocks = ceil_div(n_window, KEYS);
    const u32 n_blocks = window_blocks + ceil_div(n_entries, KEYS);
    const u32 first_block = blockIdx.x * split_blocks, end_block = min_u32(n_blocks, first_block + split_blocks);

    for (u32 i = t; i < HEADS * (HEAD_DIM / 8); i += THREADS) {
        const u32 head = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8;
        const bool valid = first_head + head < end_head;
        const u64 at = (static_cast<u64>(token) * n_heads + first_head + head) * HEAD_DIM + column;
        cp_async16(&s.q[head][column], valid ? q + at : q, valid);
    }
    cp_async_commit();
    cp_async_wait<0>();

    float acc[16][4] = {};
    float max[2] = {negative_infinity(), negative_infinity()}, sum[2] = {};
    for (u32 block = first_block; block < end_block; ++block) {
        const bool in_window = block < window_blocks;
        const u32 first_key = (in_window ? block : block - window_blocks) * KEYS;
        const u32 n_keys = min_u32(KEYS, (in_window ? n_window : n_entries) - first_key);
        block_sync(); // the last block's keys and weights are read
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            const u32 key = half * 32 + t / 4, quarter = t % 4;
            const u8* row;
            if (key >= n_keys) {
                // Behind the last key: zeros, whose weight is zero.
                UNROLL
                for (u32 i = 0; i < 16; ++i)
                    *reinterpret_cast<u32x4*>(&s.keys[key][(quarter * 16 + i) * 8]) = u32x4{};
                continue;
            }
            if (in_window) {
                const u32 at = position + 1 - n_window + first_key + key;
                const bool is_new = at >= sequence.position;
                row = is_new ? pending + static_cast<u64>(sequence.row + at - sequence.position) * KV_ROW_BYTES
                             : window + (static_cast<u64>(sequence.slot) * ring + at % ring) * KV_ROW_BYTES;
            } else {
                const u32 at = first_key + key;
                const u32 entry = chosen ? chosen[static_cast<u64>(token) * top_k + at] : at;
                row = entries + block_row(step, sequence, entry, BLOCK_TOKENS / ratio) * KV_ROW_BYTES;
            }
            expand_row(row, quarter, s.keys[key]);
        }
        block_sync();

        // Scores of this warp's 16 keys: two tiles of 8.
        float d[2][4] = {};
        UNROLL
        for (u32 k = 0; k < HEAD_DIM / 16; ++k) {
            u32 a[4], b[4];
            ldmatrix_x4(a, &s.q[lane % 16][k * 16 + lane / 16 * 8]);
            // Matrices 0, 1: keys 0..7, k and k + 8; matrices 2, 3: keys 8..15.
            ldmatrix_x4(b, &s.keys[warp * 16 + lane / 16 * 8 + lane % 8][k * 16 + lane / 8 % 2 * 8]);
            mma_bf16_16816(d[0], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_bf16_16816(d[1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
        float block_max[2] = {negative_infinity(), negative_infinity()};
        UNROLL
        for (u32 tile = 0; tile < 2; ++tile)
            UNROLL
            for (u32 i = 0; i < 4; ++i) {
                const u32 key = warp * 16 + tile * 8 + 2 * quad + i % 2;
                d[tile][i] = key < n_keys ? mul_rn(d[tile][i], SOFTMAX_SCALE) : negative_infinity();
                block_max[i / 2] = max_f32(block_max[i / 2], d[tile][i]);
            }
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            block_max[r] = group_max<4>(block_max[r]);
            if (quad == 0) s.max[warp][g + 8 * r] = block_max[r];
        }
        block_sync();
        float rescale[2], part[2] = {};
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float next = max[r];
            UNROLL
            for (u32 w = 0; w < WARPS; ++w) next = max_f32(next, s.max[w][g + 8 * r]);
            rescale[r] = exp_f32(max[r] - next);
            max[r] = next;
        }
        UNROLL
        for (u32 tile = 0; tile < 2; ++tile)
            UNROLL
            for (u32 r = 0; r < 2; ++r) {
                const float low = exp_f32(d[tile][2 * r] - max[r]), high = exp_f32(d[tile][2 * r + 1] - max[r]);
                // The denominator takes the unrounded weights.
                part[r] = add_rn(part[r], add_rn(low, high));
                *reinterpret_cast<u32*>(&s.p[g + 8 * r][warp * 16 + tile * 8 + 2 * quad]) = pack_bf16x2(low, high);
            }
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            part[r] = add_rn(part[r], shfl_xor(part[r], 1));
            part[r] = add_rn(part[r], shfl_xor(part[r], 2));
            if (quad == 0) s.sum[warp][g + 8 * r] = part[r];
        }
        block_sync();
        UNROLL
        for (u32 r = 0; r < 2; ++r) {
            float block_sum = s.sum[0][g + 8 * r];
            UNROLL
            for (u32 w = 1; w < WARPS; ++w) block_sum = add_rn(block_sum, s.sum[w][g + 8 * r]);
            sum[r] = fma_rn(sum[r], rescale[r], block_sum);
        }
        UNROLL
        for (u32 n = 0; n < 16; ++n)
            UNROLL
            for (u32 i = 0; i < 4; ++i) acc[n][i] = mul_rn(acc[n][i], rescale[i / 2]);
        UNROLL
        for (u32 k = 0; k < KEYS / 16; ++k) {
            u32 a[4];
            ldmatrix_x4(a, &s.p[lane % 16][k * 16 + lane / 16 * 8]);
            UNROLL
            for (u32 n = 0; n < 16; n += 2) {
                u32 b[4];
                // Matrices 0, 1: keys k and k + 8 of channels n; matrices 2, 3: of channels n + 8.
                ldmatrix_x4_trans(b, &s.keys[k * 16 + lane % 16][warp * 128 + n * 8 + lane / 16 * 8]);
                mma_bf16_16816(acc[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_bf16_16816(acc[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }

    UNROLL
    for (u32 r = 0; r < 2; ++r) {
        const u32 head = first_head + g + 8 * r;
        if (head >= end_head) continue;
        const u64 at = (static_cast<u64>(blockIdx.z) * gridDim.x + blockIdx.x) * n_heads + head;
        UNROLL
        for (u32 n = 0; n < 16; ++n)
            UNROLL
            for (u32 i = 0; i < 2; ++i)
                acc_out[at * HEAD_DIM + warp * 128 + n * 8 + 2 * quad + i] = acc[n][2 * r + i];
        if (warp == 0 && quad == 0) stats[2 * at] = max[r], stats[2 * at + 1] = sum[r];
    }
    if (ended == nullptr) return;
    block_sync();
    if (t == 0) {
        u32* count = ended + blockIdx.z * gridDim.y + blockIdx.y;
        const bool is_last = atomic_add_ordered(count, 1) == gridDim.x - 1;
        if (is_last) *count = 0;
        s.is_last = is_last;
    }
    block_sync();
    if (!s.is_last) return;
    for (u32 head = first_head + warp; head < end_head; head += WARPS)
        merge(acc_out, stats, sink, frequencies, position, o, blockIdx.z, token, head, n_heads, gridDim.x);
}
EMU_KERNEL(attn_sparse)

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attn_merge(
    const float* __restrict__ acc, const float* __restrict__ stats, const float* __restrict__ sink,
    const float* __restrict__ frequencies, const u32* __restrict__ positions, bf16* __restrict__ o,
    u32 first_token, u32 n_tokens, u32 n_heads, u32 n_splits) {
    dependency_begin(acc, stats, positions);
    const u32 index = blockIdx.x * WARPS + warp_id();
    if (index >= n_tokens * n_heads) return;
    const u32 token = index / n_heads, head = index % n_heads;
    merge(acc, stats, sink, frequencies, positions[first_token + token], o, token, first_token + token, head, n_heads, n_splits);
}
EMU_KERNEL(attn_merge)
