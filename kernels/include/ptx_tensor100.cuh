// Device bodies: tensor memory and products of one thread, `tcgen05` (sm_100f).
//
// Tensor memory has 128 lanes x 512 columns of 32 bits; an address is lane << 16 | column. A block
// allocates whole columns. d[128][N] (+)= A[128][32] B[32][N] by one thread: element (m, n) of d is
// lane m, column n. Blocks of 32 along K have E8M0 scales in tensor memory: of row m, lane m % 32 of
// each 32 lanes, column m / 32, and which byte is `scale_byte`; of column n likewise.
// Operands lie in shared memory with the 128-byte swizzle, a row's 128 values in 128 bytes: E4M3
// codes, or E2M1 with 16 codes in the first 8 of 16 bytes, as a tensor copy leaves them.
//
// Copies to tensor memory and products run in the order of one thread, asynchronously: `tmem_commit`
// arrives at a barrier when all before it are done. Then `tmem_fence_after` and `tmem_load`.
//
// Twin: `host100.cuh`. Included by `device.cuh` only. Never compared with a GPU yet.
#pragma once

// A whole warp: allocates columns (a power of two, 32 at least); the address is stored to `to`.
template <int Columns>
INLINE void tmem_alloc(u32* to) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(smem_u32(to)), "n"(Columns)
                 : "memory");
}
// A whole warp, when nobody uses them any more; every block must.
template <int Columns>
INLINE void tmem_dealloc(u32 address) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(Columns));
}

// Before a barrier after which other threads use tensor memory, and after a barrier that orders it.
INLINE void tmem_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
INLINE void tmem_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// 32 rows of 16 bytes (`matrix_rows16`) to 4 columns, the same to every 32 lanes. One thread.
INLINE void tmem_copy_scales(u32 to, u64 matrix) {
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(matrix) : "memory");
}

// E2M1 or E4M3 rows of A, scaled, times E4M3 columns of B, scaled. One thread. `kind` is
// `scaled_kind` of the shape.
INLINE void mma_scaled(u32 d, u64 a_matrix, u64 b_matrix, u32 kind, u32 a_scales, u32 b_scales, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %6, 0;\n"
        "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32 [%0], %1, %2, %3, [%4], [%5], p;\n"
        "}" ::"r"(d),
        "l"(a_matrix), "l"(b_matrix), "r"(kind), "r"(a_scales), "r"(b_scales), "r"(static_cast<u32>(accumulate))
        : "memory");
}

// Arrives at `barrier` when this thread's copies and products so far are done.
INLINE void tmem_commit(u64* barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(smem_u32(barrier))
                 : "memory");
}

// Eight columns of this lane; warp w of a warpgroup reaches lanes 32 w ..+ 32 only. A whole warp.
// The values are there after `tmem_load_wait`.
INLINE void tmem_load(float (&d)[8], u32 address) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7])
                 : "r"(address)
                 : "memory");
}
// Waits for this thread's loads. The compiler learns that `d` changes here.
INLINE void tmem_load_wait(float (&d)[8]) {
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    UNROLL
    for (int i = 0; i < 8; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
