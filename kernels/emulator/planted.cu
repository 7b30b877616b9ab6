// Kernels with one planted error each: what every detector of the emulator must find.
//
// `planted_sound` is the same kernel without an error, so that a detector that always fires is
// seen too. All take `in [2 * block] f32`, `out [block] f32`. Emulator only; never compiled for a GPU.

#include "../include/device.cuh"

struct Pair {
    float first[64];
    float second[64];
};

// A two-stage pipeline: copies by cp.async, each thread adds what another thread copied.
template <int Pending, bool Barrier>
INLINE void pipeline(const float* in, float* out) {
    Pair& s = shared<Pair>();
    const u32 t = threadIdx.x;
    if (t < 16) cp_async16(s.first + 4 * t, in + 4 * t, true);
    cp_async_commit();
    if (t < 16) cp_async16(s.second + 4 * t, in + 64 + 4 * t, true);
    cp_async_commit();
    cp_async_wait<Pending>();
    if (Barrier) block_sync();
    out[t] = s.first[63 - t] + s.second[t ^ 32];
}

extern "C" __global__ void planted_sound(const float* in, float* out) { pipeline<0, true>(in, out); }
EMU_KERNEL(planted_sound)
extern "C" __global__ void planted_wait_too_short(const float* in, float* out) {
    pipeline<1, true>(in, out);
    cp_async_wait<0>();
}
EMU_KERNEL(planted_wait_too_short)
extern "C" __global__ void planted_copy_without_barrier(const float* in, float* out) {
    pipeline<0, false>(in, out);
}
EMU_KERNEL(planted_copy_without_barrier)

extern "C" __global__ void planted_copies_in_flight(const float* in, float*) {
    Pair& s = shared<Pair>();
    cp_async16(s.first + 4 * (threadIdx.x % 16), in + 4 * (threadIdx.x % 16), true);
    cp_async_commit();
}
EMU_KERNEL(planted_copies_in_flight)

extern "C" __global__ void planted_race(const float* in, float* out) {
    Pair& s = shared<Pair>();
    s.first[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s.first[threadIdx.x ^ 32];
}
EMU_KERNEL(planted_race)

// The slot is written again before all have read it.
extern "C" __global__ void planted_reuse_race(const float* in, float* out) {
    Pair& s = shared<Pair>();
    s.first[threadIdx.x] = in[threadIdx.x];
    block_sync();
    out[threadIdx.x] = s.first[threadIdx.x ^ 32];
    s.first[threadIdx.x] = 0.0f;
}
EMU_KERNEL(planted_reuse_race)

// Lanes of one warp exchange through shared memory as if they ran in step.
extern "C" __global__ void planted_lockstep(const float* in, float* out) {
    Pair& s = shared<Pair>();
    s.first[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s.first[threadIdx.x ^ 1];
}
EMU_KERNEL(planted_lockstep)

extern "C" __global__ void planted_unwritten(const float* in, float* out) {
    Pair& s = shared<Pair>();
    if (threadIdx.x != 5) s.first[threadIdx.x] = in[threadIdx.x];
    block_sync();
    out[threadIdx.x] = s.first[threadIdx.x];
}
EMU_KERNEL(planted_unwritten)

extern "C" __global__ void planted_half_barrier(const float*, float*) {
    if (threadIdx.x % 32 < 16) block_sync();
    warp_sync();
}
EMU_KERNEL(planted_half_barrier)

extern "C" __global__ void planted_early_exit(const float*, float* out) {
    if (threadIdx.x == 7) return;
    out[threadIdx.x] = shfl_xor(1.0f, 1);
}
EMU_KERNEL(planted_early_exit)

extern "C" __global__ void planted_deadlock(const float*, float*) {
    if (threadIdx.x < 32) named_sync<1>(64);
}
EMU_KERNEL(planted_deadlock)

extern "C" __global__ void planted_store_behind(const float* in, float* out) {
    out[threadIdx.x + 1] = in[threadIdx.x];
}
EMU_KERNEL(planted_store_behind)

extern "C" __global__ void planted_load_behind(const float* in, float* out) {
    out[threadIdx.x] = in[threadIdx.x + 65];
}
EMU_KERNEL(planted_load_behind)

extern "C" __global__ void planted_shared_behind(const float* in, float* out) {
    Pair& s = shared<Pair>();
    s.second[threadIdx.x + 1] = in[threadIdx.x];
    out[threadIdx.x] = 0.0f;
}
EMU_KERNEL(planted_shared_behind)

// One misuse each, in a line.
#define MISUSE(name, ...)                                                                                              \
    extern "C" __global__ void name([[maybe_unused]] const float* in, [[maybe_unused]] float* out) {                   \
        [[maybe_unused]] Pair& s = shared<Pair>();                                                                     \
        [[maybe_unused]] const u32 t = threadIdx.x;                                                                    \
        __VA_ARGS__;                                                                                                   \
    }                                                                                                                  \
    EMU_KERNEL(name)

MISUSE(planted_nowhere, out[t + (1 << 20)] = 0.0f)
MISUSE(planted_not_shared, smem_u32(in))
MISUSE(planted_misaligned, out[t] = *reinterpret_cast<const float*>(reinterpret_cast<const u8*>(in) + 1))
MISUSE(planted_misaligned_copy, cp_async16(s.first + 1, in, true))
MISUSE(planted_misaligned_rows, u32 r[4]; ldmatrix_x4(r, s.first + 1))
MISUSE(planted_atomic_on_unwritten, atomic_add(reinterpret_cast<u32*>(s.first), 1))
MISUSE(planted_absent_lane, if (t == 0) return; warp_sync())
MISUSE(planted_two_operations, if (t % 2) warp_sync(); else ballot(true))
MISUSE(planted_late_half, if (t % 32 < 16) warp_sync(); block_sync())
MISUSE(planted_two_barriers, if (t % 32 < 16) named_sync<1>(64); else named_sync<2>(64))
MISUSE(planted_two_counts, named_sync<1>(t < 32 ? 64 : 32))
