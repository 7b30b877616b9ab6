// check_scaled_fp4, check_scaled_fp8, check_bf16: tensor memory and its products (`ptx_tensor100.cuh`), on whatever
// is given.
//
// Not operators, as those of `wrappers.cu`. Operands of scaled products lie as `pipeline100.cuh` leaves them. The
// products along K, of 128 values, are done twice: the second time they overwrite the first or add to it. Those of
// bf16 have 64 values of K and write to cells or add to what threads stored there.
//
// Inputs   in u32, per block, scaled: [4096] A, E2M1 or E4M3, and [4096] B, E4M3, as they lie in shared memory; [128]
//          scales of A, [128] of B; n, the columns of B; whether the second pass adds
//          bf16: [128][32] A, [8192] B as it lies in shared memory, `Bf16Shape`
// Outputs  out, scaled: [blocks][128][128] f32, n columns of each row
//          bf16: [blocks][128][256] f32, all lanes of 256 columns, which held (7 lane + column) % 64
// Launch   any grid of 128 threads; 34 KB of shared memory, bf16: 50 KB.
// Arch     sm_100f.
// CPU twin `wrappers` of the device check.

#include "../include/swizzle100.cuh"

constexpr u32 ROWS = 128, STEPS = 4, MATRIX = ROWS * 32, SCALES = 128, IN_WORDS = 2 * MATRIX + 2 * SCALES + 2;
// Columns of tensor memory: sums, then both scales.
constexpr u32 A_SCALES = 128, B_SCALES = 132, COLUMNS = 256;

struct Operands {
    alignas(1024) u32 a[MATRIX];
    alignas(1024) u32 b[MATRIX];
    alignas(128) u32 a_scales[SCALES];
    alignas(128) u32 b_scales[SCALES];
    u64 done;
    u32 sums;
};

template <bool IsFp4>
INLINE void scaled_products(const u32* in, u32* out) {
    Operands& s = shared<Operands>();
    const u32 t = threadIdx.x;
    in += blockIdx.x * IN_WORDS;
    const u32 n = in[IN_WORDS - 2], adds = in[IN_WORDS - 1];
    if (t == 0) mbarrier_init(&s.done, 1), fence_mbarrier_init();
    for (u32 i = t; i < MATRIX; i += ROWS) s.a[i] = in[i], s.b[i] = in[MATRIX + i];
    s.a_scales[t] = in[2 * MATRIX + t], s.b_scales[t] = in[2 * MATRIX + SCALES + t];
    fence_proxy_async();
    if (warp_id() == 0) tmem_alloc<COLUMNS>(&s.sums);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
    const u32 sums = s.sums, kind = scaled_kind<IsFp4>(n);
    if (warp_id() == 1 && elect()) {
        tmem_copy_scales(sums + A_SCALES, matrix_rows16(s.a_scales));
        tmem_copy_scales(sums + B_SCALES, matrix_rows16(s.b_scales));
        const u64 a = tensor_matrix(s.a), b = tensor_matrix(s.b);
        for (u32 pass = 0; pass < 2; ++pass) {
            UNROLL
            for (u32 step = 0; step < STEPS; ++step)
                mma_scaled(sums, a + 2 * step, b + 2 * step, kind + step * SCALE_BYTE, sums + A_SCALES, sums + B_SCALES,
                           pass * adds + step > 0);
        }
        tmem_commit(&s.done);
    }
    warp_sync();
    mbarrier_wait(&s.done, 0);
    tmem_fence_after();
    warp_sync();
    for (u32 column = 0; column < n; column += 8) {
        float d[8];
        tmem_load(d, sums + (warp_id() * WARP << 16) + column);
        tmem_load_wait(d);
        UNROLL
        for (u32 i = 0; i < 8; ++i) out[(blockIdx.x * ROWS + t) * ROWS + column + i] = float_bits(d[i]);
    }
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
    if (warp_id() == 0) tmem_dealloc<COLUMNS>(sums);
}

extern "C" __global__ void __launch_bounds__(128) check_scaled_fp4(const u32* __restrict__ in, u32* __restrict__ out) {
    scaled_products<true>(in, out);
}
EMU_KERNEL(check_scaled_fp4)
extern "C" __global__ void __launch_bounds__(128) check_scaled_fp8(const u32* __restrict__ in, u32* __restrict__ out) {
    scaled_products<false>(in, out);
}
EMU_KERNEL(check_scaled_fp8)

