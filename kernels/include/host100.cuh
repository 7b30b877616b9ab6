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
INLINE void mma_bf16(u32 d, u32 a, u64 b_matrix, u32 kind, bool accumulate) {
    emu::tensor_bf16({d, a, b_matrix, kind, false, accumulate});
}
INLINE void mma_bf16_shared(u32 d, u64 a_matrix, u64 b_matrix, u32 kind, bool accumulate) {
    emu::tensor_bf16({d, a_matrix, b_matrix, kind, true, accumulate});
}
INLINE void tmem_commit(u64* barrier) { emu::tmem_commit(reinterpret_cast<uint64_t*>(barrier)); }
INLINE void tmem_load(float (&d)[8], u32 address) { emu::tmem_load(d, address); }
INLINE void tmem_load_tile(float (&d)[32], u32 address) { emu::tmem_load_tile(d, address); }
template <int R>
INLINE void tmem_load_wait(float (&)[R]) {
    emu::tmem_load_wait();
}
INLINE void tmem_store_tile(u32 address, const u32 (&d)[32]) { emu::tmem_store_tile(address, d); }
INLINE void tmem_store_wait() { emu::tmem_store_wait(); }
