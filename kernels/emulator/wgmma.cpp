// Products of a warpgroup (wgmma): matrix descriptors, swizzled operands, groups and waits.
//
// Late mode runs a product when its group is waited for: operands in shared memory are read then,
// and until then the accumulators hold NaN. Eager mode runs it at issue. Errors: no fence since the
// last commit, operands that differ between threads, registers of A changed before the wait.
//
// Only 128-byte swizzle. Products inside one instruction are exact and summed in double, with one
// rounding to f32; a GPU keeps fewer bits, so tolerances come from the operator, never from here.
#include <math.h>
#include <string.h>

#include <deque>
#include <map>

#include "state.h"

#pragma GCC optimize("O3")

namespace emu {

namespace {

constexpr uint32_t ROWS = 64, MAX_N = 256, MAX_K = 32;

struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t copy[4]; // of A's registers at issue
};
struct Product {
    Wgmma operands;
    Lane lanes[GROUP_LANES];
};

float e4m3_value(uint8_t code) {
    if ((code & 127) == 127) return NAN;
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return code & 128 ? -magnitude : magnitude;
}
struct E4m3Table {
    float values[256];
    E4m3Table() {
        for (int code = 0; code < 256; ++code) values[code] = e4m3_value(code);
    }
};
const E4m3Table e4m3;

uint32_t depth_of(Input input) { return input == Input::e4m3 ? 32 : 16; }
uint32_t bytes_of(Input input) { return input == Input::e4m3 ? 1 : 2; }

float value_at(const char* p, Input input) {
    if (input == Input::e4m3) return e4m3.values[static_cast<uint8_t>(*p)];
    uint16_t bits;
    memcpy(&bits, p, 2);
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

// A matrix as a descriptor names it; see the PTX manual, "matrix descriptor".
struct Matrix {
    uint32_t start, leading, stride;
    explicit Matrix(uint64_t descriptor)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1) FAIL("a matrix without 128-byte swizzle");
        if (descriptor >> 49 & 7) FAIL("a matrix with a base offset: begin it at a multiple of 1024");
    }
    // Place of the 16 bytes that hold byte `byte` of row `row`: rows of 128 bytes in groups of 8.
    uint32_t k_major(uint32_t row, uint32_t byte) const {
        return swizzled(start + row / 8 * stride + row % 8 * 128 + byte);
    }
    // Element (k, column) of a matrix of 2-byte values with columns side by side: 64 columns to a
    // row of 128 bytes, 8 rows (k) to a group.
    uint32_t mn_major(uint32_t k, uint32_t column) const {
        return swizzled(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
    }
    static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
};

// Reads rows x depth values; checks every byte once.
void read_matrix(const Wgmma& op, uint64_t descriptor, uint32_t rows, bool is_mn_major, uint32_t rank,
                 uint32_t warp, float* out, uint32_t out_stride) {
    const Matrix matrix(descriptor);
    const uint32_t depth = depth_of(op.input), size = bytes_of(op.input);
    const char* base = shared_at(rank << 24);
    if (is_mn_major) {
        for (uint32_t k = 0; k < depth; ++k)
            for (uint32_t column = 0; column < rows; column += 8) {
                const uint32_t at = matrix.mn_major(k, column);
                check_async_read(rank, at, 16, warp);
                for (uint32_t i = 0; i < 8; ++i)
                    out[(column + i) * out_stride + k] = value_at(base + at + 2 * i, op.input);
            }
        return;
    }
    for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t byte = 0; byte < 32; byte += 16) {
            const uint32_t at = matrix.k_major(row, byte);
            check_async_read(rank, at, 16, warp);
            for (uint32_t i = 0; i < 16; i += size)
                out[row * out_stride + (byte + i) / size] = value_at(base + at + i, op.input);
        }
}

void read_registers(const Product& product, float* out, uint32_t out_stride) {
    const Input input = product.operands.input;
    const uint32_t per_register = 4 / bytes_of(input);
    for (uint32_t lane = 0; lane < GROUP_LANES; ++lane) {
        const uint32_t g = lane % LANES / 4, t = lane % 4;
        for (uint32_t r = 0; r < 4; ++r)
            for (uint32_t i = 0; i < per_register; ++i) {
                const uint32_t row = lane / LANES * 16 + g + 8 * (r % 2);
                const uint32_t k = per_register * t + i + 4 * per_register * (r / 2);
                const char* bytes = reinterpret_cast<const char*>(&product.lanes[lane].copy[r]);
                out[row * out_stride + k] = value_at(bytes + i * bytes_of(input), input);
            }
    }
}

} // namespace

// Of one warpgroup.
struct Products {
    std::deque<std::vector<Product>> groups; // committed
    std::vector<Product> open;
    // Accumulators of each lane with products under way: what they will hold.
    std::map<float*, std::vector<float>> sums;
    bool fenced = false;
};

