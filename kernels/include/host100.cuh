// Host bodies of `ptx_tensor100.cuh`, for the emulator.
//
// Included by `host.cuh` only.
#pragma once

template <int Columns>
INLINE void tmem_alloc(u32* to) {
    emu::tmem_alloc(to, Columns);
}
template <int Columns>
INLINE void tmem_dealloc(u32 address) {
    emu::tmem_dealloc(address, Columns);
}
INLINE void tmem_fence_before() { emu::tmem_fence_before(); }
INLINE void tmem_fence_after() { emu::tmem_fence_after(); }
INLINE void tmem_copy_scales(u32 to, u64 matrix) { emu::tmem_copy_scales(to, matrix); }
INLINE void mma_scaled(u32 d, u64 a_matrix, u64 b_matrix, u32 kind, u32 a_scales, u32 b_scales, bool accumulate) {
    emu::mma_scaled({d, a_matrix, b_matrix, kind, a_scales, b_scales, accumulate});
}
INLINE void tmem_commit(u64* barrier) { emu::tmem_commit(reinterpret_cast<uint64_t*>(barrier)); }
INLINE void tmem_load(float (&d)[8], u32 address) { emu::tmem_load(d, address); }
INLINE void tmem_load_wait(float (&)[8]) { emu::tmem_load_wait(); }
