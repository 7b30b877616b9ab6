// compress_emit, compress_state: compressed entries and index keys that a step completes, and the
// state the next step needs; attn_store_step: all that a step of one-token sequences stores.
//
// Source   `Compressor.forward` of the official release (section 7 of the model specification).
// Inputs   u, s [n_tokens, coff * c] f32, s without ape    ape [ratio, coff * c] f32
//          c = 512 (entries) or 128 (keys); coff = 2 for ratio 4, whose groups overlap, else 1
//          state_u, state_s [n_slots, ring, coff * c] f32, by position, s with ape
// Outputs  emit: rows of the block store (584 or 68 bytes) for every position that ends a group
//          state: the step's last `ring` positions
//          attn_store_step: both, and what `attn_store_kv` and `attn_commit_window` write
// Launch   one block per row of the step, 128 threads; blocks whose position ends no group do
//          nothing. compress_state runs after compress_emit, which still reads what it overwrites.
//          attn_store_step: grid (n_tokens, 1 to 3): the KV row; the entry; the key.
// Limit    memory: ratio rows of u and s per entry.
// Arch     sm_80 and later.
// CPU twin `CpuOps::compress`: the exponential differs by 2 ulp, so 1 bf16 ulp before the norm.

#include "../include/kv_row.cuh"

constexpr u32 THREADS = 128;

struct CompressShared {
    float pooled[HEAD_DIM];
};

template <u32 Width, bool Keys>
INLINE void emit(const float* u, const float* s, const float* ape, const float* state_u,
                 const float* state_s, const float* weight, const float* frequencies,
                 const Step& step, u8* store, u32 ratio, u32 coff, u32 ring, float eps) {
    const u32 row = blockIdx.x, position = step.positions[row];
    if ((position + 1) % ratio != 0) return;
    const Sequence& sequence = step.sequences[step.sequence_of[row]];
    if (sequence.repeats()) return;
    const u32 stride = coff * Width, entry = position / ratio, start = entry * ratio;
    // Overlapping groups begin with the previous group's "a" half; entry 0 has none.
    const u32 n_before = coff == 2 && start != 0 ? ratio : 0;
    CompressShared& shared_pool = shared<CompressShared>();
    constexpr u32 PER = Width / THREADS;
    float max[PER], sum[PER] = {}, weighted[PER] = {};
    UNROLL
    for (u32 i = 0; i < PER; ++i) max[i] = negative_infinity();
    for (u32 pass = 0; pass < 2; ++pass) {
        for (u32 source = 0; source < n_before + ratio; ++source) {
            const u32 at = start - n_before + source;
            const u32 half = coff == 2 && source >= n_before ? Width : 0;
            const bool is_new = at >= sequence.position;
            const u64 base = (is_new ? static_cast<u64>(sequence.row + at - sequence.position)
                                     : static_cast<u64>(sequence.slot) * ring + at % ring) * stride + half;
            UNROLL
            for (u32 i = 0; i < PER; ++i) {
                const u32 channel = i * THREADS + threadIdx.x;
                float logit = (is_new ? s : state_s)[base + channel];
                if (is_new) logit = add_rn(logit, ape[at % ratio * stride + half + channel]);
                if (pass == 0) {
                    max[i] = max_f32(max[i], logit);
                } else {
                    const float share = exp_f32(logit - max[i]);
                    sum[i] = add_rn(sum[i], share);
                    weighted[i] = fma_rn(share, (is_new ? u : state_u)[base + channel], weighted[i]);
                }
            }
        }
    }
    UNROLL
    for (u32 i = 0; i < PER; ++i)
        shared_pool.pooled[i * THREADS + threadIdx.x] = round_bf16(div_rn(weighted[i], sum[i]));
    block_sync();
    if (warp_id() != 0) return;
    constexpr u32 N = Width / WARP;
    float v[N];
    UNROLL
    for (u32 i = 0; i < N; ++i) v[i] = shared_pool.pooled[lane_id() * N + i];
    norm_row(v, weight, eps);
    rope_row(v, frequencies, start, 1.0f);
    const u64 to = block_row(step, sequence, entry, BLOCK_TOKENS / ratio);
    if constexpr (Keys) {
        hadamard_row(v);
        store_key_row(v, store + to * KEY_ROW_BYTES);
    } else {
        store_kv_row(v, store + to * KV_ROW_BYTES);
    }
}

// Eight blocks per SM are asked for, here and below: left to itself the compiler saves registers by spilling.
#define COMPRESS_EMIT(name, width, keys)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 8) name(                                   \
        const float* __restrict__ u, const float* __restrict__ s, const float* __restrict__ ape,  \
        const float* __restrict__ state_u, const float* __restrict__ state_s,                     \
        const float* __restrict__ weight, const float* __restrict__ frequencies,                  \
        const u32* __restrict__ positions, const u32* __restrict__ sequence_of,                   \
        const Sequence* __restrict__ sequences, const u32* __restrict__ blocks,                   \
        u8* __restrict__ store, u32 ratio, u32 coff, u32 ring, float eps) {                       \
        dependency_begin(u, s, state_u, state_s, positions, sequence_of, sequences, blocks);      \
        emit<width, keys>(u, s, ape, state_u, state_s, weight, frequencies,                       \
                          Step{positions, sequence_of, sequences, blocks}, store, ratio, coff,    \
                          ring, eps);                                                             \
    }                                                                                             \
    EMU_KERNEL(name)

