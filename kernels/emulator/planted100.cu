// A pipeline of tensor copies and block-scaled products (sm_100f) with one planted error each: what the
// detectors of tensor memory must find. `planted100_sound` is the same without an error.
//
// All take a tensor map of a [4 * 128][128] E4M3 in boxes of 128 rows, `b [4][8][128]` (E4M3, rows
// swizzled), `scales [512]` for both, and write `out [128][8] f32`, the sum over the four blocks of
// `a b^T` with scales. 192 threads: warps 0 to 3 store, warp 4 copies, warp 5 multiplies. Emulator only.

#include "../include/swizzle100.cuh"

constexpr u32 BLOCKS = 4, SLOTS = 2, A_BYTES = 128 * 128, B_BYTES = 8 * 128, COLUMNS = 32, A_SCALES = 8, B_SCALES = 12;

struct Slots {
    alignas(1024) u8 a[SLOTS][A_BYTES];
    alignas(1024) u8 b[SLOTS][B_BYTES];
    alignas(128) u8 scales[512];
    u64 full[SLOTS], empty[SLOTS], done;
    u32 columns;
};

enum class Error {
    None,
    NoFullWait,    // multiplies without waiting for the copy
    NoEmptyWait,   // copies into a slot that is being read
    NoScales,      // multiplies before any scales are in tensor memory
    NoCommit,      // nobody is told that the products are done
    NoDoneWait,    // loads sums that are not known to be done
    NoFence,       // loads without tmem_fence_after
    NoLoadWait,    // uses what was loaded at once
    OtherLanes,    // loads the lanes of another warp
    OtherColumns,  // loads columns that are not allocated
    NoDealloc,     // keeps its columns
    EarlyDealloc,  // gives them back while others load
    OddColumns,    // allocates a number that is no power of two
    WrongLayout,   // a descriptor of sm_90
};

template <Error E>
INLINE void pipeline100(const TensorMap& a, const u8* b, const u8* scales, float* out) {
    Slots& s = shared<Slots>();
    const u32 t = threadIdx.x, warp = warp_id();
    if (t == 0) {
        for (u32 i = 0; i < SLOTS; ++i) mbarrier_init(&s.full[i], 1), mbarrier_init(&s.empty[i], 1);
        mbarrier_init(&s.done, 1);
        fence_mbarrier_init();
    }
    if (warp == 5) tmem_alloc<E == Error::OddColumns ? 48 : COLUMNS>(&s.columns);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
    if (warp == 4 && elect()) {
        for (u32 i = 0; i < BLOCKS; ++i) {
            const u32 slot = i % SLOTS, at[2] = {0, i * 128};
            if (E != Error::NoEmptyWait) mbarrier_wait(&s.empty[slot], (i / SLOTS & 1) ^ 1);
            mbarrier_arrive_expect(&s.full[slot], A_BYTES + B_BYTES + (i == 0 ? 512 : 0));
            tensor_load<true>(s.a[slot], a, at, &s.full[slot]);
            bulk_load<true>(s.b[slot], b + i * B_BYTES, B_BYTES, &s.full[slot]);
            if (i == 0) bulk_load<true>(s.scales, scales, 512, &s.full[slot]);
        }
    } else if (warp == 5 && elect()) {
        for (u32 i = 0; i < BLOCKS; ++i) {
            const u32 slot = i % SLOTS;
            if (E != Error::NoFullWait) mbarrier_wait(&s.full[slot], i / SLOTS & 1);
            if (i == 0 && E != Error::NoScales) {
                tmem_copy_scales(s.columns + A_SCALES, matrix_rows16(s.scales));
                tmem_copy_scales(s.columns + B_SCALES, matrix_rows16(s.scales));
            }
            const u64 left = E == Error::WrongLayout ? matrix_k_major(s.a[slot]) : tensor_matrix(s.a[slot]);
            for (u32 k = 0; k < 4; ++k)
                mma_scaled(s.columns, left + 2 * k, tensor_matrix(s.b[slot]) + 2 * k, scaled_kind<false>(8) + k * SCALE_BYTE,
                           s.columns + A_SCALES, s.columns + B_SCALES, i + k > 0);
            if (E != Error::NoCommit || i + 2 < BLOCKS) tmem_commit(&s.empty[slot]);
        }
        if (E != Error::NoCommit) tmem_commit(&s.done);
    }
    warp_sync();
    if (warp < 4 || E == Error::EarlyDealloc) {
        if (E != Error::NoDoneWait) mbarrier_wait(&s.done, 0);
        if (E != Error::NoFence) tmem_fence_after();
    }
    if (warp < 4) {
        float d[8];
        const u32 lanes = E == Error::OtherLanes ? 0 : warp * WARP;
        tmem_load(d, s.columns + (lanes << 16) + (E == Error::OtherColumns ? COLUMNS : 0));
        if (E == Error::NoLoadWait) out[t] = d[0];
        else {
            tmem_load_wait(d);
            for (u32 i = 0; i < 8; ++i) out[t * 8 + i] = d[i];
        }
        tmem_fence_before();
    }
    if (E != Error::EarlyDealloc) block_sync();
    if (warp == 5 && E != Error::NoDealloc) tmem_dealloc<COLUMNS>(s.columns);
}

