// Device bodies: barriers in shared memory, bulk and tensor copies, clusters, register budgets (sm_90a
// and sm_100f).
//
// Twin: `host90.cuh`. Included by `device.cuh` only.
#pragma once

// A barrier for `count` arrivals per phase. One thread; then `fence_mbarrier_init` by that thread
// and a barrier of the block (of the cluster) before anybody uses it.
INLINE void mbarrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(barrier)), "r"(count) : "memory");
}
INLINE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(smem_u32(barrier)) : "memory");
}
// Arrives and announces `bytes` that copies will bring before the phase is complete.
INLINE void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(barrier)),
                 "r"(bytes)
                 : "memory");
}
// Waits for the end of the phase with this parity; of a new barrier, parity 1 has ended.
INLINE void mbarrier_wait(u64* barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(done)
            : "r"(smem_u32(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// Makes this thread's ordinary stores to shared memory visible to tensor cores and bulk copies.
INLINE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies `bytes` (a multiple of 16, as both addresses are) from global to shared memory and then
// counts them on `barrier`. `Once`: bytes that nobody reads again leave the cache first.
template <bool Once>
INLINE void bulk_load(void* destination, const void* source, u32 bytes, u64* barrier) {
    // The policies of `createpolicy.fractional` for all of a range.
    constexpr u64 EVICT_FIRST = 0x12f0000000000000ull, EVICT_NORMAL = 0x1000000000000000ull;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(smem_u32(destination)),
        "l"(source), "r"(bytes), "r"(smem_u32(barrier)), "l"(Once ? EVICT_FIRST : EVICT_NORMAL)
        : "memory");
}

// Copies a box of the tensor that `map` describes to shared memory (at a multiple of 128; of 1,024
// with 128-byte swizzle) and then counts the box's bytes on `barrier`, outside of the tensor too:
// there zeros arrive. `at`: the box's first element, innermost dimension first.
template <bool Once, int Rank>
INLINE void tensor_load(void* destination, const TensorMap& map, const u32 (&at)[Rank], u64* barrier) {
    constexpr u64 EVICT_FIRST = 0x12f0000000000000ull, EVICT_NORMAL = 0x1000000000000000ull;
    const u32 to = smem_u32(destination), counts = smem_u32(barrier);
    const u64 policy = Once ? EVICT_FIRST : EVICT_NORMAL;
    static_assert(Rank == 2 || Rank == 3 || Rank == 5, "add this rank to the list");
#define TENSOR_LOAD(rank, place, ...)                                                                     \
    asm volatile("cp.async.bulk.tensor." rank ".shared::cluster.global.tile.mbarrier::complete_tx::bytes" \
                 ".L2::cache_hint [%0], [%1, " place "], [%2], %3;" ::"r"(to),                            \
                 "l"(&map), "r"(counts), "l"(policy), __VA_ARGS__                                         \
                 : "memory")
    if constexpr (Rank == 2) TENSOR_LOAD("2d", "{%4, %5}", "r"(at[0]), "r"(at[1]));
    else if constexpr (Rank == 3) TENSOR_LOAD("3d", "{%4, %5, %6}", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    else TENSOR_LOAD("5d", "{%4, %5, %6, %7, %8}", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef TENSOR_LOAD
}

INLINE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The two halves of a barrier of all threads of the cluster; each warp as a whole.
INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Stores to the place that corresponds to `p` in the shared memory of block `rank`.
INLINE void cluster_store(u32* p, u32 rank, u32 x) {
    asm volatile(
        "{\n"
        ".reg .u32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.u32 [remote], %2;\n"
        "}" ::"r"(smem_u32(p)),
        "r"(rank), "r"(x)
        : "memory");
}
INLINE void cluster_store(float* p, u32 rank, float x) {
    cluster_store(reinterpret_cast<u32*>(p), rank, float_bits(x));
}

// One lane of the warp, always the same.
INLINE bool elect() {
    u32 chosen;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(chosen));
    return chosen != 0;
}

// Registers of each thread of this warpgroup from here on.
template <int N>
INLINE void give_up_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
INLINE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Two floats to E4M3 codes, nearest even, saturating; `low` goes to the low byte.
INLINE u32 pack_e4m3x2(float low, float high) {
    unsigned short out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
}
