// The warp-specialised pipeline of sm_90a with one planted error each: what the detectors of
// asynchronous work must find. `planted90_sound` is the same without an error.
//
// All take `a [4][64][128] u8` and `b [4][8][128] u8` (E4M3, rows swizzled) and write
// `out [64][8] f32`, the sum over the four blocks of `a b^T`. 256 threads: warp 0 copies `a`, warp 1
// stores `b` itself, the second warpgroup multiplies. Emulator only; never compiled for a GPU.

#include "../include/swizzle.cuh"

constexpr u32 BLOCKS = 4, SLOTS = 2, A_BYTES = 64 * 128, B_BYTES = 8 * 128;

struct Slots {
    alignas(1024) u8 a[SLOTS][A_BYTES];
    alignas(1024) u8 b[SLOTS][B_BYTES];
    u64 full[SLOTS], empty[SLOTS];
};

enum class Error {
    None,
    NoFullWait,      // multiplies without waiting for the copy
    NoEmptyWait,     // copies into a slot that is being read
    TooFewBytes,     // announces less than it copies
    TooManyBytes,
    EarlyRelease,    // gives the slot back before the product is done
    NoProxyFence,    // stores without fence_proxy_async
    NoWgmmaFence,
    NoProductWait,   // reads the accumulators at once
    NoInitFence,     // copies count on a barrier whose initialisation is not visible to them
    NoInitBarrier,   // a barrier is used by others than who made it, unordered
    DoubleArrival,
};

template <Error E>
INLINE void pipeline90(const u8* a, const u8* b, float* out) {
    Slots& s = shared<Slots>();
    const u32 t = threadIdx.x, warp = warp_id(), lane = lane_id();
    if (t == 0) {
        for (u32 i = 0; i < SLOTS; ++i) mbarrier_init(&s.full[i], 2), mbarrier_init(&s.empty[i], 4);
        if (E != Error::NoInitFence) fence_mbarrier_init();
    }
    if (E != Error::NoInitBarrier) block_sync();
    if (warp < 4) {
        give_up_registers<40>();
        if (warp > 1) return;
        for (u32 i = 0; i < BLOCKS; ++i) {
            const u32 slot = i % SLOTS, parity = i / SLOTS & 1;
            if (E != Error::NoEmptyWait) mbarrier_wait(&s.empty[slot], parity ^ 1);
            if (warp == 0) {
                if (!elect()) continue;
                const u32 wrong = E == Error::TooFewBytes ? -16u : E == Error::TooManyBytes ? 16 : 0;
                mbarrier_arrive_expect(&s.full[slot], A_BYTES + wrong);
                bulk_load<true>(s.a[slot], a + i * A_BYTES, A_BYTES, &s.full[slot]);
            } else {
                for (u32 at = lane * 16; at < B_BYTES; at += 512)
                    *reinterpret_cast<u32x4*>(&s.b[slot][at]) =
                        *reinterpret_cast<const u32x4*>(b + i * B_BYTES + at);
                if (E != Error::NoProxyFence) fence_proxy_async();
                warp_sync();
                if (lane == 0) mbarrier_arrive(&s.full[slot]);
            }
        }
        return;
    }
    take_registers<232>();
    float d[4] = {};
    for (u32 i = 0; i < BLOCKS; ++i) {
        const u32 slot = i % SLOTS, parity = i / SLOTS & 1;
        if (E != Error::NoFullWait) mbarrier_wait(&s.full[slot], parity);
        if (E != Error::NoWgmmaFence) wgmma_fence();
        for (u32 k = 0; k < 4; ++k)
            wgmma_e4m3_shared<8>(d, matrix_k_major(s.a[slot]) + 2 * k, matrix_k_major(s.b[slot]) + 2 * k, i + k > 0);
        wgmma_commit();
        if (E == Error::EarlyRelease && lane == 0) mbarrier_arrive(&s.empty[slot]);
        if (E == Error::EarlyRelease) named_sync<1>(128);
        if (E == Error::NoProductWait) out[t % 128 * 4] = d[0];
        wgmma_wait<0>(d);
        warp_sync();
        if (E != Error::EarlyRelease && lane == 0) mbarrier_arrive(&s.empty[slot]);
        if (E == Error::DoubleArrival && lane == 0) mbarrier_arrive(&s.empty[slot]);
    }
    for (u32 r = 0; r < 4; ++r) {
        const u32 row = (warp - 4) * 16 + lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        if (E != Error::NoProductWait) out[row * 8 + column] = d[r];
    }
}

#define PLANTED(name, error)                                                                    \
    extern "C" __global__ void name(const u8* a, const u8* b, float* out) {                     \
        pipeline90<Error::error>(a, b, out);                                                    \
    }                                                                                           \
    EMU_KERNEL(name)
