// What tensor cores of sm_100f compute in tensor memory (tcgen05): block-scaled products, products of bf16
// values, copies of scales. After the PTX manual alone: nothing here was compared with a GPU yet.
//
// Products inside one instruction are exact and summed in double, with one rounding to f32. Errors: wrong
// descriptors and kinds, shapes and lanes that the manual does not have.
//
// Only the 128-byte swizzle. Not here: when work runs, and what may touch tensor memory (`tmem.cpp`).
#include <math.h>
#include <string.h>

#include "tmem.h"

#pragma GCC optimize("O3")

namespace emu {

namespace {

// Values of K of a scaled product and of one of bf16: 32 bytes of a row each.
constexpr uint32_t SCALED_K = 32, BF16_K = 16, K_BYTES = 32, MAX_N = 256;

struct Matrix {
    uint32_t start, leading, stride;
    Matrix(uint64_t descriptor, uint32_t swizzle, void* pc)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 61 != swizzle)
            fail_at(pc, "a matrix with layout %u, expected %u", static_cast<uint32_t>(descriptor >> 61), swizzle);
        if ((descriptor >> 46 & 7) != 1) fail_at(pc, "a matrix descriptor that is not of this architecture");
        if (descriptor >> 49 & 15) fail_at(pc, "a matrix descriptor with a base offset: begin the matrix at a multiple of 1024");
    }
    // Place of the 16 bytes that hold byte `byte` of row `row`: rows of 128 bytes in groups of 8.
    uint32_t operand(uint32_t row, uint32_t byte) const {
        return swizzled(start + row / 8 * stride + row % 8 * 128 + byte);
    }
    // Element (k, column) of a matrix of 2-byte values with columns side by side: 64 columns to a row of
    // 128 bytes, 8 rows (k) to a group.
    uint32_t mn_major(uint32_t k, uint32_t column) const {
        return swizzled(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
    }
    uint32_t scales(uint32_t row) const { return start + row / 8 * stride + row % 8 * 16; }
    static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
};

float e4m3_value(uint32_t code) {
    if ((code & 127) == 127) return NAN;
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return code & 128 ? -magnitude : magnitude;
}
float e2m1_value(uint32_t code) {
    static const float values[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
    return code & 8 ? -values[code & 7] : values[code & 7];
}
struct Tables {
    float e4m3[256], e2m1[16];
    double e8m0[256];
    Tables() {
        for (uint32_t i = 0; i < 256; ++i) e4m3[i] = e4m3_value(i), e8m0[i] = i == 255 ? NAN : ldexp(1.0, static_cast<int>(i) - 127);
        for (uint32_t i = 0; i < 16; ++i) e2m1[i] = e2m1_value(i);
    }
};
const Tables tables;

float bf16_value(uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }

// The fields of `kind`; see "instruction descriptor" for mxf8f6f4.
struct ScaledShape {
    uint32_t a_format, b_format, n, a_byte, b_byte;
    ScaledShape(uint32_t kind, void* pc)
        : a_format(kind >> 7 & 7), b_format(kind >> 10 & 7), n((kind >> 17 & 63) * 8), a_byte(kind >> 29 & 3), b_byte(kind >> 4 & 3) {
        if ((kind >> 24 & 31) * 16 != TENSOR_LANES || n == 0 || n > MAX_N) fail_at(pc, "a scaled product of %u x %u", (kind >> 24 & 31) * 16, n);
        const auto known = [](uint32_t format) { return format == 0 || format == 5; };
        if (!known(a_format) || !known(b_format)) fail_at(pc, "a scaled product of formats %u and %u", a_format, b_format);
        if (!(kind >> 23 & 1)) fail_at(pc, "scales must be E8M0");
        if (kind & 0x8001e04fu) fail_at(pc, "fields of a scaled product's kind that must be zero: %#x", kind);
    }
};

// The same for f16, with bf16 operands, f32 sums and A along K.
struct Bf16Shape {
    uint32_t m, n;
    bool b_is_mn_major;
    Bf16Shape(uint32_t kind, void* pc) : m((kind >> 24 & 31) * 16), n((kind >> 17 & 63) * 8), b_is_mn_major(kind >> 16 & 1) {
        if ((m != 64 && (m != 128 || n % 16)) || n == 0 || n > MAX_N) fail_at(pc, "a bf16 product of %u x %u", m, n);
        if ((kind & 0x1ff0u) != 0x490u) fail_at(pc, "a product that is not of bf16 with f32 sums: %#x", kind);
        if (kind & 0xe080e00fu) fail_at(pc, "fields of a bf16 product's kind that must be zero: %#x", kind);
    }
    // The lane of tensor memory that holds row `row`, from lane `first` on: 64 rows lie in one half of each
    // 32 lanes.
    uint32_t lane(uint32_t first, uint32_t row) const { return first + (m == 64 ? row / 16 * 32 + row % 16 : row); }
    void check_lane(uint32_t first, void* pc) const {
        if (first != 0 && (m != 64 || first != 16)) fail_at(pc, "a product of %u rows at lane %u", m, first);
    }
};

void read_codes(const Matrix& matrix, uint32_t format, uint32_t rows, uint32_t rank, float* out) {
    const char* base = shared_at(rank << 24);
    for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t piece = 0; piece < K_BYTES; piece += 16) {
            const auto* bytes = reinterpret_cast<const uint8_t*>(base + matrix.operand(row, piece));
            for (uint32_t i = 0; i < 16; ++i)
                out[row * SCALED_K + piece + i] = format == 0 ? tables.e4m3[bytes[i]] : tables.e2m1[bytes[i / 2] >> 4 * (i % 2) & 15];
        }
}

// [rows][16] of a matrix whose rows lie along K; [16][columns] of one whose columns lie side by side.
void read_rows(const Matrix& matrix, uint32_t rows, uint32_t rank, float* out) {
    const char* base = shared_at(rank << 24);
    for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t k = 0; k < BF16_K; ++k) {
            uint16_t bits;
            memcpy(&bits, base + matrix.operand(row, k / 8 * 16) + k % 8 * 2, 2);
            out[row * BF16_K + k] = bf16_value(bits);
        }
}
void read_columns(const Matrix& matrix, uint32_t columns, uint32_t rank, float* out) {
    const char* base = shared_at(rank << 24);
    for (uint32_t k = 0; k < BF16_K; ++k)
        for (uint32_t c = 0; c < columns; ++c) {
            uint16_t bits;
            memcpy(&bits, base + matrix.mn_major(k, c / 8 * 8) + c % 8 * 2, 2);
            out[k * columns + c] = bf16_value(bits);
        }
}

