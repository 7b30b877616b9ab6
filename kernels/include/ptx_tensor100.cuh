// Device bodies: tensor memory and products of one thread, `tcgen05` (sm_100f).
//
// Tensor memory has 128 lanes x 512 columns of 32 bits; an address is lane << 16 | column. A block
// allocates whole columns.
//
// Scaled: d[128][N] (+)= A[128][32] B[32][N] by one thread: element (m, n) of d is lane m, column n. Blocks
// of 32 along K have E8M0 scales in tensor memory: of row m, lane m % 32 of
// each 32 lanes, column m / 32, and which byte is `scale_byte`; of column n likewise.
// Operands lie in shared memory with the 128-byte swizzle, a row's 128 values in 128 bytes: E4M3
// codes, or E2M1 with 16 codes in the first 8 of 16 bytes, as a tensor copy leaves them.
//
// bf16: d[M][N] (+)= A[M][16] B[16][N] by one thread. 128 rows are the lanes; of 64 rows, row m is lane
// 32 (m / 16) + m % 16, so that d fills lanes 0 to 15 of each warp's 32, or, of an address with lane 16, the
// others. A may lie in tensor memory likewise, d then in the lower lanes, too: a pair (k, k + 1) of a row of A
// is column k / 2.
//
// Copies to tensor memory and products run in the order of one thread, asynchronously: `tmem_commit`
// arrives at a barrier when all before it are done. Then `tmem_fence_after` and loads. What threads have
// stored: `tmem_store_wait`, `tmem_fence_before`, a barrier, and `tmem_fence_after` by whoever multiplies.
//
// Twin: `host100.cuh`. Included by `device.cuh` only. Never compared with a GPU yet.
#pragma once

// The registers of a tile as constraints; their text is that of `ptx_wgmma90.cuh`.
#define TILE_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define TILE_8(c, d, i) TILE_4(c, d, i), TILE_4(c, d, i + 4)
#define TILE_16(c, d, i) TILE_8(c, d, i), TILE_8(c, d, i + 8)
#define TILE_32(c, d) TILE_16(c, d, 0), TILE_16(c, d, 16)

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

// bf16 rows of A in tensor memory (from lane 0 on) times bf16 columns of B. One thread. `kind` is `bf16_kind` of the shape.
INLINE void mma_bf16(u32 d, u32 a, u64 b_matrix, u32 kind, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %4, 0;\n"
        "tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], %2, %3, p;\n"
        "}" ::"r"(d),
        "r"(a), "l"(b_matrix), "r"(kind), "r"(static_cast<u32>(accumulate))
        : "memory");
}
// The same, A in shared memory, with its rows along K.
INLINE void mma_bf16_shared(u32 d, u64 a_matrix, u64 b_matrix, u32 kind, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %4, 0;\n"
        "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;\n"
        "}" ::"r"(d),
        "l"(a_matrix), "l"(b_matrix), "r"(kind), "r"(static_cast<u32>(accumulate))
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
// 16 lanes (the lower or the upper of a warp's 32) x 64 columns, as accumulators of `mma_bf16_16816` lie: d[4 j + i]
// of lane l is lane l / 4 + 8 (i / 2), column 8 j + 2 (l % 4) + i % 2. A whole warp, then `tmem_load_wait`.
INLINE void tmem_load_tile(float (&d)[32], u32 address) {
    asm volatile("tcgen05.ld.sync.aligned.16x256b.x8.b32 {" TEXT_32 "}, [%32];"
                 : TILE_32("=f", d)
                 : "r"(address)
                 : "memory");
}
// Waits for this thread's loads. The compiler learns that `d` changes here.
template <int R>
INLINE void tmem_load_wait(float (&d)[R]) {
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    UNROLL
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Stores what `tmem_load_tile` would load. A whole warp; done after `tmem_store_wait`.
INLINE void tmem_store_tile(u32 address, const u32 (&d)[32]) {
    asm volatile("tcgen05.st.sync.aligned.16x256b.x8.b32 [%32], {" TEXT_32 "};" ::TILE_32("r", d), "r"(address)
                 : "memory");
}
INLINE void tmem_store_wait() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

#undef TILE_4
#undef TILE_8
#undef TILE_16
#undef TILE_32
