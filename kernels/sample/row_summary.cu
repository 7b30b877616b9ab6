// row_summary: of each row of logits the greedy token, the maximum, the softmax's denominator, and
// whether every logit is a finite number.
//
// Source   greedy decoding and log-probabilities: `log p = logit - max - log(sum)`.
// Inputs   logits [n_rows, vocab] f32
// Outputs  tokens [n_rows] u32, the lowest id among equal maxima; max, sum [n_rows] f32, sum of
//          exp(logit - max); broken [n_rows] u32, 1 if a logit is NaN or infinite
// Launch   one block of 512 threads per row, two passes over the row.
// Limit    memory, 8 bytes per logit (the second pass hits the second-level cache).
// Arch     sm_80 and later.
// CPU twin plain sums; tokens and max equal, sum 1e-5 relative.

#include "../include/reduce.cuh"

constexpr u32 THREADS = 512;

struct SummaryShared {
    float max[THREADS / WARP];
    u32 token[THREADS / WARP], broken[THREADS / WARP];
    float sums[THREADS / WARP];
};

extern "C" __global__ void __launch_bounds__(THREADS) row_summary(
    const float* __restrict__ logits, u32* __restrict__ tokens, float* __restrict__ max_out,
    float* __restrict__ sum_out, u32* __restrict__ broken_out, u32 vocab) {
    SummaryShared& s = shared<SummaryShared>();
    const u32 row = blockIdx.x, t = threadIdx.x;
    logits += static_cast<u64>(row) * vocab;
    float max = negative_infinity();
    u32 token = 0xffffffffu, broken = 0;
    for (u32 i = t; i < vocab; i += THREADS) {
        const float x = logits[i];
        // All exponent bits set: NaN or infinite.
        broken |= (float_bits(x) & 0x7f800000u) == 0x7f800000u;
        if (x > max) max = x, token = i;
    }
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const float other = shfl_xor(max, lanes);
        const u32 other_token = shfl_xor(token, lanes);
        if (other > max || (other == max && other_token < token)) max = other, token = other_token;
    }
    const bool any_broken = ballot(broken != 0) != 0;
    if (lane_id() == 0) s.max[warp_id()] = max, s.token[warp_id()] = token, s.broken[warp_id()] = any_broken;
    block_sync();
    max = s.max[0], token = s.token[0], broken = s.broken[0];
    for (u32 w = 1; w < THREADS / WARP; ++w) {
        broken |= s.broken[w];
        if (s.max[w] > max || (s.max[w] == max && s.token[w] < token)) max = s.max[w], token = s.token[w];
    }
    float sum = 0.0f;
    for (u32 i = t; i < vocab; i += THREADS) sum = add_rn(sum, exp_f32(logits[i] - max));
    sum = block_sum(sum, s.sums);
    // A row without any number larger than -inf still names a token: the caller sees `broken`.
    if (t == 0) tokens[row] = min_u32(token, vocab - 1), max_out[row] = max, sum_out[row] = sum, broken_out[row] = broken;
}
EMU_KERNEL(row_summary)