// Rows along K in shared memory, 32 bytes each, are read from now on.
void start_rows(const Matrix& matrix, uint32_t rows, uint32_t time, void* pc) {
    for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t byte = 0; byte < K_BYTES; byte += 16) check_started_read(matrix.operand(row, byte), 16, time, pc);
}

} // namespace

void run_copy(TensorMemory& memory, const ScaledProduct& copy, uint32_t rank) {
    const Matrix matrix(copy.a_matrix, 0, __builtin_return_address(0));
    for (uint32_t lane = 0; lane < TENSOR_LANES; ++lane)
        for (uint32_t c = 0; c < 4; ++c)
            memcpy(&memory.cells[lane][(copy.d & 0xffff) + c].value, shared_at(rank << 24) + matrix.scales(lane % 32) + 4 * c, 4);
}

void run_scaled(TensorMemory& memory, const ScaledProduct& p, uint32_t rank) {
    void* pc = __builtin_return_address(0);
    static float a[TENSOR_LANES * SCALED_K], b[MAX_N * SCALED_K], columns[SCALED_K * MAX_N];
    static double b_scale[MAX_N];
    const ScaledShape shape(p.kind, pc);
    read_codes({p.a_matrix, 2, pc}, shape.a_format, TENSOR_LANES, rank, a);
    read_codes({p.b_matrix, 2, pc}, shape.b_format, shape.n, rank, b);
    const auto scale_of = [&](uint32_t base, uint32_t index, uint32_t byte) {
        return tables.e8m0[memory.cells[index % 32][(base & 0xffff) + index / 32].value >> 8 * byte & 255];
    };
    for (uint32_t n = 0; n < shape.n; ++n) {
        b_scale[n] = scale_of(p.b_scales, n, shape.b_byte);
        for (uint32_t k = 0; k < SCALED_K; ++k) columns[k * shape.n + n] = b[n * SCALED_K + k];
    }
    for (uint32_t row = 0; row < TENSOR_LANES; ++row) {
        double sums[MAX_N] = {};
        for (uint32_t k = 0; k < SCALED_K; ++k) {
            const float left = a[row * SCALED_K + k];
            const float* right = columns + k * shape.n;
            for (uint32_t n = 0; n < shape.n; ++n) sums[n] += left * right[n]; // exact in f32
        }
        const double a_scale = scale_of(p.a_scales, row, shape.a_byte);
        for (uint32_t n = 0; n < shape.n; ++n) {
            uint32_t& cell = memory.cells[row][(p.d & 0xffff) + n].value;
            const double before = p.accumulate ? __builtin_bit_cast(float, cell) : 0.0f;
            cell = __builtin_bit_cast(uint32_t, static_cast<float>(before + sums[n] * a_scale * b_scale[n]));
        }
    }
}