#define PLANTED(name, error)                                                                    \
    extern "C" __global__ void name(const __grid_constant__ TensorMap a, const u8* b, const u8* scales, float* out) { \
        pipeline100<Error::error>(a, b, scales, out);                                           \
    }                                                                                           \
    EMU_KERNEL(name)
PLANTED(planted100_sound, None)
PLANTED(planted100_no_full_wait, NoFullWait)
PLANTED(planted100_no_empty_wait, NoEmptyWait)
PLANTED(planted100_no_scales, NoScales)
PLANTED(planted100_no_commit, NoCommit)
PLANTED(planted100_no_done_wait, NoDoneWait)
PLANTED(planted100_no_fence, NoFence)
PLANTED(planted100_no_load_wait, NoLoadWait)
PLANTED(planted100_other_lanes, OtherLanes)
PLANTED(planted100_other_columns, OtherColumns)
PLANTED(planted100_no_dealloc, NoDealloc)
PLANTED(planted100_early_dealloc, EarlyDealloc)
PLANTED(planted100_odd_columns, OddColumns)
PLANTED(planted100_wrong_layout, WrongLayout)

// The same for what threads store to tensor memory: `planted100_stored` is without an error.
//
// All take `a [64][8]`, pairs of bf16, `b [64][32] u32`, rows of 16 bf16 in the first 32 of 128 bytes, swizzled, and
// write `out [64][64] f32 = a b^T`. 160 threads: warps 0 to 3 store a, warp 4 multiplies.
struct Stored {
    alignas(1024) u32 b[64 * 32];
    u64 done, later;
    u32 columns;
};

enum class StoreError {
    None,
    NoStoreWait,   // multiplies what may not be there yet
    NoFenceBefore, // comes to the barrier without
    NoFenceAfter,  // multiplies without
    NoBarrier,     // multiplies without waiting for those who store
    LoadUnwaited,  // loads what may not be there yet
    EarlyCommit,   // loads when what came before the product is done
    Overwrite,     // stores again while the product may be reading
    UpperRows,     // multiplies rows in the upper lanes
    OddWidth,      // multiplies 128 rows by 8 columns
};