namespace {

std::vector<Products> all_products;

uint32_t first_warp_of(const Group& group) { return static_cast<uint32_t>(&group - cluster.groups.data()) * GROUP_WARPS; }

void execute(Products& products, const Product& product, uint32_t first_warp) {
    static float a[ROWS * MAX_K], b[MAX_N * MAX_K], columns[MAX_K * MAX_N];
    const Wgmma& op = product.operands;
    const uint32_t depth = depth_of(op.input), rank = cluster.fibres[first_warp * LANES].rank;
    if (op.a) {
        for (const Lane& lane : product.lanes)
            if (memcmp(lane.a, lane.copy, sizeof lane.copy))
                FAIL("registers of A change before the product is waited for");
        read_registers(product, a, MAX_K);
    } else {
        read_matrix(op, op.a_matrix, ROWS, false, rank, first_warp, a, MAX_K);
    }
    read_matrix(op, op.b_matrix, op.n, op.b_is_mn_major, rank, first_warp, b, MAX_K);
    for (uint32_t n = 0; n < op.n; ++n)
        for (uint32_t k = 0; k < depth; ++k) columns[k * op.n + n] = b[n * MAX_K + k];
    for (uint32_t row = 0; row < ROWS; ++row) {
        double sums[MAX_N] = {};
        for (uint32_t k = 0; k < depth; ++k) {
            const float left = a[row * MAX_K + k];
            const float* right = columns + k * op.n;
            for (uint32_t n = 0; n < op.n; ++n) sums[n] += left * right[n]; // exact in f32
        }
        for (uint32_t n = 0; n < op.n; ++n) {
            const uint32_t lane = row / 16 * LANES + row % 8 * 4 + n % 8 / 2;
            const uint32_t index = n / 8 * 4 + row % 16 / 8 * 2 + n % 2;
            float& out = products.sums[product.lanes[lane].d][index];
            out = static_cast<float>(op.accumulate ? out + sums[n] : sums[n]);
        }
    }
}

} // namespace

void products_start() {
    all_products.assign(cluster.groups.size(), Products());
    for (size_t i = 0; i < cluster.groups.size(); ++i) cluster.groups[i].products = &all_products[i];
}

void products_at_exit() {
    for (const Products& products : all_products)
        if (!products.open.empty() || !products.groups.empty())
            FAIL("ends with products of a warpgroup that were never waited for");
}

void wgmma_fence() {
    collective(GroupOp::fence, nullptr, [](Group& group) { group.products->fenced = true; });
}

void wgmma(const Wgmma& operands) {
    collective(GroupOp::product, &operands, [](Group& group) {
        Products& products = *group.products;
        if (!products.fenced) FAIL("wgmma without wgmma_fence since the last commit");
        Product product;
        product.operands = *static_cast<const Wgmma*>(group.operands[0]);
        const Wgmma& first = product.operands;
        for (uint32_t lane = 0; lane < GROUP_LANES; ++lane) {
            const Wgmma& mine = *static_cast<const Wgmma*>(group.operands[lane]);
            if (mine.b_matrix != first.b_matrix || mine.a_matrix != first.a_matrix || mine.n != first.n ||
                mine.accumulate != first.accumulate || mine.input != first.input || !mine.a != !first.a ||
                mine.b_is_mn_major != first.b_is_mn_major)
                FAIL("the threads of a warpgroup disagree on a product");
            product.lanes[lane] = {mine.d, mine.a, {}};
            if (mine.a) memcpy(product.lanes[lane].copy, mine.a, sizeof product.lanes[lane].copy);
            auto& sums = products.sums[mine.d];
            if (sums.empty()) sums.assign(mine.d, mine.d + mine.n / 2);
            for (uint32_t i = 0; i < mine.n / 2; ++i) mine.d[i] = NAN;
        }
        if (mode.eager) execute(products, product, first_warp_of(group));
        products.open.push_back(product);
    });
}

void wgmma_commit() {
    collective(GroupOp::commit, nullptr, [](Group& group) {
        Products& products = *group.products;
        products.groups.push_back(std::move(products.open));
        products.open.clear();
        products.fenced = false;
    });
}

void wgmma_wait(uint32_t pending) {
    collective(GroupOp::wait, &pending, [](Group& group) {
        Products& products = *group.products;
        const uint32_t pending = *static_cast<const uint32_t*>(group.operands[0]);
        while (products.groups.size() > pending) {
            const std::vector<Product> done = std::move(products.groups.front());
            products.groups.pop_front();
            if (!mode.eager)
                for (const Product& product : done) execute(products, product, first_warp_of(group));
            for (const Product& product : done)
                for (const Lane& lane : product.lanes) {
                    bool in_use = false; // by a later product
                    for (const auto& later : products.groups)
                        for (const Product& other : later) in_use |= other.lanes[&lane - product.lanes].d == lane.d;
                    const auto found = products.sums.find(lane.d);
                    if (in_use || found == products.sums.end()) continue;
                    memcpy(lane.d, found->second.data(), found->second.size() * sizeof(float));
                    products.sums.erase(found);
                }
        }
    });
}

} // namespace emu
