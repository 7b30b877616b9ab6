// plain_product, plain_grid, plain_gate, plain_sum, plain_scores, plain_attend, plain_factor, plain_mix, plain_collapse,
// plain_scale, plain_post: operators with a thread per output and nothing else: no tiles, no tensor cores, no shared memory, weights as in the checkpoint.
//
// Not operators: compared with the CPU operators at small sizes, they are what all outputs of the real kernels
// are compared with at real ones, where a CPU would take hours.
//
// Inputs   x and everything between operators f32    codes, scales of `n_matrices` matrices [n, k], back to back
//          chosen [n_rows] matrix of each row, or null
// Launch   product, scores, attend: blocks of 128 threads along the outputs of a row, a row per blockIdx.y
//          grid: a thread per block of 128 values    factor, mix: a thread per row    others: a thread per output
// Limit    none is meant.
// Arch     sm_80 and later.
// CPU twin `CpuOps::quantised_linear`, `HeadOps::logits`, `MoeOps::moe`, `AttentionOps::attend`,
//          `HyperConnectionOps`; the tolerances are those of the real kernels.

#include "../include/formats.cuh"

enum Format : u32 { FORMAT_BF16, FORMAT_FP8, FORMAT_FP8_F32, FORMAT_FP4, FORMAT_F32 };
constexpr u32 BLOCK = 128, CHANNELS = 512, NO_KEY = 0xffffffffu, COPIES = 4, MIXES = 24;
constexpr float EPS = 1e-6f;

// Column `col` of row `row` of matrix `matrix`.
INLINE float weight(const u8* codes, const u8* scales, u32 format, u64 matrix, u32 row, u32 col, u32 n, u32 k) {
    const u64 at = (matrix * n + row) * k + col;
    if (format == FORMAT_BF16) return bf16_to_f32(reinterpret_cast<const bf16*>(codes)[at]);
    if (format == FORMAT_F32) return reinterpret_cast<const float*>(codes)[at];
    if (format == FORMAT_FP4) return e2m1_to_f32(codes[at / 2] >> 4 * (at % 2) & 15u) * e8m0_to_f32(scales[at / 32]);
    const u64 columns = (k + BLOCK - 1) / BLOCK, rows = (n + BLOCK - 1) / BLOCK;
    const u64 block = (matrix * rows + row / BLOCK) * columns + col / BLOCK;
    const float scale =
        format == FORMAT_FP8 ? e8m0_to_f32(scales[block]) : reinterpret_cast<const float*>(scales)[block];
    return e4m3_to_f32(codes[at]) * scale;
}

// out[row, i] = x[row / rows_per_x] . W[i]
extern "C" __global__ void __launch_bounds__(128) plain_product(
    const float* __restrict__ x, const u32* __restrict__ chosen, const u8* __restrict__ codes,
    const u8* __restrict__ scales, float* __restrict__ out, u32 n, u32 k, u32 format, u32 rows_per_x) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const u32 matrix = chosen ? chosen[blockIdx.y] : 0;
    const float* from = x + static_cast<u64>(blockIdx.y / rows_per_x) * k;
    float sum = 0.0f;
    // Sums of short sums: rounding grows with neither.
    for (u32 first = 0; first < k; first += BLOCK) {
        float part = 0.0f;
        for (u32 col = first; col < k && col < first + BLOCK; ++col)
            part = fma_rn(weight(codes, scales, format, matrix, i, col, n, k), from[col], part);
        sum += part;
    }
    out[static_cast<u64>(blockIdx.y) * n + i] = sum;
}
EMU_KERNEL(plain_product)

// x in place on the FP8 grid of its blocks.
extern "C" __global__ void __launch_bounds__(128) plain_grid(float* __restrict__ x, u32 n_blocks) {
    const u32 block = blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= n_blocks) return;
    float* values = x + static_cast<u64>(block) * BLOCK;
    float most = 0.0f;
    for (u32 i = 0; i < BLOCK; ++i) most = max_f32(most, abs_f32(values[i]));
    const u32 scale = fp8_block_scale(most);
    for (u32 i = 0; i < BLOCK; ++i) values[i] = on_e4m3_grid(values[i], scale);
}
EMU_KERNEL(plain_grid)

