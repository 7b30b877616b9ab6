// check_arithmetic, check_functions, check_double, check_warp, check_barriers, check_atomics, check_last_block,
// check_copies, check_ldmatrix, check_mma: the wrappers that every architecture has, on whatever is given.
//
// Not operators: they let a test compare `ptx_base.cuh`, `ptx_async80.cuh` and `ptx_mma80.cuh` (on a GPU) and
// their host bodies (in the emulator) with what the wrappers are meant to do, written down in Rust.
//
// Inputs   in u32: words whose meaning is said at each kernel
// Outputs  out u32: likewise
// Launch   as said at each; fragments are passed as they are, so that their layout is the test's business.
// Arch     sm_80 and later.
// CPU twin `wrappers` of the device check.

#include "../include/device.cuh"

#define CHECK(name, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const u32* __restrict__ in, u32* __restrict__ out)

constexpr u32 THREADS = 128;

// Any grid. in [n][3], out [n][14].
CHECK(check_arithmetic, 128) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    const u32 a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
    const float x = bits_float(a), y = bits_float(b), z = bits_float(c);
    u32* to = out + 14 * i;
    to[0] = float_bits(fma_rn(x, y, z));
    to[1] = float_bits(mul_rn(x, y));
    to[2] = float_bits(add_rn(x, y));
    to[3] = float_bits(div_rn(x, y));
    to[4] = float_bits(sqrt_rn(x));
    to[5] = float_bits(max_f32(x, y));
    to[6] = float_bits(min_f32(x, y));
    to[7] = float_bits(abs_f32(x));
    to[8] = byte_perm(a, b, c);
    to[9] = popcount(a) | count_leading_zeros(a) << 8;
    to[10] = min_u32(a, b);
    to[11] = max_u32(a, b);
    to[12] = pack_bf16x2(x, y);
    to[13] = mul_bf16x2(a, b);
}
EMU_KERNEL(check_arithmetic)

// Any grid. in [n] f32, out [n][5] f32: 2^x by the special function unit, e^x, log(1 + x), sine, cosine.
CHECK(check_functions, 128) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    const float x = bits_float(in[i]);
    float sin, cos;
    sincos_f32(x, sin, cos);
    u32* to = out + 5 * i;
    to[0] = float_bits(exp2_approx(x));
    to[1] = float_bits(exp_f32(x));
    to[2] = float_bits(log1p_f32(x));
    to[3] = float_bits(sin);
    to[4] = float_bits(cos);
}
EMU_KERNEL(check_functions)

// Any grid. in [n][2] f64, out [n][3] f64, low words first.
CHECK(check_double, 128) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    const double a = bits_double(in[4 * i] | static_cast<u64>(in[4 * i + 1]) << 32);
    const double b = bits_double(in[4 * i + 2] | static_cast<u64>(in[4 * i + 3]) << 32);
    const u64 results[3] = {double_bits(mul_rn64(a, b)), double_bits(add_rn64(a, b)), double_bits(div_rn64(a, b))};
    UNROLL
    for (u32 j = 0; j < 3; ++j) {
        out[6 * i + 2 * j] = static_cast<u32>(results[j]);
        out[6 * i + 2 * j + 1] = static_cast<u32>(results[j] >> 32);
    }
}
EMU_KERNEL(check_double)

// Any grid. in [n][2]: a value, and the lane to take one from; out [n][16].
CHECK(check_warp, 128) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    const u32 value = in[2 * i], lane = in[2 * i + 1];
    const float x = bits_float(value);
    u32* to = out + 16 * i;
    to[0] = shfl(value, lane);
    to[1] = float_bits(shfl(x, lane));
    UNROLL
    for (u32 j = 0; j < 5; ++j) to[2 + j] = shfl_xor(value, 1u << j);
    to[7] = float_bits(shfl_xor(x, 31));
    UNROLL
    for (u32 j = 0; j < 5; ++j) to[8 + j] = shfl_up(value, 1u << j);
    to[13] = float_bits(shfl_up(x, 31));
    to[14] = shfl_up(value, 0);
    to[15] = ballot((value & 1) != 0);
}
EMU_KERNEL(check_warp)

constexpr u32 BARRIER_ROUNDS = 8, HALF = THREADS / 2;
struct Exchange {
    u32 pair[2][HALF], block[THREADS];
};

// `n` steps of a generator, one after the other.
INLINE u32 delayed(u32 x, u32 n) {
    for (u32 i = 0; i < n; ++i) x = x * 1664525u + 1013904223u;
    return x;
}

// One block. in: the steps by which one warp is late in each round, then a word per thread; out: a word per thread.
// The halves of the block exchange words between their threads, then the whole block does.
CHECK(check_barriers, 128) {
    Exchange& s = shared<Exchange>();
    const u32 t = threadIdx.x, half = t / HALF, place = t % HALF;
    u32 x = in[1 + t];
    for (u32 round = 0; round < BARRIER_ROUNDS; ++round) {
        if (warp_id() == round % 4) x = delayed(x, in[0]);
        s.pair[half][place] = x;
        if (half == 0) named_sync<1>(HALF);
        else named_sync<2>(HALF);
        const u32 y = s.pair[half][HALF - 1 - place];
        if (warp_id() == (round + 1) % 4) x = delayed(x, in[0]);
        s.block[t] = x ^ y;
        block_sync();
        x += s.block[THREADS - 1 - t];
        block_sync();
    }
    out[t] = x;
}
EMU_KERNEL(check_barriers)

