// What the parts of the emulated tensor memory know of each other: its cells (`tmem.cpp`), the work of
// tensor cores that reads and writes them (`tmem_products.cpp`).
#pragma once

#include <deque>
#include <map>

#include "state.h"

namespace emu {

constexpr uint32_t TENSOR_LANES = 128, TENSOR_COLUMNS = 512;

// An access by a thread.
struct CellAccess {
    uint32_t clock = 0; // 0: none
    uint16_t warp = 0;
    uint8_t lane = 0;
};
struct Cell {
    uint32_t value = 0;
    uint32_t time = 0;      // of its writer among asynchronous work; 0: a thread, or nobody
    uint32_t read_time = 0; // of its last reader among asynchronous work
    CellAccess writer, reader;
    bool written = false;
    bool unwaited = false; // stored, and the store not waited for
};

enum class TensorKind { copy, scaled, bf16, commit };
struct TensorWork {
    TensorKind kind;
    ScaledProduct scaled; // copy: `d` and `a_matrix`
    Bf16Product bf16;
    uint64_t barrier;
    uint32_t time;
};

struct TensorMemory {
    Cell cells[TENSOR_LANES][TENSOR_COLUMNS];
    bool allocated[TENSOR_COLUMNS] = {};
    std::map<uint32_t, uint32_t> ranges; // first column, columns
    std::deque<TensorWork> queue;
};

// tmem.cpp
TensorMemory& own_tensor_memory(void* pc);
void check_columns(const TensorMemory& memory, uint32_t first, uint32_t n, void* pc);
// The running thread starts work that reads `n` columns of a lane from now on, or writes them.
void start_read(TensorMemory& memory, uint32_t lane, uint32_t first, uint32_t n, uint32_t time, void* pc);
void start_write(TensorMemory& memory, uint32_t lane, uint32_t first, uint32_t n, uint32_t time, bool adds, void* pc);
void issue(TensorMemory& memory, const TensorWork& work);
// tmem_products.cpp
void run_copy(TensorMemory& memory, const ScaledProduct& copy, uint32_t rank);
void run_scaled(TensorMemory& memory, const ScaledProduct& product, uint32_t rank);
void run_bf16(TensorMemory& memory, const Bf16Product& product, uint32_t rank);

} // namespace emu
