// Shuffles, votes, matrix loads and products of a warp, as the PTX manual defines them.
//
// Products inside one instruction are exact and summed in double, with one rounding to f32; a GPU
// keeps fewer bits and rounds otherwise, so tolerances come from the operator, never from here.
#include <math.h>
#include <string.h>

#include "state.h"

namespace emu {

namespace {

struct Shuffle {
    uint32_t value, lane, result;
};
struct Vote {
    bool predicate;
    uint32_t result;
};
struct MatrixLoad {
    uint32_t* r;
    const char* row;
    bool transposed;
};
struct Product {
    float* d;
    const uint32_t *a, *b;
};

float half_of(uint32_t pair, uint32_t half) {
    return __builtin_bit_cast(float, half ? pair & 0xffff0000u : pair << 16);
}

} // namespace

uint32_t shuffle(uint32_t value, uint32_t lane) {
    Shuffle operand = {value, lane, 0};
    collective(WarpOp::shuffle, &operand, [](Warp& warp) {
        for (void* p : warp.operands) {
            Shuffle& mine = *static_cast<Shuffle*>(p);
            mine.result = static_cast<Shuffle*>(warp.operands[mine.lane % LANES])->value;
        }
    });
    return operand.result;
}

uint32_t ballot(bool predicate) {
    Vote operand = {predicate, 0};
    collective(WarpOp::ballot, &operand, [](Warp& warp) {
        uint32_t mask = 0;
        for (uint32_t l = 0; l < LANES; ++l)
            mask |= static_cast<uint32_t>(static_cast<Vote*>(warp.operands[l])->predicate) << l;
        for (void* p : warp.operands) static_cast<Vote*>(p)->result = mask;
    });
    return operand.result;
}

bool elect() {
    bool chosen = false;
    collective(WarpOp::elect, &chosen, [](Warp& warp) { *static_cast<bool*>(warp.operands[0]) = true; });
    return chosen;
}

// The number of registers of each thread from here on; all warps of the warpgroup ask for the same.
void set_registers(uint32_t n) {
    if (n < 24 || n > 256 || n % 8) FAIL("%u registers: 24 to 256 in steps of 8", n);
    collective(WarpOp::set_registers, &n, [](Warp& warp) {
        const Fibre& fibre = self();
        warp.registers = *static_cast<uint32_t*>(warp.operands[0]);
        const uint32_t n_warps = launch.block.x * launch.block.y * launch.block.z / LANES;
        uint32_t sum = 0;
        for (uint32_t w = fibre.rank * n_warps; w < (fibre.rank + 1) * n_warps; ++w)
            sum += cluster.warps[w].registers * LANES;
        if (sum > 65536) FAIL("the warps of the block ask for %u registers; there are 65536", sum);
        const uint32_t group = fibre.index / GROUP_LANES * GROUP_WARPS;
        for (uint32_t w = group; w < group + GROUP_WARPS && w < n_warps; ++w) {
            const uint32_t other = cluster.warps[fibre.rank * n_warps + w].registers;
            if (other && other != warp.registers)
                FAIL("%u registers, another warp of the warpgroup has %u", warp.registers, other);
        }
    });
}

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
    void* pc = __builtin_return_address(0);
    if (shared_address(row) % 16) fail_at(pc, "ldmatrix: a row must begin at a multiple of 16");
    check_access(row, 16, false, pc);
    MatrixLoad operand = {r, static_cast<const char*>(row), transposed};
    collective(WarpOp::ldmatrix, &operand, [](Warp& warp) {
        for (uint32_t l = 0; l < LANES; ++l) {
            MatrixLoad& mine = *static_cast<MatrixLoad*>(warp.operands[l]);
            const uint32_t g = l / 4, t = l % 4;
            for (uint32_t matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (uint32_t half = 0; half < 2; ++half) {
                    const uint32_t from_row = mine.transposed ? 2 * t + half : g;
                    const uint32_t column = mine.transposed ? g : 2 * t + half;
                    const auto* source =
                        static_cast<MatrixLoad*>(warp.operands[matrix * 8 + from_row])->row;
                    memcpy(&pair[half], source + 2 * column, 2);
                }
                mine.r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
        }
    });
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Product operand = {d, a, b};
    collective(WarpOp::mma, &operand, [](Warp& warp) {
        double left[16][16], right[8][16];
        for (uint32_t l = 0; l < LANES; ++l) {
            const Product& lane = *static_cast<Product*>(warp.operands[l]);
            const uint32_t g = l / 4, t = l % 4;
            for (uint32_t half = 0; half < 2; ++half) {
                for (uint32_t i = 0; i < 4; ++i)
                    left[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = half_of(lane.a[i], half);
                for (uint32_t i = 0; i < 2; ++i)
                    right[g][2 * t + 8 * i + half] = half_of(lane.b[i], half);
            }
        }
        for (uint32_t l = 0; l < LANES; ++l) {
            float* out = static_cast<Product*>(warp.operands[l])->d;
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
                double sum = out[i];
                for (uint32_t k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
                out[i] = static_cast<float>(sum);
            }
        }
    });
}

// Two floats to E4M3, nearest even, saturating: by search, unlike the kernels' own conversion.
uint32_t e4m3_pair(float low, float high) {
    const auto convert = [](float x) -> uint32_t {
        if (x != x) return 0x7f;
        const double magnitude = x < 0 ? -static_cast<double>(x) : x;
        const auto value = [](uint32_t code) {
            const int exponent = code >> 3, mantissa = code & 7;
            return exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
        };
        uint32_t below = 0; // the largest code whose value is not above
        for (uint32_t step = 64; step; step /= 2)
            if (below + step <= 126 && value(below + step) <= magnitude) below += step;
        if (below < 126) {
            const double up = value(below + 1) - magnitude, down = magnitude - value(below);
            below += up < down || (up == down && below % 2);
        }
        return below | (__builtin_signbit(x) ? 128 : 0);
    };
    return convert(low) | convert(high) << 8;
}

} // namespace emu
