// attn_finish_q, attn_finish_index_q, attn_store_kv, attn_commit_window: between the projections
// and attention itself.
//
// Source   `Attention.forward`, `Indexer.forward` of the official release (norms, rotary embedding,
//          `act_quant` in place, `rotate_activation`, `fp4_act_quant`).
// Inputs   q [n_tokens, n_heads, 512] bf16    index q [n_tokens, n_heads, 128] bf16
//          kv [n_tokens, 512] bf16, not yet normalised    frequencies [32] f32
//          positions [n_tokens] u32    weight [512] f32
// Outputs  attn_finish_q: q in place: norm per head without weight, rotation
//          attn_finish_index_q: in place: rotation, Hadamard, values on the FP4 grid
//          attn_store_kv: kv_out [n_tokens, 512] bf16 as a later read returns it, and
//          pending [n_tokens, 584] u8, the rows as they will enter the window
//          attn_commit_window: the step's last rows into the window rings
// Launch   one warp per head (or row), 4 per block; attn_commit_window one block per row.
// Limit    latency for few tokens, memory for many.
// Arch     sm_80 and later.
// CPU twin `ops::cpu::{attention, attention_ops, quant}`: 1 bf16 ulp where a norm is taken (sums in
//          another order), equal bits elsewhere apart from the last ulp of sine and cosine.

#include "../include/kv_row.cuh"

constexpr u32 WARPS = 4;

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attn_finish_q(
    bf16* __restrict__ q, const float* __restrict__ frequencies, const u32* __restrict__ positions,
    u32 n_tokens, u32 n_heads, float eps) {
    dependency_begin(q, positions);
    const u32 head = blockIdx.x * WARPS + warp_id();
    if (head >= n_tokens * n_heads) return;
    bf16* mine = q + static_cast<u64>(head) * HEAD_DIM;
    float v[KV_PER_LANE];
    load_row(mine, v);
    norm_row(v, nullptr, eps);
    rope_row(v, frequencies, positions[head / n_heads], 1.0f);
    store_row(v, mine);
}
EMU_KERNEL(attn_finish_q)

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attn_finish_index_q(
    bf16* __restrict__ q, const float* __restrict__ frequencies, const u32* __restrict__ positions,
    u32 n_tokens, u32 n_heads) {
    dependency_begin(q, positions);
    const u32 head = blockIdx.x * WARPS + warp_id();
    if (head >= n_tokens * n_heads) return;
    bf16* mine = q + static_cast<u64>(head) * INDEX_DIM;
    const u32x2 packed = reinterpret_cast<const u32x2*>(mine)[lane_id()];
    float v[KEY_PER_LANE] = {bf16_low(packed.v[0]), bf16_high(packed.v[0]), bf16_low(packed.v[1]),
                             bf16_high(packed.v[1])};
    finish_index_query(v, frequencies, positions[head / n_heads]);
    store_index_query(v, mine);
}
EMU_KERNEL(attn_finish_index_q)

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attn_store_kv(
    const bf16* __restrict__ kv, const float* __restrict__ weight,
    const float* __restrict__ frequencies, const u32* __restrict__ positions,
    bf16* __restrict__ kv_out, u8* __restrict__ pending, u32 n_tokens, float eps) {
    dependency_begin(kv, positions);
    const u32 row = blockIdx.x * WARPS + warp_id();
    if (row >= n_tokens) return;
    finish_kv_row(kv, weight, frequencies, positions[row], row, kv_out,
                  pending + static_cast<u64>(row) * KV_ROW_BYTES, eps);
}
EMU_KERNEL(attn_store_kv)

// Of a sequence's rows only the last `ring` enter: earlier ones would be overwritten in any order.
extern "C" __global__ void __launch_bounds__(96) attn_commit_window(
    const u8* __restrict__ pending, u8* __restrict__ window, const u32* __restrict__ positions,
    const u32* __restrict__ sequence_of, const Sequence* __restrict__ sequences, u32 ring) {
    dependency_begin(pending, positions, sequence_of, sequences);
    const u32 row = blockIdx.x;
    const Sequence& sequence = sequences[sequence_of[row]];
    const u32 position = positions[row];
    if (sequence.repeats()) return;
    if (position + ring < sequence.position + sequence.n_tokens) return;
    const u64* from = reinterpret_cast<const u64*>(pending + static_cast<u64>(row) * KV_ROW_BYTES);
    u64* to = reinterpret_cast<u64*>(window + (static_cast<u64>(sequence.slot) * ring + position % ring) * KV_ROW_BYTES);
    if (threadIdx.x < KV_ROW_BYTES / 8) to[threadIdx.x] = from[threadIdx.x];
}
EMU_KERNEL(attn_commit_window)
