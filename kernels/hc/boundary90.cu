// hc_boundary, hc_begin: between two sublayers, for few tokens: what one leaves goes into the copies, and the
// normalised input of the next comes out of them; `hc_post_mix` and `hc_pre` in one launch. hc_begin: there
// was no sublayer; `hc_mix` and `hc_pre`.
//
// Source   `Block.hc_post`, `Block.hc_pre`, `hc_split_sinkhorn`, `RMSNorm`, `act_quant`.
// Inputs   x, fn (24 rows), y, parts, order, top_k, post, comb as of `hc_post_mix`; base, scale, weight as of `hc_pre`
// Outputs  x_out of `hc_post_mix`; normed, quantised, next_post, next_comb: those of `hc_pre`. Equal bits.
// Launch   grid (16, ceil(n_tokens / 8)), clusters of 16: a block has a group of slices (`include/hc.cuh`), so a sixteenth
//          of the channels of eight tokens. 128 threads per slice, which keep the copies in registers, and a warp that
//          fetches weights and runs Sinkhorn for the token that has the block's number. Width is a multiple of
//          8, at most 8,192. Shared memory: BoundaryShared, then for each slice 4 x 24 rows of fn and the norm's weights.
//          Sums of all blocks meet twice, through distributed shared memory: the products with fn, and the
//          squares of the input. May start before the launch before it has ended: weights come first.
// Limit    fn (98 KB a block for Flash), which is on its way before the copies are there; then latency.
// Arch     sm_90a, sm_100f. 16 blocks are more than every GPU runs in a cluster (`Device::has_room_for`).
// CPU twin as of `hc_post_mix` and `hc_pre`.

#include "../include/hc.cuh"

constexpr u32 TOKENS = 8, MAX_SLICES = 4, MAX_WARPS = MAX_SLICES * SLICE_WARPS, FN_ROWS = HC * MIX;
// Rows of fn 16 bytes from a multiple of all banks apart: eight lanes that load 16 bytes meet no bank twice.
constexpr u32 FN_STRIDE = SLICE + 4;

struct alignas(16) BoundaryShared {
    float gathered[GROUPS][TOKENS][MIX + 1], squares[GROUPS][TOKENS]; // of all blocks
    float sums[MAX_WARPS][TOKENS][MIX + 1];
    float warp_squares[MAX_WARPS][TOKENS], warp_max[MAX_WARPS][TOKENS];
    float pre[TOKENS][HC];
    float base[MIX], scale[3];
    u64 full;
};
struct SliceWeights {
    alignas(16) float fn[HC][MIX][FN_STRIDE];
    float norm[SLICE];
};

// What a launch is given, beside weights.
struct Boundary {
    const bf16* x;
    Output output;
    const float *post, *comb;
    bf16 *x_out, *normed, *quantised;
    float *next_post, *next_comb;
    u32 width, n_tokens, n_iters;
    float hc_eps, mix_eps, norm_eps;
};

