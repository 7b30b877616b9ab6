// Tensor memory and the products of one thread that write it (tcgen05). After the PTX manual alone:
// nothing here was compared with a GPU yet.
//
// Copies to tensor memory and products are noted in the order of their issue. Late mode runs them when
// a commit behind them lands, as late as copies do; eager mode at issue. Errors: columns that are not
// allocated, wrong descriptors, a load of what was never written, of what is not known to be done, or
// without `tmem_fence_after`, columns given back while in use, and work that is never committed.
#include <math.h>
#include <string.h>

#include <array>
#include <deque>
#include <map>
#include <memory>

#include "state.h"

#pragma GCC optimize("O3")

namespace emu {

namespace {

constexpr uint32_t ROWS = 128, COLUMNS = 512, DEPTH = 32, MAX_N = 256;

struct Cell {
    uint32_t value = 0;
    uint32_t time = 0; // of its writer among asynchronous work; 0: never written
    uint32_t reader_clock = 0;
    uint16_t reader_warp = 0;
    uint8_t reader_lane = 0;
};

enum class Kind { copy, product, commit };
struct Work {
    Kind kind;
    ScaledProduct product; // copy: `d` and `a_matrix`
    uint64_t barrier;
    uint32_t time;
};

struct TensorMemory {
    Cell cells[ROWS][COLUMNS];
    bool allocated[COLUMNS] = {};
    std::map<uint32_t, uint32_t> ranges; // first column, columns
    std::deque<Work> queue;
};
std::vector<std::unique_ptr<TensorMemory>> blocks;

struct Load {
    float* to;
    float values[8];
};
std::map<const Fibre*, std::vector<Load>> loads; // not waited for

TensorMemory& own(void* pc) {
    auto& memory = blocks[self().rank];
    if (!memory) fail_at(pc, "tensor memory is used before any was allocated");
    return *memory;
}

void check_columns(const TensorMemory& memory, uint32_t first, uint32_t n, void* pc) {
    for (uint32_t c = first; c < first + n; ++c)
        if (c >= COLUMNS || !memory.allocated[c]) fail_at(pc, "column %u of tensor memory is not allocated", c);
}

struct Matrix {
    uint32_t start, stride, swizzle;
    Matrix(uint64_t descriptor, uint32_t wanted, void* pc)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
          swizzle(static_cast<uint32_t>(descriptor >> 61)) {
        if (swizzle != wanted) fail_at(pc, "a matrix with layout %u, expected %u", swizzle, wanted);
        if ((descriptor >> 46 & 7) != 1) fail_at(pc, "a matrix descriptor that is not of this architecture");
        if (descriptor >> 49 & 7) fail_at(pc, "a matrix with a base offset: begin it at a multiple of 1024");
    }
    uint32_t operand(uint32_t row, uint32_t byte) const {
        const uint32_t address = start + row / 8 * stride + row % 8 * 128 + byte;
        return address ^ (address >> 7 & 7) << 4;
    }
    uint32_t scales(uint32_t row) const { return start + row / 8 * stride + row % 8 * 16; }
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

// The fields of `kind`; see "instruction descriptor" for mxf8f6f4.
struct Shape {
    uint32_t a_format, b_format, n, a_byte, b_byte;
    Shape(uint32_t kind, void* pc)
        : a_format(kind >> 7 & 7), b_format(kind >> 10 & 7), n((kind >> 17 & 63) * 8), a_byte(kind >> 29 & 3), b_byte(kind >> 4 & 3) {
        if ((kind >> 24 & 31) * 16 != ROWS || n == 0 || n > MAX_N) fail_at(pc, "a product of %u x %u", (kind >> 24 & 31) * 16, n);
        const auto known = [](uint32_t format) { return format == 0 || format == 5; };
        if (!known(a_format) || !known(b_format)) fail_at(pc, "a product of formats %u and %u", a_format, b_format);
        if (!(kind >> 23 & 1)) fail_at(pc, "scales must be E8M0");
        if (kind & 0x8001e04fu) fail_at(pc, "fields of a product's kind that must be zero: %#x", kind);
    }
};

void read_operand(const Matrix& matrix, uint32_t format, uint32_t rows, uint32_t rank, float* out) {
    const char* base = shared_at(rank << 24);
    for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t piece = 0; piece < DEPTH; piece += 16) {
            const auto* bytes = reinterpret_cast<const uint8_t*>(base + matrix.operand(row, piece));
            for (uint32_t i = 0; i < 16; ++i)
                out[row * DEPTH + piece + i] = format == 0 ? tables.e4m3[bytes[i]] : tables.e2m1[bytes[i / 2] >> 4 * (i % 2) & 15];
        }
}

void run(TensorMemory& memory, const Work& work, uint32_t rank) {
    if (work.kind == Kind::commit) {
        arrive_async(work.barrier, next_async_time());
        return;
    }
    const ScaledProduct& p = work.product;
    void* pc = __builtin_return_address(0);
    if (work.kind == Kind::copy) {
        const Matrix matrix(p.a_matrix, 0, pc);
        for (uint32_t lane = 0; lane < ROWS; ++lane)
            for (uint32_t c = 0; c < 4; ++c)
                memcpy(&memory.cells[lane][(p.d & 0xffff) + c].value, shared_at(rank << 24) + matrix.scales(lane % 32) + 4 * c, 4);
        return;
    }
    static float a[ROWS * DEPTH], b[MAX_N * DEPTH], columns[DEPTH * MAX_N];
    static double b_scale[MAX_N];
    const Shape shape(p.kind, pc);
    read_operand({p.a_matrix, 2, pc}, shape.a_format, ROWS, rank, a);
    read_operand({p.b_matrix, 2, pc}, shape.b_format, shape.n, rank, b);
    const auto scale_of = [&](uint32_t base, uint32_t index, uint32_t byte) {
        return tables.e8m0[memory.cells[index % 32][(base & 0xffff) + index / 32].value >> 8 * byte & 255];
    };
    for (uint32_t n = 0; n < shape.n; ++n) {
        b_scale[n] = scale_of(p.b_scales, n, shape.b_byte);
        for (uint32_t k = 0; k < DEPTH; ++k) columns[k * shape.n + n] = b[n * DEPTH + k];
    }
    for (uint32_t row = 0; row < ROWS; ++row) {
        double sums[MAX_N] = {};
        for (uint32_t k = 0; k < DEPTH; ++k) {
            const float left = a[row * DEPTH + k];
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

void issue(TensorMemory& memory, const Work& work) {
    if (mode.eager) run(memory, work, self().rank);
    else memory.queue.push_back(work);
}

// The running thread writes cells from now on.
void write_cells(TensorMemory& memory, uint32_t first, uint32_t n, uint32_t time, bool adds, void* pc) {
    for (uint32_t lane = 0; lane < ROWS; ++lane)
        for (uint32_t c = first; c < first + n; ++c) {
            Cell& cell = memory.cells[lane][c];
            if (adds && !cell.time) fail_at(pc, "a product adds to column %u of tensor memory, which was never written", c);
            if (cell.reader_clock && !is_seen(cell.reader_warp, cell.reader_lane, cell.reader_clock))
                fail_at(pc, "race at column %u of tensor memory: written, unordered after a load by warp %u", c, cell.reader_warp);
            cell.time = time;
        }
}

bool has_commit(const TensorMemory& memory) {
    for (const Work& work : memory.queue)
        if (work.kind == Kind::commit) return true;
    return false;
}

} // namespace

void tensor_memory_start() {
    blocks.clear();
    blocks.resize(cluster.blocks.size());
    loads.clear();
}

void tensor_memory_at_exit() {
    for (const auto& memory : blocks) {
        if (!memory) continue;
        if (!memory->queue.empty()) FAIL("ends with work of tensor cores that was never committed");
        if (!memory->ranges.empty()) FAIL("ends without giving back its tensor memory");
    }
}

void tensor_loads_at_exit(Fibre& fibre) {
    const auto found = loads.find(&fibre);
    if (found != loads.end() && !found->second.empty()) FAIL("ends with loads of tensor memory that were never waited for");
}

bool tensor_work_under_way() {
    for (const auto& memory : blocks)
        if (memory && has_commit(*memory)) return true;
    return false;
}

void land_tensor_work() {
    const uint32_t n = blocks.size(), first = mode.seed ? random_below(n) : 0;
    for (uint32_t i = 0; i < n; ++i) {
        const uint32_t rank = (first + i) % n;
        if (!blocks[rank] || !has_commit(*blocks[rank])) continue;
        auto& queue = blocks[rank]->queue;
        for (bool done = false; !done;) {
            const Work work = queue.front();
            queue.pop_front();
            run(*blocks[rank], work, rank);
            done = work.kind == Kind::commit;
        }
        return;
    }
}

void tmem_alloc(uint32_t* to, uint32_t columns) {
    struct Operand {
        uint32_t* to;
        uint32_t columns;
        void* pc;
    } operand = {to, columns, __builtin_return_address(0)};
    collective(WarpOp::tensor_alloc, &operand, [](Warp& warp) {
        const Operand& mine = *static_cast<Operand*>(warp.operands[0]);
        auto& memory = blocks[self().rank];
        if (!memory) memory = std::make_unique<TensorMemory>();
        const uint32_t n = mine.columns;
        if (n < 32 || n > COLUMNS || (n & (n - 1))) fail_at(mine.pc, "%u columns of tensor memory: a power of two from 32 to 512", n);
        for (uint32_t first = 0; first < COLUMNS; first += n) {
            bool is_free = true;
            for (uint32_t c = first; c < first + n; ++c) is_free &= !memory->allocated[c];
            if (!is_free) continue;
            for (uint32_t c = first; c < first + n; ++c) {
                memory->allocated[c] = true;
                for (auto& lane : memory->cells) lane[c] = Cell();
            }
            memory->ranges[first] = n;
            check_access(mine.to, 4, true, mine.pc);
            *mine.to = first;
            return;
        }
        fail_at(mine.pc, "no %u columns of tensor memory are free", n);
    });
}

void tmem_dealloc(uint32_t address, uint32_t columns) {
    const uint32_t operand[2] = {address, columns};
    collective(WarpOp::tensor_dealloc, const_cast<uint32_t*>(operand), [](Warp& warp) {
        void* pc = __builtin_return_address(0);
        TensorMemory& memory = own(pc);
        const auto* range = static_cast<const uint32_t*>(warp.operands[0]);
        const auto found = memory.ranges.find(range[0]);
        if (found == memory.ranges.end() || found->second != range[1])
            fail_at(pc, "%u columns of tensor memory at %#x were not allocated so", range[1], range[0]);
        if (!memory.queue.empty()) fail_at(pc, "tensor memory is given back while tensor cores work");
        write_cells(memory, range[0], range[1], 0, false, pc);
        for (uint32_t c = range[0]; c < range[0] + range[1]; ++c) memory.allocated[c] = false;
        memory.ranges.erase(found);
    });
}

void tmem_fence_before() {}
void tmem_fence_after() { self().tensor_fenced = true; }

void tmem_copy_scales(uint32_t to, uint64_t descriptor) {
    void* pc = __builtin_return_address(0);
    TensorMemory& memory = own(pc);
    if (to >> 16) fail_at(pc, "scales are copied to lane 0 on, not to lane %u", to >> 16);
    check_columns(memory, to, 4, pc);
    const Matrix matrix(descriptor, 0, pc);
    const uint32_t time = next_async_time();
    for (uint32_t row = 0; row < 32; ++row) check_started_read(matrix.scales(row), 16, time, pc);
    write_cells(memory, to, 4, time, false, pc);
    issue(memory, {Kind::copy, {to, descriptor, 0, 0, 0, 0, false}, 0, time});
}

void mma_scaled(const ScaledProduct& p) {
    void* pc = __builtin_return_address(0);
    TensorMemory& memory = own(pc);
    const Shape shape(p.kind, pc);
    if (p.d >> 16 || p.a_scales >> 16 || p.b_scales >> 16) fail_at(pc, "a product begins at lane 0");
    check_columns(memory, p.d, shape.n, pc);
    const auto check_scales = [&](uint32_t first, uint32_t n) {
        check_columns(memory, first, (n + 31) / 32, pc);
        for (uint32_t i = 0; i < n; ++i)
            if (!memory.cells[i % 32][first + i / 32].time)
                fail_at(pc, "a product reads scales in column %u of tensor memory, which was never written", first + i / 32);
    };
    check_scales(p.a_scales, ROWS), check_scales(p.b_scales, shape.n);
    const uint32_t time = next_async_time();
    const Matrix a(p.a_matrix, 2, pc), b(p.b_matrix, 2, pc);
    for (uint32_t piece = 0; piece < DEPTH; piece += 16) {
        for (uint32_t row = 0; row < ROWS; ++row) check_started_read(a.operand(row, piece), 16, time, pc);
        for (uint32_t row = 0; row < shape.n; ++row) check_started_read(b.operand(row, piece), 16, time, pc);
    }
    write_cells(memory, p.d, shape.n, time, p.accumulate, pc);
    issue(memory, {Kind::product, p, 0, time});
}

void tmem_commit(uint64_t* barrier) {
    TensorMemory& memory = own(__builtin_return_address(0));
    issue(memory, {Kind::commit, {}, barrier_for_copies(barrier), 0});
}

void tmem_load(float (&d)[8], uint32_t address) {
    struct Operand {
        float* to;
        uint32_t address;
        void* pc;
    } operand = {d, address, __builtin_return_address(0)};
    collective(WarpOp::tensor_load, &operand, [](Warp& warp) {
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            const Operand& mine = *static_cast<Operand*>(warp.operands[lane]);
            TensorMemory& memory = own(mine.pc);
            const Fibre& fibre = cluster.fibres[self().warp * LANES + lane];
            const uint32_t first_lane = mine.address >> 16, column = mine.address & 0xffff;
            if (first_lane != fibre.index / LANES % GROUP_WARPS * LANES)
                fail_at(mine.pc, "warp %u reads lanes %u on of tensor memory", fibre.index / LANES, first_lane);
            check_columns(memory, column, 8, mine.pc);
            if (!fibre.tensor_fenced) fail_at(mine.pc, "tmem_load without tmem_fence_after since the last wait");
            Load load = {mine.to, {}};
            for (uint32_t i = 0; i < 8; ++i) {
                Cell& cell = memory.cells[first_lane + lane][column + i];
                if (!cell.time) fail_at(mine.pc, "load of column %u of tensor memory, which was never written", column + i);
                if (cell.time > own_warp().clock[async_warp()])
                    fail_at(mine.pc, "load of column %u of tensor memory, unordered after the product that writes it", column + i);
                cell.reader_clock = own_warp().clock[fibre.warp];
                cell.reader_warp = static_cast<uint16_t>(fibre.warp), cell.reader_lane = static_cast<uint8_t>(lane);
                load.values[i] = __builtin_bit_cast(float, cell.value);
                mine.to[i] = NAN;
            }
            loads[&fibre].push_back(load);
        }
    });
}

void tmem_load_wait() {
    collective(WarpOp::tensor_wait, nullptr, [](Warp&) {
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            auto& mine = loads[&cluster.fibres[self().warp * LANES + lane]];
            for (const Load& load : mine) memcpy(load.to, load.values, sizeof load.values);
            mine.clear();
        }
    });
}

} // namespace emu
