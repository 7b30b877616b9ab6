// check_rope, check_sinkhorn, check_merge, check_top_k: functions that kernels share, on whatever is given.
//
// Not operators: they let a test run rotary embedding, Sinkhorn's iterations, the sums of attention's parts
// and the steps of a selection by themselves, in the emulator and on a GPU, and compare with their definitions.
//
// Launch   one warp per case, 4 per block.
// Arch     sm_80 and later.

#include "../include/hc.cuh"
#include "../include/merge.cuh"
#include "../include/top_k.cuh"

constexpr u32 CASES = 4;

// A row of N channels per lane: rotated by its position, and that back again.
template <u32 N>
INLINE void rope_both(const float* x, const float* frequencies, u32 position, float* forth, float* back) {
    float v[N];
    UNROLL
    for (u32 i = 0; i < N; ++i) v[i] = x[lane_id() * N + i];
    rope_row(v, frequencies, position, 1.0f);
    UNROLL
    for (u32 i = 0; i < N; ++i) forth[lane_id() * N + i] = v[i];
    rope_row(v, frequencies, position, -1.0f);
    UNROLL
    for (u32 i = 0; i < N; ++i) back[lane_id() * N + i] = v[i];
}

// Rows of 512 and of 128 channels (the last 128 of the 512).
extern "C" __global__ void __launch_bounds__(CASES* WARP) check_rope(
    const float* __restrict__ x, const float* __restrict__ frequencies, const u32* __restrict__ positions,
    float* __restrict__ forth, float* __restrict__ back, float* __restrict__ short_forth,
    float* __restrict__ short_back, u32 n) {
    const u32 row = blockIdx.x * CASES + warp_id();
    if (row >= n) return;
    const u64 at = static_cast<u64>(row) * HEAD_DIM, short_at = static_cast<u64>(row) * INDEX_DIM;
    rope_both<KV_PER_LANE>(x + at, frequencies, positions[row], forth + at, back + at);
    rope_both<KEY_PER_LANE>(x + at + HEAD_DIM - INDEX_DIM, frequencies, positions[row], short_forth + short_at,
                            short_back + short_at);
}
EMU_KERNEL(check_rope)

// 16 products of a mix each: `comb`, as the upper and as the lower lanes have it.
extern "C" __global__ void __launch_bounds__(CASES* WARP) check_sinkhorn(
    const float* __restrict__ mix, const float* __restrict__ base, float* __restrict__ comb, float scale,
    u32 n_iters, float eps, u32 n) {
    const u32 row = blockIdx.x * CASES + warp_id(), lane = lane_id();
    if (row >= n) return;
    comb[row * WARP + lane] = sinkhorn(mix[row * 16 + lane % 16], scale, base[lane % 16], n_iters, eps);
}
EMU_KERNEL(check_sinkhorn)

// A head whose parts are `n_splits` each: added up by a warp, and where there is one part, also by `one_split`.
extern "C" __global__ void __launch_bounds__(CASES* WARP) check_merge(
    const float* __restrict__ acc, const float* __restrict__ stats, const float* __restrict__ sinks,
    float* __restrict__ merged, float* __restrict__ alone, u32 n_splits, u32 n) {
    const u32 row = blockIdx.x * CASES + warp_id();
    if (row >= n) return;
    const u64 part = static_cast<u64>(row) * n_splits, at = static_cast<u64>(row) * HEAD_DIM + lane_id() * KV_PER_LANE;
    float v[KV_PER_LANE];
    merge_head<4>(acc + part * HEAD_DIM, stats + 2 * part, 1, n_splits, sinks[row], v);
    const OneSplit one = one_split(stats[2 * part], stats[2 * part + 1], sinks[row]);
    UNROLL
    for (u32 i = 0; i < KV_PER_LANE; ++i) {
        merged[at + i] = v[i];
        alone[at + i] = one.value(acc[part * HEAD_DIM + lane_id() * KV_PER_LANE + i]);
    }
}
EMU_KERNEL(check_merge)

// Of each value its integer; of each 256 counts the bin of the `wanted`-th and how many are wanted there.
extern "C" __global__ void __launch_bounds__(CASES* WARP) check_top_k(
    const float* __restrict__ values, u32* __restrict__ order, u32 n_values, const u32* __restrict__ bins,
    const u32* __restrict__ wanted, u32* __restrict__ found, u32 n) {
    const u32 t = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.x * CASES + warp_id();
    for (u32 i = t; i < n_values; i += gridDim.x * blockDim.x) order[i] = ordered(values[i]);
    if (row >= n) return;
    u32 bin, there;
    if (find_bin(bins + row * BINS, wanted[row], bin, there)) found[2 * row] = bin, found[2 * row + 1] = there;
}
EMU_KERNEL(check_top_k)