template <StoreError E>
INLINE void stored100(const u32* a, const u32* b, float* out) {
    constexpr u32 SUMS = 64;
    Stored& s = shared<Stored>();
    const u32 t = threadIdx.x, warp = warp_id(), row = warp * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
    if (t == 0) mbarrier_init(&s.done, 1), mbarrier_init(&s.later, 1), fence_mbarrier_init();
    for (u32 i = t; i < 64 * 32; i += blockDim.x) s.b[i] = b[i];
    fence_proxy_async();
    if (warp == 4) tmem_alloc<128>(&s.columns);
    tmem_fence_before();
    block_sync();
    tmem_fence_after();
    const u32 upper = E == StoreError::UpperRows ? 16u << 16 : 0;
    const u32 lanes = s.columns + (warp * WARP << 16) + upper;
    u32 tile[32];
    float d[32];
    if (warp < 4) {
        for (u32 i = 0; i < 32; ++i) tile[i] = a[(row + i / 2 % 2 * 8) * 8 + (column + i % 2)];
        tmem_store_tile(lanes, tile);
        if (E == StoreError::LoadUnwaited) tmem_load_tile(d, lanes), tmem_load_wait(d);
        if (E != StoreError::NoStoreWait) tmem_store_wait();
        if (E != StoreError::NoFenceBefore) tmem_fence_before();
    }
    if (E != StoreError::NoBarrier) block_sync();
    if (warp == 4 && elect()) {
        if (E != StoreError::NoFenceAfter) tmem_fence_after();
        const u32 kind = E == StoreError::OddWidth ? bf16_kind<false>(128, 8) : bf16_kind<false>(64, 64);
        if (E == StoreError::EarlyCommit) tmem_commit(&s.done);
        mma_bf16(s.columns + SUMS + upper, s.columns + upper, tensor_matrix(s.b), kind, false);
        tmem_commit(E == StoreError::EarlyCommit ? &s.later : &s.done);
    }
    warp_sync();
    if (warp < 4) {
        if (E == StoreError::Overwrite) tmem_fence_after(), tmem_store_tile(lanes, tile), tmem_store_wait();
        mbarrier_wait(&s.done, 0);
        tmem_fence_after();
        warp_sync();
        tmem_load_tile(d, lanes + SUMS);
        tmem_load_wait(d);
        for (u32 i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
        tmem_fence_before();
    }
    block_sync();
    tmem_fence_after();
    if (warp == 4) tmem_dealloc<128>(s.columns);
}

#define PLANTED_STORE(name, error)                                                              \
    extern "C" __global__ void name(const u32* a, const u32* b, float* out) {                   \
        stored100<StoreError::error>(a, b, out);                                                \
    }                                                                                           \
    EMU_KERNEL(name)
PLANTED_STORE(planted100_stored, None)
PLANTED_STORE(planted100_no_store_wait, NoStoreWait)
PLANTED_STORE(planted100_no_fence_before, NoFenceBefore)
PLANTED_STORE(planted100_no_fence_after, NoFenceAfter)
PLANTED_STORE(planted100_no_barrier, NoBarrier)
PLANTED_STORE(planted100_load_unwaited, LoadUnwaited)
PLANTED_STORE(planted100_early_commit, EarlyCommit)
PLANTED_STORE(planted100_overwrite, Overwrite)
PLANTED_STORE(planted100_upper_rows, UpperRows)
PLANTED_STORE(planted100_odd_width, OddWidth)

// One misuse each, in a line or some; arguments as above. All threads run it, after warp 4 has allocated 128 columns
// and made `s.done` for one arrival; the barrier after that has ordered both. `d` are columns for 64 sums.
#define MISUSE(name, ...)                                                                                              \
    extern "C" __global__ void name(const u32*, const u32*, [[maybe_unused]] float* out) {                             \
        [[maybe_unused]] Stored& s = shared<Stored>();                                                                 \
        [[maybe_unused]] const u32 t = threadIdx.x, warp = warp_id();                                                  \
        for (u32 i = t; i < 64 * 32; i += blockDim.x) s.b[i] = 0;                                                      \
        fence_proxy_async();                                                                                           \
        if (t == 0) mbarrier_init(&s.done, 1), fence_mbarrier_init();                                                  \
        if (warp == 4) tmem_alloc<128>(&s.columns);                                                                    \
        block_sync();                                                                                                  \
        tmem_fence_after();                                                                                            \
        [[maybe_unused]] const u32 d = s.columns + 64, own = s.columns + (warp % 4 * WARP << 16);                      \
        [[maybe_unused]] float x[32];                                                                                  \
        [[maybe_unused]] const u32 zeros[32] = {};                                                                     \
        __VA_ARGS__;                                                                                                   \
    }                                                                                                                  \
    EMU_KERNEL(name)
// The same by one thread of warp 4.
#define MISUSE_PRODUCT(name, ...) MISUSE(name, if (t == 4 * WARP) { __VA_ARGS__; })
constexpr u32 BF16_KIND = bf16_kind<false>(64, 64), SCALED_KIND = scaled_kind<false>(8);

MISUSE_PRODUCT(planted100_wrong_shape, mma_scaled(d, 0, 0, scaled_kind<false>(0), 0, 0, false))
MISUSE_PRODUCT(planted100_wrong_format, mma_scaled(d, 0, 0, SCALED_KIND | 1u << 7, 0, 0, false))
MISUSE_PRODUCT(planted100_wrong_scales, mma_scaled(d, 0, 0, SCALED_KIND & ~(1u << 23), 0, 0, false))
MISUSE_PRODUCT(planted100_wrong_field, mma_scaled(d, 0, 0, SCALED_KIND | 1, 0, 0, false))
MISUSE_PRODUCT(planted100_wrong_lane, mma_scaled(d + (16u << 16), 0, 0, SCALED_KIND, 0, 0, false))
MISUSE_PRODUCT(planted100_wrong_type, mma_bf16_shared(d, 0, 0, BF16_KIND & ~(1u << 7), false))
MISUSE_PRODUCT(planted100_wrong_bf16_field, mma_bf16_shared(d, 0, 0, BF16_KIND | 1, false))
MISUSE_PRODUCT(planted100_wrong_sums, mma_bf16_shared(d + (32u << 16), 0, 0, BF16_KIND, false))
MISUSE_PRODUCT(planted100_wrong_swizzle, mma_bf16_shared(d, tensor_matrix(s.b) ^ 6ull << 61, tensor_matrix(s.b), BF16_KIND, false))
MISUSE_PRODUCT(planted100_base_offset, mma_bf16_shared(d, tensor_matrix(s.b) | 1ull << 49, tensor_matrix(s.b), BF16_KIND, false))
MISUSE_PRODUCT(planted100_adds_to_nothing, mma_bf16_shared(d, tensor_matrix(s.b), tensor_matrix(s.b), BF16_KIND, true))
MISUSE_PRODUCT(planted100_unwritten_rows, mma_bf16_shared(d, tensor_matrix(s.b) + (64 * 128 >> 4), tensor_matrix(s.b), BF16_KIND, false))
MISUSE_PRODUCT(planted100_unfenced_rows, s.b[3] = 0; mma_bf16_shared(d, tensor_matrix(s.b), tensor_matrix(s.b), BF16_KIND, false))
MISUSE_PRODUCT(planted100_scales_in_a_lane, tmem_copy_scales(d + (32u << 16), matrix_rows16(s.b)))
MISUSE_PRODUCT(planted100_uncommitted, mma_bf16_shared(d, tensor_matrix(s.b), tensor_matrix(s.b), BF16_KIND, false))
MISUSE_PRODUCT(planted100_commit_to_nobody, mbarrier_arrive_expect(&s.done, 16); tmem_commit(&s.done))

MISUSE(planted100_second_allocation, if (warp == 0) tmem_alloc<512>(&s.columns))
MISUSE(planted100_other_width, if (warp == 4) tmem_dealloc<64>(s.columns))
MISUSE(planted100_busy_dealloc,
       if (t == 4 * WARP) mma_bf16_shared(d, tensor_matrix(s.b), tensor_matrix(s.b), BF16_KIND, false);
       if (warp == 4) tmem_dealloc<128>(s.columns))
MISUSE(planted100_unequal_places, if (warp == 0) tmem_store_tile(own, zeros), tmem_store_wait(), tmem_load_tile(x, own + t))
MISUSE(planted100_unwritten_columns, if (warp == 0) tmem_load_tile(x, own))
MISUSE(planted100_stores_in_flight, if (warp == 0) tmem_store_tile(own, zeros))
// Warp 4 may use the lanes of warp 0, and comes long after it, with nothing between them.
#define BEHIND for (u32 i = 0; warp == 4 && i < 16; ++i) warp_sync()
MISUSE(planted100_load_race, BEHIND; if (warp == 0) tmem_store_tile(own, zeros), tmem_store_wait();
       if (warp == 4) tmem_load_tile(x, own))
MISUSE(planted100_store_race, if (warp == 0) tmem_store_tile(own, zeros), tmem_store_wait();
       tmem_fence_before(); block_sync(); tmem_fence_after(); BEHIND;
       if (warp == 0) tmem_load_tile(x, own), tmem_load_wait(x);
       if (warp == 4) tmem_store_tile(own, zeros))
MISUSE(planted100_sums_race, if (warp < 4) tmem_store_tile(own, zeros), tmem_store_wait();
       tmem_fence_before(); block_sync(); tmem_fence_after(); BEHIND;
       if (warp < 4) tmem_load_tile(x, own), tmem_load_wait(x);
       if (t == 4 * WARP) mma_bf16_shared(s.columns, tensor_matrix(s.b), tensor_matrix(s.b), BF16_KIND, false))
MISUSE(planted100_operand_race, BEHIND; if (warp < 4) tmem_store_tile(own, zeros), tmem_store_wait();
       if (t == 4 * WARP) mma_bf16(d, s.columns, tensor_matrix(s.b), BF16_KIND, false))
// Stores to what a product reads.
MISUSE(planted100_changed_operand, if (warp < 4) tmem_store_tile(own, zeros), tmem_store_wait();
       tmem_fence_before(); block_sync(); tmem_fence_after();
       if (t == 4 * WARP) mma_bf16(d, s.columns, tensor_matrix(s.b), BF16_KIND, false), tmem_commit(&s.done);
       block_sync(); tmem_fence_after(); if (warp < 4) tmem_store_tile(own, zeros))

extern "C" __global__ void planted100_not_allocated(const u32*, const u32*, float*) {
    float x[8];
    tmem_load(x, warp_id() * WARP << 16);
}
EMU_KERNEL(planted100_not_allocated)

// Tensor copies through a map that does not fit, or to a place or from columns that it cannot have; `fp4` is a map
// of 4-bit values.
#define MISUSE_COPY(name, ...)                                                                                         \
    extern "C" __global__ void name([[maybe_unused]] const __grid_constant__ TensorMap map,                            \
                                    [[maybe_unused]] const __grid_constant__ TensorMap fp4) {                          \
        Slots& s = shared<Slots>();                                                                                    \
        const u32 at[2] = {64, 0}, at3[3] = {};                                                                        \
        static_cast<void>(at), static_cast<void>(at3);                                                                 \
        if (threadIdx.x == 0) mbarrier_init(&s.done, 1), fence_mbarrier_init(), __VA_ARGS__;                           \
    }                                                                                                                  \
    EMU_KERNEL(name)
MISUSE_COPY(planted100_other_rank, tensor_load<true>(s.a[0], map, at3, &s.done))
MISUSE_COPY(planted100_misaligned_tensor_copy, tensor_load<true>(s.a[0] + 512, map, at, &s.done))
MISUSE_COPY(planted100_half_columns, tensor_load<true>(s.a[0], fp4, at, &s.done))