COMPRESS_EMIT(compress_emit_kv, HEAD_DIM, false)
COMPRESS_EMIT(compress_emit_keys, INDEX_DIM, true)

// The row into the state, if it is among the sequence's last `ring`.
INLINE void keep(const float* u, const float* s, const float* ape, float* state_u, float* state_s, const Step& step,
                 u32 stride, u32 ratio, u32 ring) {
    const u32 row = blockIdx.x, position = step.positions[row];
    const Sequence& sequence = step.sequences[step.sequence_of[row]];
    if (sequence.repeats()) return;
    if (position + ring < sequence.position + sequence.n_tokens) return;
    const u64 to = (static_cast<u64>(sequence.slot) * ring + position % ring) * stride;
    const u64 from = static_cast<u64>(row) * stride;
    for (u32 i = threadIdx.x; i < stride; i += THREADS) {
        state_u[to + i] = u[from + i];
        state_s[to + i] = add_rn(s[from + i], ape[position % ratio * stride + i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) compress_state(
    const float* __restrict__ u, const float* __restrict__ s, const float* __restrict__ ape,
    float* __restrict__ state_u, float* __restrict__ state_s, const u32* __restrict__ positions,
    const u32* __restrict__ sequence_of, const Sequence* __restrict__ sequences, u32 stride,
    u32 ratio, u32 ring) {
    dependency_begin(u, s, positions, sequence_of, sequences);
    keep(u, s, ape, state_u, state_s, Step{positions, sequence_of, sequences, nullptr}, stride, ratio, ring);
}
EMU_KERNEL(compress_state)

// What one compressor reads and writes; null where a layer has none.
struct Compressor {
    const float *u, *s, *ape, *weight;
    float *state_u, *state_s;
    u8* store;
    u32 ring;
    float eps;
};

// Emits, then keeps. No other row of the step is of the sequence, and all threads have read the state
// that is overwritten when `emit` meets at its barrier.
template <u32 Width, bool Keys>
INLINE void advance(const Compressor& c, const float* frequencies, const Step& step, u32 ratio, u32 coff) {
    emit<Width, Keys>(c.u, c.s, c.ape, c.state_u, c.state_s, c.weight, frequencies, step, c.store, ratio, coff,
                      c.ring, c.eps);
    keep(c.u, c.s, c.ape, c.state_u, c.state_s, step, coff * Width, ratio, c.ring);
}

// The state is written through the pointers it is read through: none of them is __restrict__.
extern "C" __global__ void __launch_bounds__(THREADS, 8) attn_store_step(
    const bf16* kv, const float* weight, const float* frequencies, const u32* positions, const u32* sequence_of,
    const Sequence* sequences, const u32* blocks, bf16* kv_out, u8* pending, u8* window, u32 window_ring, float eps,
    u32 ratio, u32 coff, const float* u, const float* s, const float* ape, const float* entry_weight, float* state_u,
    float* state_s, u8* entries, u32 ring, float entry_eps, const float* key_u, const float* key_s,
    const float* key_ape, const float* key_weight, float* key_state_u, float* key_state_s, u8* keys, u32 key_ring,
    float key_eps) {
    dependency_begin();
    const Step step = {positions, sequence_of, sequences, blocks};
    const u32 row = blockIdx.x;
    if (blockIdx.y == 1) {
        const Compressor c = {u, s, ape, entry_weight, state_u, state_s, entries, ring, entry_eps};
        advance<HEAD_DIM, false>(c, frequencies, step, ratio, coff);
    } else if (blockIdx.y == 2) {
        const Compressor c = {key_u, key_s, key_ape, key_weight, key_state_u, key_state_s, keys, key_ring, key_eps};
        advance<INDEX_DIM, true>(c, frequencies, step, ratio, coff);
    } else if (warp_id() == 0) {
        u8* to = pending + static_cast<u64>(row) * KV_ROW_BYTES;
        finish_kv_row(kv, weight, frequencies, positions[row], row, kv_out, to, eps);
        const Sequence& sequence = sequences[sequence_of[row]];
        if (sequence.repeats()) return;
        // Of the window attention reads less than the ring holds, and not what this row replaces.
        warp_sync();
        const u64* from = reinterpret_cast<const u64*>(to);
        u64* kept = reinterpret_cast<u64*>(
            window + (static_cast<u64>(sequence.slot) * window_ring + positions[row] % window_ring) * KV_ROW_BYTES);
        for (u32 i = lane_id(); i < KV_ROW_BYTES / 8; i += WARP) kept[i] = from[i];
    }
}
EMU_KERNEL(attn_store_step)
