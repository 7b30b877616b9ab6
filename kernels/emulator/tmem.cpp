// Tensor memory (tcgen05): its cells, who may touch them when, and when work of tensor cores is done.
// After the PTX manual alone: nothing here was compared with a GPU yet.
//
// Copies to tensor memory and products are noted in the order of their issue. Late mode runs them when
// a commit behind them lands, as late as copies do; eager mode at issue. Errors: columns that are not
// allocated, lanes of another warp, a load of what was never written, of what is not known to be done, or
// without `tmem_fence_after`; a product on what a thread has stored and not waited for; a barrier
// without `tmem_fence_before`; columns given back while in use, and work that is never committed.
//
// Not here: what products compute (`tmem_products.cpp`).
#include <math.h>
#include <string.h>

#include <memory>

#include "tmem.h"

#pragma GCC optimize("O3")

namespace emu {

namespace {

std::vector<std::unique_ptr<TensorMemory>> blocks;

// What a lane has loaded and not waited for.
struct Load {
    float* to;
    uint32_t n;
    float values[32];
};
std::map<const Fibre*, std::vector<Load>> loads;
// Cells that a lane has stored to and not waited for.
std::map<const Fibre*, std::vector<Cell*>> stores;

void run(TensorMemory& memory, const TensorWork& work, uint32_t rank) {
    switch (work.kind) {
    case TensorKind::copy: return run_copy(memory, work.scaled, rank);
    case TensorKind::scaled: return run_scaled(memory, work.scaled, rank);
    case TensorKind::bf16: return run_bf16(memory, work.bf16, rank);
    case TensorKind::commit: return arrive_async(work.barrier, work.time);
    }
}

bool has_commit(const TensorMemory& memory) {
    for (const TensorWork& work : memory.queue)
        if (work.kind == TensorKind::commit) return true;
    return false;
}

bool is_after(const CellAccess& access) {
    return !access.clock || is_seen(access.warp, access.lane, access.clock);
}

// Work that starts now comes after everything that threads did with the cell.
void check_threads_done(const Cell& cell, uint32_t column, void* pc) {
    if (cell.unwaited) fail_at(pc, "a product uses column %u of tensor memory, stored without tmem_store_wait", column);
    if (!is_after(cell.writer))
        fail_at(pc, "race at column %u of tensor memory: used, unordered after a store by warp %u", column, cell.writer.warp);
    if (cell.writer.clock && !self().tensor_fenced)
        fail_at(pc, "a product uses column %u of tensor memory, which threads stored, without tmem_fence_after", column);
}

} // namespace

TensorMemory& own_tensor_memory(void* pc) {
    auto& memory = blocks[self().rank];
    if (!memory) fail_at(pc, "tensor memory is used before any was allocated");
    return *memory;
}

void check_columns(const TensorMemory& memory, uint32_t first, uint32_t n, void* pc) {
    for (uint32_t c = first; c < first + n; ++c)
        if (c >= TENSOR_COLUMNS || !memory.allocated[c]) fail_at(pc, "column %u of tensor memory is not allocated", c);
}

void start_read(TensorMemory& memory, uint32_t lane, uint32_t first, uint32_t n, uint32_t time, void* pc) {
    for (uint32_t c = first; c < first + n; ++c) {
        Cell& cell = memory.cells[lane][c];
        if (!cell.written) fail_at(pc, "a product reads column %u of tensor memory, which was never written", c);
        check_threads_done(cell, c, pc);
        cell.read_time = time;
    }
}

void start_write(TensorMemory& memory, uint32_t lane, uint32_t first, uint32_t n, uint32_t time, bool adds, void* pc) {
    for (uint32_t c = first; c < first + n; ++c) {
        Cell& cell = memory.cells[lane][c];
        if (adds && !cell.written) fail_at(pc, "a product adds to column %u of tensor memory, which was never written", c);
        check_threads_done(cell, c, pc);
        if (!is_after(cell.reader))
            fail_at(pc, "race at column %u of tensor memory: written, unordered after a load by warp %u", c, cell.reader.warp);
        cell.time = time, cell.writer = cell.reader = CellAccess(), cell.written = true;
    }
}

void issue(TensorMemory& memory, const TensorWork& work) {
    if (mode.eager) run(memory, work, self().rank);
    else memory.queue.push_back(work);
}

void tensor_memory_start() {
    blocks.clear();
    blocks.resize(cluster.blocks.size());
    loads.clear();
    stores.clear();
}

void tensor_memory_at_exit() {
    for (const auto& memory : blocks) {
        if (!memory) continue;
        if (!memory->queue.empty()) FAIL("ends with work of tensor cores that was never committed");
        if (!memory->ranges.empty()) FAIL("ends without giving back its tensor memory");
    }
}

void tensor_accesses_at_exit(Fibre& fibre) {
    const auto load = loads.find(&fibre);
    if (load != loads.end() && !load->second.empty()) FAIL("ends with loads of tensor memory that were never waited for");
    const auto store = stores.find(&fibre);
    if (store != stores.end() && !store->second.empty())
        FAIL("ends with stores to tensor memory that were never waited for");
}

void check_tensor_fence(void* pc) {
    if (self().tensor_touched) fail_at(pc, "a barrier without tmem_fence_before since the last access to tensor memory");
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
            const TensorWork work = queue.front();
            queue.pop_front();
            run(*blocks[rank], work, rank);
            done = work.kind == TensorKind::commit;
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
        if (n < 32 || n > TENSOR_COLUMNS || (n & (n - 1)))
            fail_at(mine.pc, "%u columns of tensor memory: a power of two from 32 to 512", n);
        for (uint32_t first = 0; first < TENSOR_COLUMNS; first += n) {
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
        TensorMemory& memory = own_tensor_memory(pc);
        const auto* range = static_cast<const uint32_t*>(warp.operands[0]);
        const auto found = memory.ranges.find(range[0]);
        if (found == memory.ranges.end() || found->second != range[1])
            fail_at(pc, "%u columns of tensor memory at %#x were not allocated so", range[1], range[0]);
        if (!memory.queue.empty()) fail_at(pc, "tensor memory is given back while tensor cores work");
        for (uint32_t lane = 0; lane < TENSOR_LANES; ++lane)
            start_write(memory, lane, range[0], range[1], 0, false, pc);
        for (uint32_t c = range[0]; c < range[0] + range[1]; ++c) memory.allocated[c] = false;
        memory.ranges.erase(found);
    });
}