PLANTED(planted90_sound, None)
PLANTED(planted90_no_full_wait, NoFullWait)
PLANTED(planted90_no_empty_wait, NoEmptyWait)
PLANTED(planted90_too_few_bytes, TooFewBytes)
PLANTED(planted90_too_many_bytes, TooManyBytes)
PLANTED(planted90_early_release, EarlyRelease)
PLANTED(planted90_no_proxy_fence, NoProxyFence)
PLANTED(planted90_no_wgmma_fence, NoWgmmaFence)
PLANTED(planted90_no_product_wait, NoProductWait)
PLANTED(planted90_no_init_fence, NoInitFence)
PLANTED(planted90_no_init_barrier, NoInitBarrier)
PLANTED(planted90_double_arrival, DoubleArrival)

// Blocks of a cluster of four: each sends its number to the next. Without the first barrier the
// other may not have begun, without the second the value may not be there.
template <bool First, bool Second>
INLINE void ring(float* out) {
    float* got = &shared<float>();
    const u32 rank = cluster_rank();
    if (First) cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) cluster_store(got, (rank + 1) % 4, static_cast<float>(rank));
    cluster_arrive();
    if (Second) cluster_wait();
    if (threadIdx.x == 0) out[blockIdx.x] = *got;
}
extern "C" __global__ void __cluster_dims__(4) planted90_ring(const u8*, const u8*, float* out) { ring<true, true>(out); }
EMU_KERNEL(planted90_ring, .cluster = 4)
extern "C" __global__ void __cluster_dims__(4) planted90_ring_unread(const u8*, const u8*, float* out) {
    ring<true, false>(out);
}
EMU_KERNEL(planted90_ring_unread, .cluster = 4)
// The receiver may have ended.
extern "C" __global__ void __cluster_dims__(4) planted90_ring_ended(const u8*, const u8*, float*) {
    float* got = &shared<float>();
    if (cluster_rank() == 1) return;
    cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) cluster_store(got, 1, 1.0f);
}
EMU_KERNEL(planted90_ring_ended, .cluster = 4)

extern "C" __global__ void planted90_too_many_registers(const u8*, const u8*, float*) { take_registers<256>(); }
EMU_KERNEL(planted90_too_many_registers)

