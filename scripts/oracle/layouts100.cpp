// Our descriptors and layouts of tensor memory of sm_100f against CuTe's, on the host.
//
// Built and run by `run.sh`. Left of each comparison: what `kernels/include/swizzle100.cuh` returns
// (`headers100.cpp`) and what the emulator's `tmem.cpp` and `tmem_products.cpp` say; right: CuTe's traits,
// evaluated. What no trait of CuTe's says: how a tensor copy spreads E2M1 codes, sums inside of a product,
// and in which order copies and products are seen.
#include <cstdint>

#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm100.hpp>

#include "report.h"

using namespace cute;

uint32_t our_scaled_kind(bool is_fp4, uint32_t n, uint32_t scale_byte);
uint32_t our_bf16_kind(bool b_is_mn, uint32_t m, uint32_t n);
uint64_t our_matrix();
uint64_t our_matrix_mn(uint32_t column_stride);
uint64_t our_matrix_rows16();

// Kinds of scaled products: E2M1 or E4M3 times E4M3, 128 x N.
template <int N>
int scaled_kinds() {
    using Fp4 = detail::float_e2m1_unpacksmem_t; // a code to a byte, as mxf8f6f4 takes it
    using Fp8 = float_e4m3_t;
    constexpr auto K = UMMA::Major::K;
    int wrong = 0;
    for (uint32_t byte = 0; byte < 4; ++byte) {
        auto fp4 = UMMA::make_instr_desc_block_scaled<Fp4, Fp8, float, float_ue8m0_t, 128, N, K, K>();
        auto fp8 = UMMA::make_instr_desc_block_scaled<Fp8, Fp8, float, float_ue8m0_t, 128, N, K, K>();
        fp4.a_sf_id_ = fp8.a_sf_id_ = fp4.b_sf_id_ = fp8.b_sf_id_ = byte;
        wrong += uint32_t(fp4) != our_scaled_kind(true, N, byte);
        wrong += uint32_t(fp8) != our_scaled_kind(false, N, byte);
    }
    return wrong;
}

// Kinds of bf16 products, B along K and along N.
template <int M, int N>
int bf16_kinds() {
    constexpr auto K = UMMA::Major::K, MN = UMMA::Major::MN;
    using T = bfloat16_t;
    return (uint32_t(UMMA::make_instr_desc<T, T, float, M, N, K, K>()) != our_bf16_kind(false, M, N)) +
           (uint32_t(UMMA::make_instr_desc<T, T, float, M, N, K, MN>()) != our_bf16_kind(true, M, N));
}

// Descriptors but for the address; with the leading offset where it means something.
template <UMMA::Major M, class T, class L, class Step>
void descriptor(const char* what, uint64_t ours, const L& layout, const Step& step, bool with_leading) {
    alignas(1024) static T memory[cosize_v<L>];
    const auto tile = make_tensor(make_smem_ptr(memory), layout);
    UMMA::SmemDescriptor theirs = UMMA::make_umma_desc<M>(local_tile(tile, step, make_coord(_0{}, _0{})));
    theirs.start_address_ = 0;
    if (!with_leading) theirs.leading_byte_offset_ = 0;
    report(what, ours != uint64_t(theirs), 1);
}

// Where element (m, n) of sums lies: lane and column.
template <int M, int N>
void sums(const char* what) {
    using Frg = UMMA::tmem_frg_1sm<float>;
    const auto theirs = Frg::make(Shape<Shape<Int<M>, Int<N>>, _1, _1>{}).layout();
    int wrong = 0;
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            const uint32_t lane = M == 64 ? m / 16 * 32 + m % 16 : m;
            wrong += uint32_t(theirs(make_coord(m, n), 0, 0)) != (lane << 16 | n);
        }
    report(what, wrong, M * N);
}

// A in tensor memory: pairs of bf16 to a column. CuTe counts values of 16 bits: a lane is 2^17 of them.
template <int M>
void a_in_tensor_memory(const char* what) {
    using Frg = UMMA::tmem_frg_1sm<bfloat16_t, bfloat16_t, UMMA::TmemAllocMode::NonInterleaved>;
    const auto theirs = Frg::make(Shape<Shape<Int<M>, _16>, _1, _1>{}).layout();
    int wrong = 0;
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < 16; ++k) {
            const uint32_t lane = M == 64 ? m / 16 * 32 + m % 16 : m, column = k / 2, half = k % 2;
            wrong += uint32_t(theirs(make_coord(m, k), 0, 0)) != (lane << 17 | column << 1 | half);
        }
    report(what, wrong, M * 16);
}

// Scales: byte `block` of the word of row `row`. CuTe counts bytes: a lane is 2^18 of them.
template <bool IsA>
void scales(const char* what) {
    using Frg = UMMA::tmem_sf_frg<float_ue8m0_t, 32, 1, IsA>;
    // Four products of K = 32, one block of scales each.
    const auto theirs = Frg::make(Shape<Shape<_128, Shape<_32, _1>>, _1, _4>{}).layout();
    int wrong = 0;
    for (int row = 0; row < 128; ++row)
        for (int block = 0; block < 4; ++block)
            for (int copy = 0; copy < 4; ++copy) {
                const uint32_t lane = row % 32 + 32 * copy, column = row / 32;
                const auto at = make_coord(make_coord(make_coord(make_coord(row % 32, row / 32), copy), make_coord(0, 0)), 0, block);
                wrong += uint32_t(theirs(at)) != (lane << 18 | column << 2 | block);
            }
    report(what, wrong, 128 * 4 * 4);
}

