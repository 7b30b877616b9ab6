// Host bodies of `ptx_async90.cuh` and `ptx_wgmma90.cuh`, for the emulator.
//
// Included by `host.cuh` only.
#pragma once

INLINE void mbarrier_init(u64* barrier, u32 count) { emu::mbarrier_init(reinterpret_cast<uint64_t*>(barrier), count); }
INLINE void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
INLINE void mbarrier_arrive(u64* barrier) { emu::mbarrier_arrive(reinterpret_cast<uint64_t*>(barrier), 0); }
INLINE void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
    emu::mbarrier_arrive(reinterpret_cast<uint64_t*>(barrier), bytes);
}
INLINE void mbarrier_wait(u64* barrier, u32 parity) {
    emu::mbarrier_wait(reinterpret_cast<uint64_t*>(barrier), parity);
}
INLINE void fence_proxy_async() { emu::fence_proxy_async(); }

template <bool Once>
INLINE void bulk_load(void* destination, const void* source, u32 bytes, u64* barrier) {
    emu::bulk_load(destination, source, bytes, reinterpret_cast<uint64_t*>(barrier));
}

template <bool Once, int Rank>
INLINE void tensor_load(void* destination, const TensorMap& map, const u32 (&at)[Rank], u64* barrier) {
    emu::tensor_load(destination, &map, Rank, at, reinterpret_cast<uint64_t*>(barrier));
}

INLINE u32 cluster_rank() { return emu::current->rank; }
INLINE void cluster_arrive() { emu::cluster_arrive(); }
INLINE void cluster_wait() { emu::cluster_wait(); }
INLINE void cluster_store(u32* p, u32 rank, u32 x) {
    emu::cluster_store((emu::shared_address(p) & 0xffffffu) | rank << 24, x);
}
INLINE void cluster_store(float* p, u32 rank, float x) {
    cluster_store(reinterpret_cast<u32*>(p), rank, float_bits(x));
}

INLINE bool elect() { return emu::elect(); }
template <int N>
INLINE void give_up_registers() {
    emu::set_registers(N);
}
template <int N>
INLINE void take_registers() {
    emu::set_registers(N);
}

INLINE u32 pack_e4m3x2(float low, float high) { return emu::e4m3_pair(low, high); }

INLINE void wgmma_fence() { emu::wgmma_fence(); }
INLINE void wgmma_commit() { emu::wgmma_commit(); }
template <int Pending, int R>
INLINE void wgmma_wait(float (&)[R]) {
    emu::wgmma_wait(Pending);
}
template <int N>
INLINE void wgmma_e4m3(float (&d)[N / 2], const u32 (&a)[4], u64 b_matrix, bool accumulate) {
    emu::wgmma({emu::Input::e4m3, N, d, a, 0, b_matrix, false, accumulate});
}
template <int N>
INLINE void wgmma_e4m3_shared(float (&d)[N / 2], u64 a_matrix, u64 b_matrix, bool accumulate) {
    emu::wgmma({emu::Input::e4m3, N, d, nullptr, a_matrix, b_matrix, false, accumulate});
}
template <int N>
INLINE void wgmma_bf16_shared(float (&d)[N / 2], u64 a_matrix, u64 b_matrix, bool accumulate) {
    emu::wgmma({emu::Input::bf16, N, d, nullptr, a_matrix, b_matrix, false, accumulate});
}
template <int N>
INLINE void wgmma_bf16(float (&d)[N / 2], const u32 (&a)[4], u64 b_matrix, bool accumulate) {
    emu::wgmma({emu::Input::bf16, N, d, a, 0, b_matrix, false, accumulate});
}
template <int N>
INLINE void wgmma_bf16_mn(float (&d)[N / 2], const u32 (&a)[4], u64 b_matrix, bool accumulate) {
    emu::wgmma({emu::Input::bf16, N, d, a, 0, b_matrix, true, accumulate});
}
