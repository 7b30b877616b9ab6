// check_scaled_fp4, check_scaled_fp8: tensor memory and block-scaled products (`ptx_tensor100.cuh`), on whatever
// is given.
//
// Not operators, as those of `wrappers.cu`. Operands lie as `pipeline100.cuh` leaves them. The products along K, of
// 128 values, are done twice: the second time they overwrite the first or add to it.
//
// Inputs   in u32, per block: [4096] A, E2M1 or E4M3, and [4096] B, E4M3, as they lie in shared memory; [128]
//          scales of A, [128] of B; n, the columns of B; whether the second pass adds
// Outputs  out [blocks][128][128] f32: n columns of each row
// Launch   any grid of 128 threads, 34 KB of shared memory.
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
