// check_pipeline, check_cluster_2, check_cluster_4, check_elect, check_registers, check_registers_3, check_pack:
// the wrappers of `ptx_async90.cuh`, on whatever is given; tensor copies are in `copies90.cu`.
//
// Not operators, as those of `wrappers.cu`.
//
// Inputs   in u32: words whose meaning is said at each kernel
// Outputs  out u32: likewise
// Launch   as said at each.
// Arch     sm_90a, sm_100f.
// CPU twin `wrappers` of the device check.

#include "../include/device.cuh"

#define CHECK(name, ...) extern "C" __global__ void __VA_ARGS__ name(const u32* __restrict__ in, u32* __restrict__ out)

constexpr u32 THREADS = 128, PHASES = 6, SLOTS = 2;
// Words that are copied in all phases: 4, 8, .. 128.
constexpr u32 COPIED = (4 << PHASES) - 4;

struct Ring {
    alignas(128) u32 copied[SLOTS][THREADS];
    u32 stored[SLOTS][WARP];
    u64 full[SLOTS], empty[SLOTS];
};

// One block. in [252], [6][32]; out the same: in phase p, 16 * 2^p bytes by a bulk copy of warp 0 and 32 words by
// stores of warp 1, taken out by the two other warps.
CHECK(check_pipeline, __launch_bounds__(128)) {
    Ring& s = shared<Ring>();
    const u32 warp = warp_id(), lane = lane_id();
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < SLOTS; ++i) mbarrier_init(&s.full[i], 2), mbarrier_init(&s.empty[i], 2);
        fence_mbarrier_init();
        prefetch(in, COPIED * 4);
    }
    block_sync();
    if (warp == 0 && !elect()) return;
    u32 first = 0;
    for (u32 phase = 0; phase < PHASES; ++phase) {
        const u32 slot = phase % SLOTS, parity = phase / SLOTS & 1, n = 4u << phase;
        if (warp == 0) {
            mbarrier_wait(&s.empty[slot], parity ^ 1);
            mbarrier_arrive_expect(&s.full[slot], n * 4);
            if (phase % 3 == 0) bulk_load<false>(s.copied[slot], in + first, n * 4, &s.full[slot]);
            else bulk_load<true>(s.copied[slot], in + first, n * 4, &s.full[slot]);
        } else if (warp == 1) {
            mbarrier_wait(&s.empty[slot], parity ^ 1);
            s.stored[slot][lane] = in[COPIED + phase * WARP + lane];
            warp_sync();
            if (lane == 0) mbarrier_arrive(&s.full[slot]);
        } else {
            mbarrier_wait(&s.full[slot], parity);
            for (u32 i = threadIdx.x - 2 * WARP; i < n; i += 2 * WARP) out[first + i] = s.copied[slot][i];
            if (warp == 2) out[COPIED + phase * WARP + lane] = s.stored[slot][lane];
            warp_sync();
            if (lane == 0) mbarrier_arrive(&s.empty[slot]);
        }
        first += n;
    }
}
EMU_KERNEL(check_pipeline)

struct Mail {
    u32 words[4];
    float values[4];
};

// Clusters of N blocks of 64 threads, any number. in [blocks][N][2]: a word and a number for each block of the
// cluster; out [blocks][N][3]: what came from each, and the block's rank.
template <u32 N>
INLINE void exchange(const u32* in, u32* out) {
    Mail& s = shared<Mail>();
    const u32 t = threadIdx.x, rank = cluster_rank(), at = blockIdx.x * N + t;
    if (t < N) s.words[t] = ~0u, s.values[t] = 0.0f;
    cluster_arrive();
    cluster_wait();
    if (t < N) {
        cluster_store(&s.words[rank], t, in[2 * at]);
        cluster_store(&s.values[rank], t, bits_float(in[2 * at + 1]));
    }
    cluster_arrive();
    cluster_wait();
    if (t < N) out[3 * at] = s.words[t], out[3 * at + 1] = float_bits(s.values[t]), out[3 * at + 2] = rank;
}
CHECK(check_cluster_2, __cluster_dims__(2) __launch_bounds__(64)) { exchange<2>(in, out); }
EMU_KERNEL(check_cluster_2, .cluster = 2)
CHECK(check_cluster_4, __cluster_dims__(4) __launch_bounds__(64)) { exchange<4>(in, out); }
EMU_KERNEL(check_cluster_4, .cluster = 4)

// One block. in [1], out [128]: in, plus 1 where a thread is chosen first, plus 2 where it is chosen again.
CHECK(check_elect, __launch_bounds__(128)) {
    const u32 first = elect();
    block_sync();
    const u32 second = elect();
    out[threadIdx.x] = in[0] + first + 2 * second;
}
EMU_KERNEL(check_elect)

// One block of 384 threads. in [384], out [384]: 3 in + the warpgroup. Budgets of the products, then of attention.
CHECK(check_registers, __launch_bounds__(384, 1)) {
    const u32 t = threadIdx.x;
    if (t < THREADS) {
        give_up_registers<40>();
        out[t] = 3 * in[t];
    } else {
        take_registers<232>();
        out[t] = 3 * in[t] + t / THREADS;
    }
}
EMU_KERNEL(check_registers)
CHECK(check_registers_3, __launch_bounds__(384, 1)) {
    const u32 t = threadIdx.x;
    if (t >= 2 * THREADS) {
        give_up_registers<112>();
        out[t] = 3 * in[t] + 2;
    } else if (t < THREADS) {
        take_registers<208>();
        out[t] = 3 * in[t];
    } else {
        take_registers<184>();
        out[t] = 3 * in[t] + 1;
    }
}
EMU_KERNEL(check_registers_3)

// Any grid. in [n][2] f32, out [n]: a pair of codes.
CHECK(check_pack, __launch_bounds__(128)) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    out[i] = pack_e4m3x2(bits_float(in[2 * i]), bits_float(in[2 * i + 1]));
}
EMU_KERNEL(check_pack)