struct Counters {
    u64 wide;
    u32 narrow;
};

// Any grid. in [n]; out, zeros at first: a sum, a word, a sum of 64 bits, a count, three words; [n] what the count was;
// [blocks][4] the sums of each block by way of shared memory.
CHECK(check_atomics, 128) {
    Counters& s = shared<Counters>();
    const u32 i = blockIdx.x * THREADS + threadIdx.x, x = in[i];
    const u64 wide = x * 0x100000001ull;
    if (threadIdx.x == 0) s.wide = 0, s.narrow = 0;
    block_sync();
    atomic_add(&out[0], x);
    atomic_add64(reinterpret_cast<u64*>(&out[2]), wide);
    out[8 + i] = atomic_add(&out[4], 1);
    atomic_add(&s.narrow, x);
    atomic_add64(&s.wide, wide);
    block_sync();
    if (threadIdx.x != 0) return;
    u32* to = out + 8 + gridDim.x * THREADS + 4 * blockIdx.x;
    to[0] = s.narrow, to[2] = static_cast<u32>(s.wide), to[3] = static_cast<u32>(s.wide >> 32);
}
EMU_KERNEL(check_atomics)

// Any grid. in [n]; out, zeros at first: a count, which is zero again; [128] the sums over all blocks of what each
// stored for a thread, by the block that ended last; [n] what was stored.
extern "C" __global__ void __launch_bounds__(128) check_last_block(const u32* __restrict__ in, u32* out) {
    u32& is_last = shared<u32>();
    const u32 t = threadIdx.x, i = blockIdx.x * THREADS + t;
    u32 *sums = out + 1, *stored = sums + THREADS;
    stored[i] = 3 * in[i];
    block_sync();
    if (t == 0) {
        is_last = atomic_add_ordered(out, 1) == gridDim.x - 1;
        if (is_last) out[0] = 0;
    }
    block_sync();
    if (!is_last) return;
    u32 sum = 0;
    for (u32 block = 0; block < gridDim.x; ++block) sum += stored[block * THREADS + t];
    sums[t] = sum;
}
EMU_KERNEL(check_last_block)

struct Copies {
    u32x4 first[THREADS], second[THREADS];
};

// One block. in [3][128] of 16 bytes, [2][128] whether to copy the last two; out [3][128] of 16 bytes, the last two
// by way of shared memory and read by the thread opposite.
CHECK(check_copies, 128) {
    Copies& s = shared<Copies>();
    const u32 t = threadIdx.x;
    const u32x4* pieces = reinterpret_cast<const u32x4*>(in);
    const u32* valid = in + 12 * THREADS;
    u32x4* to = reinterpret_cast<u32x4*>(out);
    to[t] = load_stream16(pieces + t);
    s.first[t] = s.second[t] = {{~0u, ~0u, ~0u, ~0u}};
    block_sync();
    cp_async16(&s.first[t], pieces + THREADS + t, valid[t] != 0);
    cp_async_commit();
    cp_async16(&s.second[t], pieces + 2 * THREADS + t, valid[THREADS + t] != 0);
    cp_async_commit();
    cp_async_wait<1>();
    block_sync();
    to[THREADS + t] = s.first[THREADS - 1 - t];
    cp_async_wait<0>();
    block_sync();
    to[2 * THREADS + t] = s.second[THREADS - 1 - t];
}
EMU_KERNEL(check_copies)

// Rows at multiples of 48 bytes, so that their distance is not that of any tile.
constexpr u32 ROW_WORDS = 12;
struct Rows {
    alignas(16) u32 words[WARP * ROW_WORDS];
};

// Any grid. in [blocks][32 rows][4]: the rows of four matrices; out [blocks][lane][8]: registers of a plain and of a
// transposed load.
CHECK(check_ldmatrix, 32) {
    Rows& s = shared<Rows>();
    const u32 lane = threadIdx.x;
    for (u32 i = 0; i < 4; ++i) s.words[lane * ROW_WORDS + i] = in[(blockIdx.x * WARP + lane) * 4 + i];
    warp_sync();
    u32 plain[4], transposed[4];
    ldmatrix_x4(plain, &s.words[lane * ROW_WORDS]);
    ldmatrix_x4_trans(transposed, &s.words[lane * ROW_WORDS]);
    u32* to = out + (blockIdx.x * WARP + lane) * 8;
    UNROLL
    for (u32 i = 0; i < 4; ++i) to[i] = plain[i], to[4 + i] = transposed[i];
}
EMU_KERNEL(check_ldmatrix)

// Any grid. in [blocks][lane][10]: registers of A (4), B (2) and D (4); out [blocks][lane][4]: D.
CHECK(check_mma, 32) {
    const u32 i = blockIdx.x * WARP + threadIdx.x;
    const u32* from = in + 10 * i;
    float d[4] = {bits_float(from[6]), bits_float(from[7]), bits_float(from[8]), bits_float(from[9])};
    mma_bf16_16816(d, from[0], from[1], from[2], from[3], from[4], from[5]);
    UNROLL
    for (u32 j = 0; j < 4; ++j) out[4 * i + j] = float_bits(d[j]);
}
EMU_KERNEL(check_mma)