void tmem_fence_before() { self().tensor_touched = false; }
void tmem_fence_after() { self().tensor_fenced = true; }

void tmem_commit(uint64_t* barrier) {
    TensorMemory& memory = own_tensor_memory(__builtin_return_address(0));
    // Who waits for it has seen what was issued before it, and nothing after.
    issue(memory, {TensorKind::commit, {}, {}, barrier_for_copies(barrier), next_async_time()});
}

namespace {

// The lanes that a thread's access begins at, and the checks that loads and stores share.
Cell& touch(Fibre& fibre, uint32_t address, uint32_t lanes, uint32_t row, uint32_t column, const char* what, void* pc) {
    TensorMemory& memory = own_tensor_memory(pc);
    const uint32_t first = address >> 16, own = fibre.index / LANES % GROUP_WARPS * LANES;
    if (first != own && !(lanes == 16 && first == own + 16))
        fail_at(pc, "warp %u reads lanes %u on of tensor memory", fibre.index / LANES, first);
    const uint32_t c = (address & 0xffff) + column;
    check_columns(memory, c, 1, pc);
    if (!fibre.tensor_fenced) fail_at(pc, "%s without tmem_fence_after since the last wait", what);
    fibre.tensor_touched = true;
    Cell& cell = memory.cells[first + row][c];
    if (cell.time > own_warp().clock[async_warp()])
        fail_at(pc, "%s of column %u of tensor memory, unordered after the product that writes it", what, c);
    if (!is_after(cell.writer))
        fail_at(pc, "%s of column %u of tensor memory, unordered after a store by warp %u", what, c, cell.writer.warp);
    return cell;
}

CellAccess access_of(const Fibre& fibre) {
    return {own_warp().clock[fibre.warp], static_cast<uint16_t>(fibre.warp), static_cast<uint8_t>(fibre.lane)};
}

struct Access {
    float* to;
    const uint32_t* from;
    uint32_t address;
    void* pc;
};

void check_uniform(const Warp& warp, const Access& mine) {
    if (mine.address != static_cast<const Access*>(warp.operands[0])->address)
        fail_at(mine.pc, "the lanes of a warp name different places of tensor memory");
}

// Row and column of register `i` of a lane: a lane's own row, or as accumulators of a warp's product lie.
struct Place {
    uint32_t row, column;
};
Place of_row(uint32_t lane, uint32_t i) { return {lane, i}; }
Place of_tile(uint32_t lane, uint32_t i) { return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2}; }