void run_bf16(TensorMemory& memory, const Bf16Product& p, uint32_t rank) {
    void* pc = __builtin_return_address(0);
    static float a[TENSOR_LANES * BF16_K], b[MAX_N * BF16_K], columns[BF16_K * MAX_N];
    const Bf16Shape shape(p.kind, pc);
    if (p.a_is_shared) {
        read_rows({p.a_matrix, 2, pc}, shape.m, rank, a);
    } else {
        const uint32_t at = static_cast<uint32_t>(p.a_matrix);
        for (uint32_t row = 0; row < shape.m; ++row)
            for (uint32_t k = 0; k < BF16_K; ++k) {
                const uint32_t pair = memory.cells[shape.lane(at >> 16, row)][(at & 0xffff) + k / 2].value;
                a[row * BF16_K + k] = bf16_value(pair >> 16 * (k % 2) & 0xffff);
            }
    }
    if (shape.b_is_mn_major) {
        read_columns({p.b_matrix, 2, pc}, shape.n, rank, columns);
    } else {
        read_rows({p.b_matrix, 2, pc}, shape.n, rank, b);
        for (uint32_t n = 0; n < shape.n; ++n)
            for (uint32_t k = 0; k < BF16_K; ++k) columns[k * shape.n + n] = b[n * BF16_K + k];
    }
    for (uint32_t row = 0; row < shape.m; ++row) {
        double sums[MAX_N] = {};
        for (uint32_t k = 0; k < BF16_K; ++k) {
            const float left = a[row * BF16_K + k];
            const float* right = columns + k * shape.n;
            for (uint32_t n = 0; n < shape.n; ++n) sums[n] += left * right[n]; // exact in f32
        }
        for (uint32_t n = 0; n < shape.n; ++n) {
            uint32_t& cell = memory.cells[shape.lane(p.d >> 16, row)][(p.d & 0xffff) + n].value;
            const double before = p.accumulate ? __builtin_bit_cast(float, cell) : 0.0f;
            cell = __builtin_bit_cast(uint32_t, static_cast<float>(before + sums[n]));
        }
    }
}

void tmem_copy_scales(uint32_t to, uint64_t descriptor) {
    void* pc = __builtin_return_address(0);
    TensorMemory& memory = own_tensor_memory(pc);
    if (to >> 16) fail_at(pc, "scales are copied to lane 0 on, not to lane %u", to >> 16);
    check_columns(memory, to, 4, pc);
    const Matrix matrix(descriptor, 0, pc);
    const uint32_t time = next_async_time();
    for (uint32_t row = 0; row < 32; ++row) check_started_read(matrix.scales(row), 16, time, pc);
    for (uint32_t lane = 0; lane < TENSOR_LANES; ++lane) start_write(memory, lane, to, 4, time, false, pc);
    issue(memory, {TensorKind::copy, {to, descriptor, 0, 0, 0, 0, false}, {}, 0, time});
}

void mma_scaled(const ScaledProduct& p) {
    void* pc = __builtin_return_address(0);
    TensorMemory& memory = own_tensor_memory(pc);
    const ScaledShape shape(p.kind, pc);
    if (p.d >> 16 || p.a_scales >> 16 || p.b_scales >> 16) fail_at(pc, "a scaled product begins at lane 0, and so do its scales");
    check_columns(memory, p.d, shape.n, pc);
    const uint32_t time = next_async_time();
    const auto start_scales = [&](uint32_t first, uint32_t n) {
        check_columns(memory, first, (n + 31) / 32, pc);
        for (uint32_t i = 0; i < n; ++i) start_read(memory, i % 32, first + i / 32, 1, time, pc);
    };
    start_scales(p.a_scales, TENSOR_LANES), start_scales(p.b_scales, shape.n);
    start_rows({p.a_matrix, 2, pc}, TENSOR_LANES, time, pc);
    start_rows({p.b_matrix, 2, pc}, shape.n, time, pc);
    for (uint32_t lane = 0; lane < TENSOR_LANES; ++lane) start_write(memory, lane, p.d, shape.n, time, p.accumulate, pc);
    issue(memory, {TensorKind::scaled, p, {}, 0, time});
}

void tensor_bf16(const Bf16Product& p) {
    void* pc = __builtin_return_address(0);
    TensorMemory& memory = own_tensor_memory(pc);
    const Bf16Shape shape(p.kind, pc);
    const uint32_t d_lane = p.d >> 16, d = p.d & 0xffff, time = next_async_time();
    shape.check_lane(d_lane, pc);
    check_columns(memory, d, shape.n, pc);
    if (p.a_is_shared) {
        start_rows({p.a_matrix, 2, pc}, shape.m, time, pc);
    } else {
        const uint32_t a_lane = static_cast<uint32_t>(p.a_matrix) >> 16, a = static_cast<uint32_t>(p.a_matrix) & 0xffff;
        // The lanes of A must be those of d; whether both may be the upper ones the manual leaves open.
        if (a_lane || d_lane) fail_at(pc, "a product of rows from lane %u on, with sums from lane %u on", a_lane, d_lane);
        check_columns(memory, a, BF16_K / 2, pc);
        for (uint32_t row = 0; row < shape.m; ++row) start_read(memory, shape.lane(a_lane, row), a, BF16_K / 2, time, pc);
    }
    const Matrix b(p.b_matrix, 2, pc);
    if (shape.b_is_mn_major) {
        for (uint32_t k = 0; k < BF16_K; ++k)
            for (uint32_t c = 0; c < shape.n; c += 8) check_started_read(b.mn_major(k, c), 16, time, pc);
    } else {
        start_rows(b, shape.n, time, pc);
    }
    for (uint32_t row = 0; row < shape.m; ++row)
        start_write(memory, shape.lane(d_lane, row), d, shape.n, time, p.accumulate, pc);
    issue(memory, {TensorKind::bf16, {}, p, 0, time});
}

} // namespace emu
