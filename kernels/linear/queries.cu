// queries: queries of attention and of the indexer from the low-rank vector of few tokens, in one launch: norm and
// rounding before the products, what attention and the indexer want of a head after them.
//
// Source   `Attention.forward`, `Indexer.forward` of the official release (q_norm, wq_b, norms of heads,
//          rotary embedding; the indexer's wq_b, `rotate_activation`, `fp4_act_quant`).
// Inputs   weights [n_heads 512, k], index_weights [n_index_heads 128, k] E4M3, scales f32 per 128 x 128
//          qr [n_tokens, k] bf16, put on the FP8 grid behind its norm with `on_grid`    norm [k] f32
//          frequencies [32] f32    positions [n_tokens] u32
//          ended [n_heads + n_index_heads] u32: zeros, and zeros again afterwards
// Outputs  q [n_tokens, n_heads, 512], index_q [n_tokens, n_index_heads, 128] bf16, as `attn_finish_q` and
//          `attn_finish_index_q` leave them
// Launch   grid 16 n_heads + 4 n_index_heads, 256 threads: 32 channels of a head. Every block normalises for
//          itself, while its weights are on their way; of a head's blocks the last to end, by a count in memory,
//          finishes it, a warp per token. Up to 8 tokens, whose rows fit the shared memory of `GemmShared`; k is
//          a multiple of 16.
//          May start before the launch before it has ended: weights come first.
// Limit    memory: every weight byte is read once.
// Arch     sm_80 and later; `queries90.cu` is the form for sm_90a.
// CPU twin `CpuOps::attn_queries`. Equal bits to `rms_norm`, `linear_fp8_8` and the two kernels named above.

#include "../include/kv_row.cuh"
#include "../include/skinny_gemm.cuh"

constexpr u32 TOKENS = 8, STAGES = 4, WARPS = GEMM_THREADS / WARP, BLOCK_ROWS = ROW_TILES * TILE_ROWS;

struct QueriesShared {
    GemmShared<TOKENS, STAGES> product; // where `gemm_resident` fills
    float squares[TOKENS][WARPS];
    u32 is_last;
};

// Rows of qr behind their norm, to `to`. Sums in the order of `rms_norm`.
INLINE void fill_normed(QueriesShared& s, bf16* to, const bf16* qr, u32 k, u32 n_tokens, const float* norm, float eps,
                        bool on_grid) {
    for (u32 token = 0; token < n_tokens; ++token) {
        float squares = 0.0f;
        for (u32 i = threadIdx.x * PER_THREAD; i < k; i += GEMM_THREADS * PER_THREAD) {
            float v[8];
            load8(qr + static_cast<u64>(token) * k + i, v);
            UNROLL
            for (u32 j = 0; j < 8; ++j) squares = fma_rn(v[j], v[j], squares);
        }
        squares = warp_sum(squares);
        if (lane_id() == 0) s.squares[token][warp_id()] = squares;
    }
    block_sync();
    const u32 per_row = ceil_div(k, K_BLOCK) * (K_BLOCK / 8), n = n_tokens * per_row;
    for (u32 first = 0; first < n; first += GEMM_THREADS) {
        const u32 i = first + threadIdx.x, token = i / per_row, column = i % per_row * 8;
        float v[8] = {};
        if (i < n && column < k) {
            float sum = 0.0f;
            UNROLL
            for (u32 warp = 0; warp < WARPS; ++warp) sum = add_rn(sum, s.squares[token][warp]);
            const float mean = sum / static_cast<float>(k), factor = div_rn(1.0f, sqrt_rn(mean + eps));
            load8(qr + static_cast<u64>(token) * k + column, v);
            UNROLL
            for (u32 j = 0; j < 8; ++j) v[j] = round_bf16(mul_rn(mul_rn(v[j], factor), norm[column + j]));
        }
        if (on_grid) quantise_block128(v);
        if (i < n) store8(to + token * resident_stride(k) + column, v);
    }
}

// One warp: a head of a token.
INLINE void finish(bf16* head, bool is_index, const float* frequencies, u32 position, float eps) {
    if (is_index) {
        const u32x2 packed = reinterpret_cast<const u32x2*>(head)[lane_id()];
        float v[KEY_PER_LANE] = {bf16_low(packed.v[0]), bf16_high(packed.v[0]), bf16_low(packed.v[1]),
                                 bf16_high(packed.v[1])};
        finish_index_query(v, frequencies, position);
        store_index_query(v, head);
    } else {
        float v[KV_PER_LANE];
        load_row(head, v);
        norm_row(v, nullptr, eps);
        rope_row(v, frequencies, position, 1.0f);
        store_row(v, head);
    }
}

// `q` and `index_q` are read where other threads wrote them.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) queries(
    const u8* __restrict__ weights, const float* __restrict__ w_scales, bf16* q, u32 n_heads,
    const u8* __restrict__ index_weights, const float* __restrict__ index_scales, bf16* index_q, u32 n_index_heads,
    const bf16* __restrict__ qr, const float* __restrict__ norm, float eps, const float* __restrict__ frequencies,
    const u32* __restrict__ positions, u32* ended, u32 k, u32 n_tokens, u32 on_grid) {
    QueriesShared& s = shared<QueriesShared>();
    const bool is_index = blockIdx.x >= n_heads * (HEAD_DIM / BLOCK_ROWS);
    const u32 block = is_index ? blockIdx.x - n_heads * (HEAD_DIM / BLOCK_ROWS) : blockIdx.x;
    const u32 head_dim = is_index ? INDEX_DIM : HEAD_DIM, per_head = head_dim / BLOCK_ROWS, head = block / per_head;
    const u32 n_rows = is_index ? n_index_heads * INDEX_DIM : n_heads * HEAD_DIM, first_row = block * BLOCK_ROWS;
    const Weights w = {is_index ? index_weights : weights, is_index ? index_scales : w_scales, nullptr, n_rows, k};
    bf16* out = is_index ? index_q : q;
    const u32 tile = warp_id() % ROW_TILES;
    dependency_trigger();
    prefetch_rows<Format::Fp8>(w, first_row + tile * TILE_ROWS);
    if (threadIdx.x == 0) prefetch(norm, k * 4);
    dependency_wait();
    qr = after_wait(qr), positions = after_wait(positions);
    gemm_resident<Format::Fp8>(s.product, w, first_row + tile * TILE_ROWS, n_tokens, [&](bf16* to) {
        fill_normed(s, to, qr, k, n_tokens, norm, eps, on_grid);
    });
    for (u32 i = threadIdx.x; i < n_tokens * BLOCK_ROWS; i += GEMM_THREADS) {
        const u32 row = i % BLOCK_ROWS, token = i / BLOCK_ROWS;
        const float sum = gemm_sum(s.product, row / TILE_ROWS, row % TILE_ROWS, token);
        out[static_cast<u64>(token) * n_rows + first_row + row] = bf16_from_f32(sum);
    }
    block_sync();
    if (threadIdx.x == 0) {
        u32* count = ended + (is_index ? n_heads : 0) + head;
        const bool is_last = atomic_add_ordered(count, 1) == per_head - 1;
        if (is_last) *count = 0;
        s.is_last = is_last;
    }
    block_sync();
    const u32 token = warp_id();
    if (!s.is_last || token >= n_tokens) return;
    finish(out + static_cast<u64>(token) * n_rows + head * head_dim, is_index, frequencies, positions[token], eps);
}
EMU_KERNEL(queries)