// gate [rows, channels] becomes the activation; weights [rows], or null.
extern "C" __global__ void __launch_bounds__(128) plain_gate(
    float* __restrict__ gate, const float* __restrict__ up, const float* __restrict__ weights, u32 channels, u32 n,
    float limit) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float g = min_f32(round_bf16(gate[i]), limit);
    const float u = max_f32(min_f32(round_bf16(up[i]), limit), -limit);
    const float value = g / (1.0f + exp_f32(-g)) * u;
    gate[i] = round_bf16(weights ? value * weights[i / channels] : value);
}
EMU_KERNEL(plain_gate)

// out [rows, width] = the sum of each row's `top_k` parts and of `shared`, each rounded before and the sum after.
extern "C" __global__ void __launch_bounds__(128) plain_sum(
    const float* __restrict__ parts, const float* __restrict__ shared, float* __restrict__ out, u32 width, u32 top_k,
    u32 n) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const u64 row = i / width;
    float sum = 0.0f;
    for (u32 part = 0; part < top_k; ++part) sum += round_bf16(parts[(row * top_k + part) * width + i % width]);
    out[i] = round_bf16(sum + round_bf16(shared[i]));
}
EMU_KERNEL(plain_sum)

// scores [rows * heads, most_keys] of the keys that list [rows, most_keys] names.
extern "C" __global__ void __launch_bounds__(128) plain_scores(
    const float* __restrict__ q, const float* __restrict__ keys, const u32* __restrict__ list,
    float* __restrict__ scores, u32 n_heads, u32 most_keys) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= most_keys) return;
    const u32 key = list[static_cast<u64>(blockIdx.y / n_heads) * most_keys + i];
    if (key == NO_KEY) return;
    const float* from = q + static_cast<u64>(blockIdx.y) * CHANNELS;
    float sum = 0.0f;
    for (u32 channel = 0; channel < CHANNELS; ++channel)
        sum = fma_rn(from[channel], keys[static_cast<u64>(key) * CHANNELS + channel], sum);
    scores[static_cast<u64>(blockIdx.y) * most_keys + i] = sum * 0.044194173824159216f;
}
EMU_KERNEL(plain_scores)

// out [rows * heads, 512], not yet rotated back: a softmax of the scores and the head's sink over the keys.
extern "C" __global__ void __launch_bounds__(128) plain_attend(
    const float* __restrict__ scores, const float* __restrict__ keys, const u32* __restrict__ list,
    const float* __restrict__ sink, float* __restrict__ out, u32 n_heads, u32 most_keys) {
    const u32 channel = blockIdx.x * blockDim.x + threadIdx.x;
    const float* own = scores + static_cast<u64>(blockIdx.y) * most_keys;
    const u32* named = list + static_cast<u64>(blockIdx.y / n_heads) * most_keys;
    float most = sink[blockIdx.y % n_heads];
    for (u32 i = 0; i < most_keys && named[i] != NO_KEY; ++i) most = max_f32(most, own[i]);
    float weights = exp_f32(sink[blockIdx.y % n_heads] - most), sum = 0.0f;
    for (u32 i = 0; i < most_keys && named[i] != NO_KEY; ++i) {
        const float weight = exp_f32(own[i] - most);
        weights += weight;
        sum = fma_rn(weight, keys[static_cast<u64>(named[i]) * CHANNELS + channel], sum);
    }
    out[static_cast<u64>(blockIdx.y) * CHANNELS + channel] = sum / weights;
}
EMU_KERNEL(plain_attend)

// out[row] = 1 / sqrt(mean(x[row]^2) + eps)
extern "C" __global__ void __launch_bounds__(128) plain_factor(
    const float* __restrict__ x, float* __restrict__ out, u32 n_cols, u32 n_rows) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows) return;
    float sum = 0.0f;
    for (u32 first = 0; first < n_cols; first += BLOCK) {
        float part = 0.0f;
        for (u32 col = first; col < n_cols && col < first + BLOCK; ++col) {
            const float value = x[static_cast<u64>(row) * n_cols + col];
            part = fma_rn(value, value, part);
        }
        sum += part;
    }
    out[row] = 1.0f / sqrt_rn(sum / static_cast<float>(n_cols) + EPS);
}
EMU_KERNEL(plain_factor)

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