// Rows of A, columns of B, first lane of d, whether A lies in shared memory, whether B's columns lie side by side,
// whether the products add.
struct Bf16Shape {
    u32 m, n, lane, a_is_shared, b_is_mn, adds;
};
constexpr u32 A_WORDS = ROWS * 32, B_WORDS = 256 * 32, BF16_WORDS = A_WORDS + B_WORDS + 6, A_COLUMN = 256;

struct Bf16Operands {
    alignas(1024) u8 a[A_WORDS * 4];
    alignas(1024) u32 b[B_WORDS];
    u64 done;
    u32 memory;
};

// Lane and column of register i of a tile of this thread, from lane `first` of its warp and `column` on.
INLINE u32 lane_of(u32 first, u32 i) { return warp_id() * WARP + first + lane_id() / 4 + i / 2 % 2 * 8; }
INLINE u32 column_of(u32 column, u32 i) { return column + i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }

extern "C" __global__ void __launch_bounds__(128) check_bf16(const u32* __restrict__ in, u32* __restrict__ out) {
    Bf16Operands& s = shared<Bf16Operands>();
    const u32 t = threadIdx.x;
    in += blockIdx.x * BF16_WORDS;
    const u32* given = in + A_WORDS + B_WORDS;
    const Bf16Shape shape = {given[0], given[1], given[2], given[3], given[4], given[5]};
    if (t == 0) mbarrier_init(&s.done, 1), fence_mbarrier_init();
    for (u32 i = t; i < A_WORDS; i += ROWS) *reinterpret_cast<u32*>(&s.a[swizzled(i / 32, i % 32 * 4)]) = in[i];
    for (u32 i = t; i < B_WORDS; i += ROWS) s.b[i] = in[A_WORDS + i];
    fence_proxy_async();
    if (warp_id() == 0) tmem_alloc<512>(&s.memory);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
    const u32 d = s.memory;
    for (u32 first = 0; first < WARP; first += 16) {
        const u32 lanes = (warp_id() * WARP + first) << 16;
        u32 tile[32];
        for (u32 column = 0; column < 256; column += 64) {
            UNROLL
            for (u32 i = 0; i < 32; ++i)
                tile[i] = float_bits(static_cast<float>((7 * lane_of(first, i) + column_of(column, i)) % 64));
            tmem_store_tile(d + lanes + column, tile);
        }
        if (shape.m == 64 && first != 0) continue;
        // A row's 32 pairs, twice.
        UNROLL
        for (u32 i = 0; i < 32; ++i) {
            const u32 lane = lane_of(first, i), row = shape.m == 64 ? lane / 32 * 16 + lane % 16 : lane;
            tile[i] = in[row * 32 + column_of(0, i) % 32];
        }
        tmem_store_tile(d + lanes + A_COLUMN, tile);
    }
    tmem_store_wait();
    tmem_fence_before();
    block_sync();
    if (warp_id() == 1 && elect()) {
        tmem_fence_after();
        const u32 sums = d + (shape.lane << 16);
        const u32 kind = shape.b_is_mn ? bf16_kind<true>(shape.m, shape.n) : bf16_kind<false>(shape.m, shape.n);
        const u64 a = tensor_matrix(s.a), b = shape.b_is_mn ? tensor_matrix_mn(s.b, 64 * SWIZZLE_ROW) : tensor_matrix(s.b);
        for (u32 step = 0; step < STEPS; ++step) {
            const u64 at = b + (shape.b_is_mn ? 128 : 2) * step;
            if (shape.a_is_shared) mma_bf16_shared(sums, a + 2 * step, at, kind, shape.adds + step > 0);
            else mma_bf16(sums, d + A_COLUMN + 8 * step, at, kind, shape.adds + step > 0);
        }
        tmem_commit(&s.done);
    }
    warp_sync();
    mbarrier_wait(&s.done, 0);
    tmem_fence_after();
    warp_sync();
    for (u32 first = 0; first < WARP; first += 16)
        for (u32 column = 0; column < 256; column += 64) {
            float tile[32];
            tmem_load_tile(tile, d + ((warp_id() * WARP + first) << 16) + column);
            tmem_load_wait(tile);
            UNROLL
            for (u32 i = 0; i < 32; ++i)
                out[(blockIdx.x * ROWS + lane_of(first, i)) * 256 + column_of(column, i)] = float_bits(tile[i]);
        }
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
    if (warp_id() == 0) tmem_dealloc<512>(d);
}
EMU_KERNEL(check_bf16)
