// What `kernels/include/swizzle100.cuh` says, for `layouts100.cpp`: its functions, as kernels call them.
//
// A program of its own file, because names of CuTe's and of ours collide.
#include "../../kernels/include/swizzle100.cuh"

namespace emu {
// Addresses of shared memory do not matter here: matrices begin where they like.
uint32_t shared_address(const void* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)); }
} // namespace emu

uint32_t our_scaled_kind(bool is_fp4, uint32_t n, uint32_t scale_byte) {
    return (is_fp4 ? scaled_kind<true>(n) : scaled_kind<false>(n)) + scale_byte * SCALE_BYTE;
}
uint32_t our_bf16_kind(bool b_is_mn, uint32_t m, uint32_t n) { return b_is_mn ? bf16_kind<true>(m, n) : bf16_kind<false>(m, n); }
uint64_t our_matrix() { return tensor_matrix(nullptr); }
uint64_t our_matrix_mn(uint32_t column_stride) { return tensor_matrix_mn(nullptr, column_stride); }
uint64_t our_matrix_rows16() { return matrix_rows16(nullptr); }