// One warp: the block's weights, on their way.
INLINE void fetch_weights(BoundaryShared& s, SliceWeights* slices, const float* fn, const float* weight, u32 first_channel,
                          u32 n_channels, u32 width) {
    const u32 lane = lane_id();
    if (lane == 0) {
        mbarrier_init(&s.full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(&s.full, n_channels * 4 * (FN_ROWS + 1));
    }
    warp_sync();
    for (u32 slice = 0; slice * SLICE < n_channels; ++slice) {
        const u32 channel = first_channel + slice * SLICE, bytes = min_u32(SLICE, n_channels - slice * SLICE) * 4;
        for (u32 row = lane; row < FN_ROWS; row += WARP)
            bulk_load<false>(slices[slice].fn[row % HC][row / HC], fn + static_cast<u64>(row) * width + channel, bytes, &s.full);
        if (lane == 0) bulk_load<false>(slices[slice].norm, weight + channel, bytes, &s.full);
    }
}

// One warp: mixing product number `lane` of a token, in lanes that have one.
INLINE float mix_of(const BoundaryShared& s, u32 token, u32 width, float eps) {
    const u32 lane = lane_id();
    const float sum = lane <= MIX ? sum_of_groups(&s.gathered[0][token][lane], TOKENS * (MIX + 1)) : 0.0f;
    return mul_rn(sum, mix_factor(shfl(sum, MIX), width, eps));
}

template <bool Post>
INLINE void boundary(Boundary b, const float* fn, const float* base, const float* scale, const float* weight) {
    BoundaryShared& s = shared<BoundaryShared>();
    SliceWeights* slices = reinterpret_cast<SliceWeights*>((&s) + 1);
    const u32 t = threadIdx.x, warp = warp_id(), lane = lane_id(), g = lane / 4, quad = lane % 4, rank = cluster_rank();
    const u32 width = b.width, per = slices_per_group(width), n_workers = per * SLICE_WARPS * WARP;
    const u32 first_channel = min_u32(width, rank * per * SLICE), n_channels = min_u32(per * SLICE, width - first_channel);
    const u32 first_token = blockIdx.y * TOKENS, n = min_u32(TOKENS, b.n_tokens - first_token);
    dependency_trigger();
    cluster_arrive(); // nobody may be sent anything before it has begun
    if (t >= n_workers) {
        fetch_weights(s, slices, fn, weight, first_channel, n_channels, width);
        if (lane < MIX) s.base[lane] = base[lane];
        if (lane < 3) s.scale[lane] = scale[lane];
        dependency_wait();
        block_sync();
        cluster_wait();
        cluster_arrive(), cluster_wait(); // sums of all blocks are there
        cluster_arrive();
        if (rank < n) {
            const u64 token = first_token + rank;
            const float mix = mix_of(s, rank, width, b.mix_eps);
            const u32 element = 8 + lane % (HC * HC);
            if (lane >= HC && lane < 2 * HC) b.next_post[token * HC + lane - HC] = post_of(mix, s.scale, s.base, lane);
            const float c = sinkhorn(shfl(mix, element), s.scale[2], s.base[element], b.n_iters, b.hc_eps);
            if (lane < HC * HC) b.next_comb[token * HC * HC + lane] = c;
        }
        warp_sync();
        cluster_wait();
        return;
    }

    const u32 slice = warp / SLICE_WARPS, in_slice = warp % SLICE_WARPS * 32 + 8 * quad;
    const u32 channel = first_channel + slice * SLICE + in_slice;
    const u64 token = first_token + g;
    const bool valid = g < n && slice * SLICE + in_slice < n_channels;
    dependency_wait();
    b.x = after_wait(b.x), b.post = after_wait(b.post), b.comb = after_wait(b.comb);
    b.output.y = after_wait(b.output.y), b.output.parts = after_wait(b.output.parts), b.output.order = after_wait(b.output.order);
    // Token g; there are none for the other rows of the tile.
    u32x4 a[1][HC][2] = {};
    float squares = 0.0f;
    if (valid) {
        float v[HC][8];
        UNROLL
        for (u32 j = 0; j < HC; ++j) load8(b.x + (token * HC + j) * width + channel, v[j]);
        if (Post) {
            float from[8];
            b.output.load(token, width, channel, from);
            add_output(from, b.post + token * HC, b.comb + token * HC * HC, v);
        }
        UNROLL
        for (u32 j = 0; j < HC; ++j) {
            a[0][j][0] = pack8(v[j]);
            if (Post) *reinterpret_cast<u32x4*>(b.x_out + (token * HC + j) * width + channel) = a[0][j][0];
            UNROLL
            for (u32 k = 0; k < 8; ++k) squares = fma_rn(v[j][k], v[j][k], squares);
        }
    }
    block_sync(); // weights are announced
    mbarrier_wait(&s.full, 0);
    float d[1][MIX / 8][4] = {};
    mix_products(a, 1, [&](u32 row, u32 j, u32 step) {
        const bool is_there = slice * SLICE + in_slice < n_channels;
        return is_there ? *reinterpret_cast<const f32x4*>(&slices[slice].fn[j][row][in_slice + 4 * step]) : f32x4{};
    }, d);
    store_sums<MIX>(d[0], 0, squares, s.sums[warp][g]);
    named_sync<1>(n_workers);
    cluster_wait();
    for (u32 i = t; i < n * (MIX + 1); i += n_workers) {
        const u32 of = i / (MIX + 1), column = i % (MIX + 1);
        float group = 0.0f;
        for (u32 w = 0; w < per * SLICE_WARPS; w += SLICE_WARPS) {
            float sum = s.sums[w][of][column];
            UNROLL
            for (u32 k = 1; k < SLICE_WARPS; ++k) sum = add_rn(sum, s.sums[w + k][of][column]);
            group = add_rn(group, sum);
        }
        UNROLL
        for (u32 block = 0; block < GROUPS; ++block) cluster_store(&s.gathered[rank][of][column], block, group);
    }
    warp_sync();
    cluster_arrive(), cluster_wait();
    for (u32 of = warp; of < n; of += per * SLICE_WARPS) {
        const float mix = mix_of(s, of, width, b.mix_eps);
        if (lane < HC) s.pre[of][lane] = pre_of(mix, s.scale, s.base, lane, b.hc_eps);
    }
    named_sync<1>(n_workers);

    float v[8] = {};
    squares = 0.0f;
    if (valid) {
        float copies[HC][8];
        UNROLL
        for (u32 j = 0; j < HC; ++j) unpack8(a[0][j][0], copies[j]);
        collapse(s.pre[g], copies, v, squares);
    }
    squares = add_rn(squares, shfl_xor(squares, 1));
    squares = add_rn(squares, shfl_xor(squares, 2));
    if (quad == 0) s.warp_squares[warp][g] = squares;
    named_sync<1>(n_workers);
    for (u32 i = t; i < n * GROUPS; i += n_workers) {
        const u32 of = i / GROUPS, block = i % GROUPS;
        float group = 0.0f;
        for (u32 w = 0; w < per * SLICE_WARPS; w += SLICE_WARPS) {
            const float first = add_rn(s.warp_squares[w][of], s.warp_squares[w + 1][of]);
            group = add_rn(group, add_rn(first, add_rn(s.warp_squares[w + 2][of], s.warp_squares[w + 3][of])));
        }
        cluster_store(&s.squares[rank][of], block, group);
    }
    warp_sync();
    cluster_arrive(), cluster_wait();

    float amax = 0.0f;
    if (valid) {
        const float x_mean = sum_of_groups(&s.squares[0][g], TOKENS) / static_cast<float>(width);
        const float factor = div_rn(1.0f, sqrt_rn(x_mean + b.norm_eps));
        UNROLL
        for (u32 k = 0; k < 8; ++k) v[k] = mul_rn(mul_rn(v[k], factor), slices[slice].norm[in_slice + k]);
        store8(b.normed + token * width + channel, v);
        round8(v);
        UNROLL
        for (u32 k = 0; k < 8; ++k) amax = max_f32(amax, abs_f32(v[k]));
    }
    amax = group_max<4>(amax);
    if (quad == 0) s.warp_max[warp][g] = amax;
    named_sync<1>(n_workers);
    if (!valid) return;
    UNROLL
    for (u32 k = 0; k < SLICE_WARPS; ++k) amax = max_f32(amax, s.warp_max[slice * SLICE_WARPS + k][g]);
    const u32 grid = fp8_block_scale(amax);
    UNROLL
    for (u32 k = 0; k < 8; ++k) v[k] = on_e4m3_grid(v[k], grid);
    store8(b.quantised + token * width + channel, v);
}

constexpr u32 THREADS = MAX_WARPS * WARP + WARP;

extern "C" __global__ void __cluster_dims__(16) __launch_bounds__(THREADS) hc_boundary(
    const bf16* __restrict__ x, const float* __restrict__ fn, const bf16* __restrict__ y,
    const float* __restrict__ post, const float* __restrict__ comb, bf16* __restrict__ x_out,
    const bf16* __restrict__ parts, const u32* __restrict__ order, u32 top_k, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, float* __restrict__ next_post, float* __restrict__ next_comb, u32 width,
    u32 n_tokens, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    boundary<true>({x, {y, parts, order, top_k}, post, comb, x_out, normed, quantised, next_post, next_comb, width,
                    n_tokens, n_iters, hc_eps, mix_eps, norm_eps},
                   fn, base, scale, weight);
}
EMU_KERNEL(hc_boundary, .cluster = 16)

extern "C" __global__ void __cluster_dims__(16) __launch_bounds__(THREADS) hc_begin(
    const bf16* __restrict__ x, const float* __restrict__ fn, const float* __restrict__ base,
    const float* __restrict__ scale, const float* __restrict__ weight, bf16* __restrict__ normed,
    bf16* __restrict__ quantised, float* __restrict__ next_post, float* __restrict__ next_comb, u32 width,
    u32 n_tokens, u32 n_iters, float hc_eps, float mix_eps, float norm_eps) {
    boundary<false>({x, {}, nullptr, nullptr, nullptr, normed, quantised, next_post, next_comb, width, n_tokens,
                     n_iters, hc_eps, mix_eps, norm_eps},
                    fn, base, scale, weight);
}
EMU_KERNEL(hc_begin, .cluster = 16)