// May start early, and err: read or write what launches before may still use, end without having waited,
// write weights. The last one is sound.
extern "C" __global__ void planted90_early_load(const u8*, const u8*, float* out) {
    const float x = out[threadIdx.x];
    dependency_wait();
    out[threadIdx.x] = x;
}
EMU_KERNEL(planted90_early_load, .dependent = true)
extern "C" __global__ void planted90_early_store(const u8*, const u8*, float* out) { out[threadIdx.x] = 0.0f; }
EMU_KERNEL(planted90_early_store, .dependent = true)
extern "C" __global__ void planted90_early_prefetch(const u8*, const u8* b, float*) {
    prefetch(b, 512);
    dependency_wait();
}
EMU_KERNEL(planted90_early_prefetch, .dependent = true)
// Copies land after the wait; they read before it all the same.
extern "C" __global__ void planted90_early_copy(const u8*, const u8* b, float*) {
    u8* to = shared<Slots>().b[0] + 16 * threadIdx.x;
    if (threadIdx.x < WARP) cp_async16(to, b + 16 * threadIdx.x, true);
    cp_async_commit();
    dependency_wait();
    cp_async_wait<0>();
}
EMU_KERNEL(planted90_early_copy, .dependent = true)
extern "C" __global__ void planted90_early_bulk_copy(const u8*, const u8* b, float*) {
    Slots& s = shared<Slots>();
    if (threadIdx.x == 0) {
        mbarrier_init(&s.full[0], 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(&s.full[0], B_BYTES);
        bulk_load<true>(s.b[0], b, B_BYTES, &s.full[0]);
    }
    block_sync();
    dependency_wait();
    mbarrier_wait(&s.full[0], 0);
}
EMU_KERNEL(planted90_early_bulk_copy, .dependent = true)
extern "C" __global__ void planted90_unawaited(const u8*, const u8*, float* out) {
    if (blockIdx.x == 1) return;
    dependency_wait();
    if (threadIdx.x == 0) out[blockIdx.x] = 0.0f;
}
EMU_KERNEL(planted90_unawaited, .dependent = true)
extern "C" __global__ void planted90_stored_weight(u8* a, const u8*, float*) {
    dependency_wait();
    if (threadIdx.x == 0) a[blockIdx.x] = 0;
}
EMU_KERNEL(planted90_stored_weight, .dependent = true)
extern "C" __global__ void planted90_dependent(const u8* a, const u8*, float* out) {
    const float x = a[threadIdx.x];
    dependency_wait();
    out[threadIdx.x] += x;
}
EMU_KERNEL(planted90_dependent, .dependent = true)

// One misuse each, in a line or some: of barriers in shared memory and of copies, by thread 0; of clusters, of
// registers and of products, by all. `s.full[0]` is a barrier for one arrival.
#define MISUSE(name, options, ...)                                                                                     \
    extern "C" __global__ void name(const u8*, [[maybe_unused]] const u8* b, [[maybe_unused]] float* out) {            \
        [[maybe_unused]] Slots& s = shared<Slots>();                                                                   \
        [[maybe_unused]] const u32 t = threadIdx.x;                                                                    \
        __VA_ARGS__;                                                                                                   \
    }                                                                                                                  \
    EMU_KERNEL(name, options)
#define MISUSE_BARRIER(name, ...)                                                                                      \
    MISUSE(name, , if (t == 0) mbarrier_init(&s.full[0], 1), fence_mbarrier_init(); block_sync(); if (t == 0) { __VA_ARGS__; })

MISUSE_BARRIER(planted90_misaligned_barrier, mbarrier_arrive(reinterpret_cast<u64*>(reinterpret_cast<u8*>(&s.full[0]) + 4)))
MISUSE_BARRIER(planted90_made_twice, mbarrier_init(&s.full[0], 1))
MISUSE_BARRIER(planted90_made_for_nobody, mbarrier_init(&s.full[1], 0))
MISUSE_BARRIER(planted90_not_made, mbarrier_arrive(&s.full[1]))
MISUSE_BARRIER(planted90_one_more, mbarrier_arrive_expect(&s.full[0], 16); mbarrier_arrive(&s.full[0]))
MISUSE_BARRIER(planted90_misaligned_bulk_copy, bulk_load<true>(s.b[0] + 8, b, 16, &s.full[0]))
MISUSE_BARRIER(planted90_bulk_copy_in_flight, mbarrier_arrive_expect(&s.full[0], 16); bulk_load<true>(s.b[0], b, 16, &s.full[0]))
MISUSE_BARRIER(planted90_copy_over_store, s.b[0][5] = 0; bulk_load<true>(s.b[0], b, 16, &s.full[0]))
// At once the bytes are there, and nobody may know it.
MISUSE_BARRIER(planted90_unawaited_copy, mbarrier_arrive_expect(&s.full[0], 16); bulk_load<true>(s.b[0], b, 16, &s.full[0]);
               out[0] = s.b[0][0])
// One phase more while somebody has not seen the last one.
MISUSE(planted90_two_phases, , if (t == 0) mbarrier_init(&s.full[0], 1); block_sync();
       if (t == 32) mbarrier_wait(&s.full[0], 0);
       for (u32 i = 0; t >= 64 && i < 8; ++i) warp_sync(); // behind the one that waits
       if (t == 64) mbarrier_arrive(&s.full[0]), mbarrier_arrive(&s.full[0]))
MISUSE(planted90_misaligned_prefetch, , prefetch(b, 24))

MISUSE(planted90_others_memory, .cluster = 4, s.b[0][t] = 0; if (cluster_rank() == 1) (&s.b[0][t])[-256 * 1024] = 0)
MISUSE(planted90_no_such_block, .cluster = 4, cluster_store(&shared<u32>(), 4, 0))
MISUSE(planted90_two_arrivals, .cluster = 4, cluster_arrive(); cluster_arrive())
MISUSE(planted90_no_arrival, .cluster = 4, cluster_wait())

MISUSE(planted90_too_few_registers, , give_up_registers<16>())
MISUSE(planted90_unequal_registers, , if (warp_id() == 0) give_up_registers<40>(); else take_registers<64>())

MISUSE(planted90_divergent_group, , if (warp_id() % 2) wgmma_fence(); else wgmma_commit())
// `matrix`: of B, whose rows are zeros; of A are registers.
#define MISUSE_PRODUCT(name, matrix, ...)                                                                              \
    MISUSE(name, , for (u32 i = t; i < B_BYTES; i += blockDim.x) s.b[0][i] = 0; fence_proxy_async(); block_sync();     \
           u32 a[4] = {}; float d[4] = {}; wgmma_fence(); wgmma_e4m3<8>(d, a, matrix, false); __VA_ARGS__)
MISUSE_PRODUCT(planted90_changed_registers, matrix_k_major(s.b[0]), wgmma_commit(); a[1] = 1; wgmma_wait<0>(d))
MISUSE_PRODUCT(planted90_product_in_flight, matrix_k_major(s.b[0]), wgmma_commit())
MISUSE_PRODUCT(planted90_disagreement, matrix_k_major(s.b[0]) + (t == 5 ? 2 : 0))
MISUSE_PRODUCT(planted90_unwritten_product, matrix_k_major(s.b[1]), wgmma_commit(); wgmma_wait<0>(d))
MISUSE_PRODUCT(planted90_no_swizzle, matrix_k_major(s.b[0]) & ~(3ull << 62), wgmma_commit(); wgmma_wait<0>(d))
MISUSE_PRODUCT(planted90_base_offset, matrix_k_major(s.b[0]) | 1ull << 49, wgmma_commit(); wgmma_wait<0>(d))
