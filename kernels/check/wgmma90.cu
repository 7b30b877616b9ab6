// check_wgmma_*: every product of a warpgroup that `ptx_wgmma90.cuh` has, on whatever is given.
//
// Not operators, as those of `wrappers.cu`. Four products follow each other along K, of 128 bytes.
//
// Inputs   in u32, per block: [2048] A, as it lies in shared memory or as the registers of each thread,
//          [thread][step][4]; [32 N] B as it lies in shared memory; [thread][N / 2] f32 D before; whether to add to it
// Outputs  out [blocks][thread][N / 2] f32: D
// Launch   any grid of 128 threads; 8 KB of shared memory and N * 128 bytes.
// Arch     sm_90a.
// CPU twin `wrappers` of the device check.

#include "../include/swizzle.cuh"

constexpr u32 THREADS = 128, STEPS = 4, A_WORDS = 2048;

template <u32 N>
struct Operands {
    alignas(1024) u32 a[A_WORDS];
    alignas(1024) u32 b[32 * N];
};

enum class Form { E4m3, E4m3Shared, Bf16, Bf16Shared, Bf16Mn };

template <Form F, u32 N>
INLINE void products(const u32* in, u32* out) {
    Operands<N>& s = shared<Operands<N>>();
    const u32 t = threadIdx.x;
    in += blockIdx.x * (A_WORDS + 96 * N + 1);
    for (u32 i = t; i < A_WORDS; i += THREADS) s.a[i] = in[i];
    for (u32 i = t; i < 32 * N; i += THREADS) s.b[i] = in[A_WORDS + i];
    u32 a[STEPS][4];
    UNROLL
    for (u32 i = 0; i < 4 * STEPS; ++i) a[i / 4][i % 4] = in[t * 4 * STEPS + i];
    float d[N / 2];
    UNROLL
    for (u32 i = 0; i < N / 2; ++i) d[i] = bits_float(in[A_WORDS + 32 * N + t * (N / 2) + i]);
    const bool adds = in[A_WORDS + 96 * N] != 0;
    fence_proxy_async();
    block_sync();
    const u64 left = matrix_k_major(s.a);
    const u64 right = F == Form::Bf16Mn ? matrix_mn_major(s.b, 64 * SWIZZLE_ROW) : matrix_k_major(s.b);
    wgmma_fence();
    UNROLL
    for (u32 step = 0; step < STEPS; ++step) {
        const bool accumulate = adds || step > 0;
        if constexpr (F == Form::E4m3) wgmma_e4m3<N>(d, a[step], right + 2 * step, accumulate);
        else if constexpr (F == Form::E4m3Shared) wgmma_e4m3_shared<N>(d, left + 2 * step, right + 2 * step, accumulate);
        else if constexpr (F == Form::Bf16) wgmma_bf16<N>(d, a[step], right + 2 * step, accumulate);
        else if constexpr (F == Form::Bf16Shared) wgmma_bf16_shared<N>(d, left + 2 * step, right + 2 * step, accumulate);
        else wgmma_bf16_mn<N>(d, a[step], right + 128 * step, accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    UNROLL
    for (u32 i = 0; i < N / 2; ++i) out[(blockIdx.x * THREADS + t) * (N / 2) + i] = float_bits(d[i]);
}

#define PRODUCTS(name, form, n)                                                                     \
    extern "C" __global__ void __launch_bounds__(128) name(const u32* __restrict__ in, u32* __restrict__ out) { \
        products<Form::form, n>(in, out);                                                           \
    }                                                                                               \
    EMU_KERNEL(name)
PRODUCTS(check_wgmma_e4m3_8, E4m3, 8)
PRODUCTS(check_wgmma_e4m3_32, E4m3, 32)
PRODUCTS(check_wgmma_e4m3_64, E4m3, 64)
PRODUCTS(check_wgmma_e4m3_128, E4m3, 128)
PRODUCTS(check_wgmma_e4m3_shared_8, E4m3Shared, 8)
PRODUCTS(check_wgmma_e4m3_shared_64, E4m3Shared, 64)
PRODUCTS(check_wgmma_e4m3_shared_128, E4m3Shared, 128)
PRODUCTS(check_wgmma_bf16_8, Bf16, 8)
PRODUCTS(check_wgmma_bf16_64, Bf16, 64)
PRODUCTS(check_wgmma_bf16_128, Bf16, 128)
PRODUCTS(check_wgmma_bf16_shared_8, Bf16Shared, 8)
PRODUCTS(check_wgmma_bf16_shared_64, Bf16Shared, 64)
PRODUCTS(check_wgmma_bf16_shared_128, Bf16Shared, 128)
PRODUCTS(check_wgmma_bf16_mn_256, Bf16Mn, 256)
