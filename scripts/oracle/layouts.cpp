// Our fragment layouts, swizzle and matrix descriptors of sm_80 and sm_90a against CuTe's, on the host.
//
// Built and run by `run.sh`. Left of each comparison: what `kernels/include/ptx_mma80.cuh`,
// `ptx_wgmma90.cuh`, `swizzle.cuh` and the emulator's `warp.cpp` and `wgmma.cpp` say; right: CuTe's traits,
// evaluated. Prints one line per comparison and exits non-zero if any differs.
#include <cstdint>
#include <cstdio>

#include <cute/tensor.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "report.h"

using namespace cute;

// Fragments of `mma.sync` m16n8k16: half `h` of register `r` of lane `l`.
void fragments() {
    using Traits = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
    const Traits::ALayout a{};
    const Traits::BLayout b{};
    const Traits::CLayout c{};
    int wrong_a = 0, wrong_b = 0, wrong_c = 0;
    for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        for (int r = 0; r < 4; ++r) {
            for (int h = 0; h < 2; ++h) {
                wrong_a += int(a(l, 2 * r + h)) != g + r % 2 * 8 + 16 * (2 * t + r / 2 * 8 + h);
                if (r < 2) wrong_b += int(b(l, 2 * r + h)) != g + 8 * (2 * t + r * 8 + h);
            }
            wrong_c += int(c(l, r)) != g + r / 2 * 8 + 16 * (2 * t + r % 2);
        }
    }
    report("m16n8k16, A", wrong_a, 32 * 8);
    report("m16n8k16, B", wrong_b, 32 * 4);
    report("m16n8k16, sums", wrong_c, 32 * 4);
}

// Bit `i` of register `r` of lane `l` after a load of four 8 x 8 matrices, whose rows the lanes name in turn.
template <class Traits>
void matrix_loads(const char* what, bool transposed) {
    const typename Traits::SrcLayout from{};
    const typename Traits::DstLayout to{};
    int wrong = 0;
    for (int l = 0; l < 32; ++l)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < 32; ++i) {
                const int g = l / 4, pair = 2 * (l % 4) + i / 16;
                const int row = transposed ? pair : g, column = transposed ? g : pair;
                wrong += int(to(l, r * 32 + i)) != int(from(r * 8 + row, column * 16 + i % 16));
            }
    report(what, wrong, 32 * 4 * 32);
}

// Accumulators of m64nN: register r of thread t.
template <int N>
void accumulators() {
    const GMMA::CLayout_64xN<N> theirs{};
    int wrong = 0;
    for (int t = 0; t < 128; ++t)
        for (int r = 0; r < N / 2; ++r) {
            const int lane = t % 32;
            const int row = 16 * (t / 32) + lane / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + 2 * (lane % 4) + r % 2;
            wrong += int(theirs(t, r)) != row + 64 * column;
        }
    char what[64];
    std::snprintf(what, sizeof what, "accumulators m64n%d", N);
    report(what, wrong, 64 * N);
}

// A in registers: value i of register r of thread t.
template <class Layout>
void a_registers(const char* what, int per_register) {
    const Layout theirs{};
    int wrong = 0;
    for (int t = 0; t < 128; ++t)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < per_register; ++i) {
                const int lane = t % 32;
                const int row = 16 * (t / 32) + lane / 4 + r % 2 * 8;
                const int k = per_register * (lane % 4) + i + r / 2 * 4 * per_register;
                wrong += int(theirs(t, r * per_register + i)) != row + 64 * k;
            }
    report(what, wrong, 64 * 8 * per_register);
}

// `swizzled(row, byte)` of `swizzle.cuh`.
int swizzled(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

void k_major_swizzle() {
    const auto theirs = tile_to_shape(GMMA::Layout_K_SW128_Atom<uint8_t>{}, Shape<_64, _128>{});
    int wrong = 0;
    for (int row = 0; row < 64; ++row)
        for (int byte = 0; byte < 128; ++byte) wrong += int(theirs(row, byte)) != swizzled(row, byte);
    report("128-byte swizzle, K-major, 64 x 128 bytes", wrong, 64 * 128);
}

// 64 keys x 256 channels of bf16, in bytes (CuTe's layout of a wider type is in other units): rows of memory are k, 64 columns each, tiles of 64 columns one
// behind the other. The same bytes K-major (scores) and MN-major (values).
void mn_major_swizzle() {
    const auto theirs =
        tile_to_shape(GMMA::Layout_MN_SW128_Atom<uint8_t>{}, Shape<_512, _64>{}, Step<_2, _1>{});
    int wrong = 0;
    for (int byte = 0; byte < 512; ++byte)
        for (int k = 0; k < 64; ++k)
            wrong += int(theirs(byte, k)) != byte / 128 * 8192 + swizzled(k, byte % 128);
    report("128-byte swizzle, MN-major, 512 bytes x 64", wrong, 512 * 64);
}

// The fields of a descriptor that do not depend on the address, as `matrix_k_major` and
// `matrix_mn_major` fill them; of the first step of K (`Step`) of a tile.
template <GMMA::Major M, class T, class L, class Step>
void descriptor(const char* what, const L& layout, const Step& step, bool with_leading, uint32_t leading) {
    alignas(1024) static T memory[cosize_v<L>];
    const auto tile = make_tensor(make_smem_ptr(memory), layout);
    const GmmaDescriptor theirs = GMMA::make_gmma_desc<M>(local_tile(tile, step, make_coord(_0{}, _0{})));
    int wrong = theirs.bitfield.layout_type_ != 1;
    wrong += theirs.bitfield.base_offset_ != 0;
    wrong += theirs.bitfield.stride_byte_offset_ != 1024 >> 4;
    if (with_leading) wrong += theirs.bitfield.leading_byte_offset_ != leading >> 4;
    report(what, wrong, 3 + with_leading);
}

int main() {
    fragments();
    matrix_loads<Copy_Traits<SM75_U32x4_LDSM_N>>("four matrices loaded", false);
    matrix_loads<Copy_Traits<SM75_U16x8_LDSM_T>>("four matrices loaded, each transposed", true);
    accumulators<8>();
    accumulators<32>();
    accumulators<64>();
    accumulators<128>();
    accumulators<256>();
    a_registers<GMMA::ALayout_64x32>("A in registers, E4M3 m64k32", 4);
    a_registers<GMMA::ALayout_64x16>("A in registers, bf16 m64k16", 2);
    k_major_swizzle();
    mn_major_swizzle();
    descriptor<GMMA::Major::K, uint8_t>("descriptor, K-major E4M3",
                                        tile_to_shape(GMMA::Layout_K_SW128_Atom<uint8_t>{}, Shape<_64, _128>{}),
                                        Shape<_64, _32>{}, false, 0);
    descriptor<GMMA::Major::MN, uint16_t>(
        "descriptor, MN-major bf16, 256 columns of 64 keys",
        tile_to_shape(GMMA::Layout_MN_SW128_Atom<uint16_t>{}, Shape<_256, _64>{}, Step<_2, _1>{}),
        Shape<_256, _16>{}, true, 8192);
    return verdict("oracle, sm_80 and sm_90a");
}
