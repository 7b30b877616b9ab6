// Device bodies: warp-wide matrix loads and products (sm_80 and later; e4m3 from sm_89).
//
// Fragment layouts (lane l, g = l / 4, t = l % 4), as in the PTX manual:
//   A 16x16  a[0]: (g, 2t..)  a[1]: (g+8, 2t..)  a[2]: (g, 2t+8..)  a[3]: (g+8, 2t+8..)
//   B 16x8   b[0]: (2t.., g)  b[1]: (2t+8.., g)
//   D 16x8   d[0,1]: (g, 2t..)  d[2,3]: (g+8, 2t..)
//
// Twin: `host.cuh`. Included by `device.cuh` only.
#pragma once

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
INLINE void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_u32(row))
                 : "memory");
}
// The same, each matrix transposed.
INLINE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_u32(row))
                 : "memory");
}

// d += a b, bf16 inputs, f32 sums.
INLINE void mma_bf16_16816(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