template <uint32_t N, uint32_t Lanes, Place (*Of)(uint32_t, uint32_t)>
void load(Warp& warp) {
    for (uint32_t lane = 0; lane < LANES; ++lane) {
        const Access& mine = *static_cast<Access*>(warp.operands[lane]);
        check_uniform(warp, mine);
        Fibre& fibre = cluster.fibres[self().warp * LANES + lane];
        Load load = {mine.to, N, {}};
        for (uint32_t i = 0; i < N; ++i) {
            const Place place = Of(lane, i);
            Cell& cell = touch(fibre, mine.address, Lanes, place.row, place.column, "load", mine.pc);
            const uint32_t column = (mine.address & 0xffff) + place.column;
            if (!cell.written) fail_at(mine.pc, "load of column %u of tensor memory, which was never written", column);
            if (cell.unwaited)
                fail_at(mine.pc, "load of column %u of tensor memory, stored without tmem_store_wait", column);
            cell.reader = access_of(fibre);
            load.values[i] = __builtin_bit_cast(float, cell.value);
            mine.to[i] = NAN;
        }
        loads[&fibre].push_back(load);
    }
}

} // namespace

void tmem_load(float (&d)[8], uint32_t address) {
    Access access = {d, nullptr, address, __builtin_return_address(0)};
    collective(WarpOp::tensor_load, &access, load<8, 32, of_row>);
}

void tmem_load_tile(float (&d)[32], uint32_t address) {
    Access access = {d, nullptr, address, __builtin_return_address(0)};
    collective(WarpOp::tensor_load, &access, load<32, 16, of_tile>);
}

void tmem_load_wait() {
    collective(WarpOp::tensor_wait, nullptr, [](Warp&) {
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            auto& mine = loads[&cluster.fibres[self().warp * LANES + lane]];
            for (const Load& load : mine) memcpy(load.to, load.values, load.n * sizeof(float));
            mine.clear();
        }
    });
}

void tmem_store_tile(uint32_t address, const uint32_t (&d)[32]) {
    Access access = {nullptr, d, address, __builtin_return_address(0)};
    collective(WarpOp::tensor_store, &access, [](Warp& warp) {
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            const Access& mine = *static_cast<Access*>(warp.operands[lane]);
            check_uniform(warp, mine);
            Fibre& fibre = cluster.fibres[self().warp * LANES + lane];
            for (uint32_t i = 0; i < 32; ++i) {
                const Place place = of_tile(lane, i);
                Cell& cell = touch(fibre, mine.address, 16, place.row, place.column, "store", mine.pc);
                const uint32_t column = (mine.address & 0xffff) + place.column;
                if (cell.read_time > own_warp().clock[async_warp()])
                    fail_at(mine.pc, "store of column %u of tensor memory, unordered after the product that reads it", column);
                if (!is_after(cell.reader))
                    fail_at(mine.pc, "store of column %u of tensor memory, unordered after a load by warp %u", column,
                            cell.reader.warp);
                cell.value = mine.from[i], cell.time = 0, cell.written = cell.unwaited = true;
                cell.writer = access_of(fibre), cell.reader = CellAccess();
                stores[&fibre].push_back(&cell);
            }
        }
    });
}

void tmem_store_wait() {
    collective(WarpOp::tensor_store_wait, nullptr, [](Warp&) {
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            auto& mine = stores[&cluster.fibres[self().warp * LANES + lane]];
            for (Cell* cell : mine) cell->unwaited = false;
            mine.clear();
        }
    });
}

} // namespace emu
