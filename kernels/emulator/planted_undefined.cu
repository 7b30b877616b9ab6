// Kernels with one planted error each that only sanitizers see: what AddressSanitizer and UBSan must find in
// their build of the emulator. `planted_defined` is without an error.
//
// All take `in [64] u32`, zeros that the compiler does not know, and `out [64] u32`; 64 threads, 256 bytes of shared
// memory. Emulator only; never compiled for a GPU.

#include "../include/device.cuh"

struct Words {
    u32 words[64];
};

#define PLANTED(name, ...)                                                                                             \
    extern "C" __global__ void name(const u32* in, u32* out) {                                                         \
        const u32 t = threadIdx.x, zero = in[t];                                                                       \
        u32 x = 0;                                                                                                     \
        __VA_ARGS__;                                                                                                   \
        out[t] = x;                                                                                                    \
    }                                                                                                                  \
    EMU_KERNEL(name)

// Through a pointer, so that the length of the array is not known where it is read.
INLINE u32 at(const u32* words, u32 i) {
    asm volatile("" : "+r"(words));
    return words[i];
}

PLANTED(planted_defined, u32 local[4] = {1, 2, 3, 4 + zero}; shared<Words>().words[t] = at(local, t % 4); warp_sync();
        x = at(shared<Words>().words, t ^ 1) << 31)
PLANTED(planted_local_index, u32 local[4] = {zero}; x = local[4 + zero])
PLANTED(planted_local_behind, u32 local[4] = {zero}; x = at(local, 4 + zero))
PLANTED(planted_shared_arena, x = at(shared<Words>().words, 64 + zero))
PLANTED(planted_buffer_behind, x = at(in, 64 + zero))
PLANTED(planted_buffer_before, x = at(in - 1, zero))
PLANTED(planted_shift, x = 1u << (32 + zero))
PLANTED(planted_overflow, const int big = 0x10000 + static_cast<int>(zero); const int square = big * big; x = square)
PLANTED(planted_unaligned, x = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(in) + 1 + zero))