// The copy that brings scales: byte `byte` of row `row` of 32, to every 32 lanes. In bits.
void copied_scales() {
    using Traits = Copy_Traits<SM100_UTCCP_4x32dp128bit_1cta>;
    const auto source = typename Traits::SrcLayout{};
    const auto target = typename Traits::ValID{};
    int wrong = 0;
    for (int row = 0; row < 32; ++row)
        for (int bit = 0; bit < 128; ++bit)
            for (int copy = 0; copy < 4; ++copy) {
                const uint32_t lane = row + 32 * copy;
                wrong += uint32_t(target(row, bit, copy)) != (lane << 21 | bit);
                // A value's number is the same in all copies: where it comes from.
                wrong += int(source(0, make_coord(row, bit, copy))) != row + 32 * bit;
            }
    report("copy of scales, 32 rows of 16 bytes to 128 lanes", wrong, 2 * 32 * 128 * 4);
}

// Loads: register `i` of lane `lane` is which lane and column of tensor memory. In bits.
template <class Op, int N>
void loads(const char* what, uint32_t (*row_of)(int, int), uint32_t (*column_of)(int, int)) {
    using Traits = Copy_Traits<Op>;
    const auto value = typename Traits::DstLayout{};
    const auto place = typename Traits::ValID{};
    int wrong = 0;
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < N; ++i)
            for (int bit = 0; bit < 32; ++bit)
                wrong += uint32_t(place(value(lane, i * 32 + bit))) !=
                         (row_of(lane, i) << 21 | column_of(lane, i) << 5 | bit);
    report(what, wrong, 32 * N * 32);
}

int main() {
    report("kinds of scaled products, 128 x 8 to 256",
           scaled_kinds<8>() + scaled_kinds<16>() + scaled_kinds<32>() + scaled_kinds<64>() + scaled_kinds<128>() + scaled_kinds<256>(),
           6 * 8);
    report("kinds of bf16 products, 64 and 128 x 16 to 256",
           bf16_kinds<64, 16>() + bf16_kinds<64, 64>() + bf16_kinds<64, 256>() + bf16_kinds<128, 16>() + bf16_kinds<128, 32>() +
               bf16_kinds<128, 128>() + bf16_kinds<128, 256>(),
           7 * 2);
    using Bytes = uint8_t;
    descriptor<UMMA::Major::K, Bytes>("matrix descriptor, K-major E4M3", our_matrix(),
                                      tile_to_shape(UMMA::Layout_K_SW128_Atom<Bytes>{}, Shape<_128, _128>{}), Shape<_128, _32>{}, false);
    descriptor<UMMA::Major::K, bfloat16_t>("matrix descriptor, K-major bf16", our_matrix(),
                                           tile_to_shape(UMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<_128, _64>{}),
                                           Shape<_128, _16>{}, false);
    descriptor<UMMA::Major::MN, bfloat16_t>(
        "matrix descriptor, MN-major bf16, 256 columns of 64 keys", our_matrix_mn(8192),
        tile_to_shape(UMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, Shape<_256, _64>{}, Step<_2, _1>{}), Shape<_256, _16>{}, true);
    // Scales: rows of 16 bytes without swizzle, groups of 8 one behind the other.
    descriptor<UMMA::Major::K, Bytes>("matrix descriptor, scales", our_matrix_rows16(),
                                      Layout<Shape<_32, _16>, Stride<_16, _1>>{}, Shape<_32, _16>{}, false);
    sums<128, 8>("sums of 128 x 8");
    sums<128, 256>("sums of 128 x 256");
    sums<64, 256>("sums of 64 x 256, lower lanes");
    a_in_tensor_memory<128>("A in tensor memory, 128 x 16 bf16");
    a_in_tensor_memory<64>("A in tensor memory, 64 x 16 bf16");
    scales<true>("scales of A");
    scales<false>("scales of B");
    copied_scales();
    loads<SM100_TMEM_LOAD_32dp32b8x, 8>(
        "load of eight columns", [](int lane, int) { return uint32_t(lane); }, [](int, int i) { return uint32_t(i); });
    const auto tile_row = [](int lane, int i) { return uint32_t(lane / 4 + i / 2 % 2 * 8); };
    const auto tile_column = [](int lane, int i) { return uint32_t(i / 4 * 8 + lane % 4 * 2 + i % 2); };
    loads<SM100_TMEM_LOAD_16dp256b8x, 32>("load of a tile of 16 x 64", tile_row, tile_column);
    static_assert(cute::is_same_v<Copy_Traits<SM100_TMEM_STORE_16dp256b8x>::SrcLayout, Copy_Traits<SM100_TMEM_LOAD_16dp256b8x>::DstLayout>);
    return verdict("oracle, sm_100f");
}