// out [rows, 24]: pre, post, comb of a site from its products [rows, n]; pre alone of a head's four.
extern "C" __global__ void __launch_bounds__(128) plain_mix(
    const float* __restrict__ products, const float* __restrict__ factors, const float* __restrict__ base,
    const float* __restrict__ scale, float* __restrict__ out, u32 n, u32 n_rows) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows) return;
    products += static_cast<u64>(row) * n, out += static_cast<u64>(row) * MIXES;
    const float factor = factors[row];
    for (u32 i = 0; i < COPIES; ++i) out[i] = sigmoid(products[i] * factor * scale[0] + base[i]) + EPS;
    if (n == COPIES) return;
    for (u32 i = 4; i < 8; ++i) out[i] = 2.0f * sigmoid(products[i] * factor * scale[1] + base[i]);
    float comb[COPIES][COPIES];
    for (u32 i = 0; i < COPIES; ++i) {
        float most = negative_infinity(), sum = 0.0f;
        for (u32 j = 0; j < COPIES; ++j) {
            const u32 at = 8 + COPIES * i + j;
            comb[i][j] = products[at] * factor * scale[2] + base[at];
            most = max_f32(most, comb[i][j]);
        }
        for (u32 j = 0; j < COPIES; ++j) comb[i][j] = exp_f32(comb[i][j] - most), sum += comb[i][j];
        for (u32 j = 0; j < COPIES; ++j) comb[i][j] = comb[i][j] / sum + EPS;
    }
    for (u32 pass = 0; pass < 20; ++pass) {
        for (u32 i = 0; pass > 0 && i < COPIES; ++i) {
            const float sum = comb[i][0] + comb[i][1] + comb[i][2] + comb[i][3] + EPS;
            for (u32 j = 0; j < COPIES; ++j) comb[i][j] /= sum;
        }
        for (u32 j = 0; j < COPIES; ++j) {
            const float sum = comb[0][j] + comb[1][j] + comb[2][j] + comb[3][j] + EPS;
            for (u32 i = 0; i < COPIES; ++i) comb[i][j] /= sum;
        }
    }
    for (u32 i = 0; i < COPIES; ++i)
        for (u32 j = 0; j < COPIES; ++j) out[8 + COPIES * i + j] = comb[i][j];
}
EMU_KERNEL(plain_mix)

// out [rows, width] = the copies x [rows, 4, width], added up by their shares.
extern "C" __global__ void __launch_bounds__(128) plain_collapse(
    const float* __restrict__ x, const float* __restrict__ mix, float* __restrict__ out, u32 width, u32 n) {
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    const u64 row = at / width;
    float sum = 0.0f;
    for (u32 i = 0; i < COPIES; ++i) sum += mix[row * MIXES + i] * x[(row * COPIES + i) * width + at % width];
    out[at] = round_bf16(sum);
}
EMU_KERNEL(plain_collapse)

// x [rows, width] times its row's factor and its channel's weight.
extern "C" __global__ void __launch_bounds__(128) plain_scale(
    float* __restrict__ x, const float* __restrict__ factors, const float* __restrict__ weights, u32 width, u32 n) {
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    x[at] = round_bf16(x[at] * factors[at / width] * weights[at % width]);
}
EMU_KERNEL(plain_scale)

// out [rows, 4, width]: the copies after their sublayer put out y [rows, width].
extern "C" __global__ void __launch_bounds__(128) plain_post(
    const float* __restrict__ x, const float* __restrict__ y, const float* __restrict__ mix, float* __restrict__ out,
    u32 width, u32 n) {
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    const u64 row = at / (COPIES * width);
    const u32 j = at / width % COPIES, channel = at % width;
    float sum = mix[row * MIXES + 4 + j] * y[row * width + channel];
    for (u32 i = 0; i < COPIES; ++i)
        sum += mix[row * MIXES + 8 + COPIES * i + j] * x[(row * COPIES + i) * width + channel];
    out[at] = round_bf16(sum);
}
EMU_KERNEL(plain_post)
