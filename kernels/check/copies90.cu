// check_tensor_copy, check_tensor_copy_3, check_tensor_copy_5: one tensor copy, for tests of the wrapper
// against its meaning.
//
// Inputs   map: of two, three or five dimensions; box_bytes of a box in shared memory, counted_bytes of it
//          that move
//          at [dimensions] u32: the box's first element
// Outputs  out [box_bytes]: the box as it lies in shared memory
// Launch   one block of 128 threads, 3,072 bytes of shared memory.
// Limit    none: it is no part of a model.
// Arch     sm_90a, sm_100f.
// CPU twin `tensor copies` of the device check.

#include "../include/device.cuh"

struct Box {
    u64 full;
    alignas(1024) u8 bytes[2048];
};

template <bool Once, int Rank>
INLINE void copy_box(const TensorMap& map, const u32* at, u8* out, u32 box_bytes, u32 counted_bytes) {
    Box& s = shared<Box>();
    if (threadIdx.x == 0) mbarrier_init(&s.full, 1), fence_mbarrier_init();
    block_sync();
    if (threadIdx.x == 0) {
        u32 first[Rank];
        UNROLL
        for (int d = 0; d < Rank; ++d) first[d] = at[d];
        mbarrier_arrive_expect(&s.full, counted_bytes);
        tensor_load<Once>(s.bytes, map, first, &s.full);
    }
    mbarrier_wait(&s.full, 0);
    for (u32 i = threadIdx.x; i < box_bytes; i += 128) out[i] = s.bytes[i];
}

#define COPY(name, once, rank)                                                                              \
    extern "C" __global__ void __launch_bounds__(128) name(                                                 \
        const __grid_constant__ TensorMap map, const u32* __restrict__ at, u8* __restrict__ out, u32 box_bytes, \
        u32 counted_bytes) {                                                                                \
        copy_box<once, rank>(map, at, out, box_bytes, counted_bytes);                                       \
    }                                                                                                       \
    EMU_KERNEL(name)
COPY(check_tensor_copy, true, 2)
COPY(check_tensor_copy_3, false, 3)
COPY(check_tensor_copy_5, true, 5)
