// What the parts of the emulator know of each other. Not included by kernels.
#pragma once

#include <stdarg.h>

#include <vector>

#include "emulator.h"

namespace emu {

constexpr uint32_t LANES = 32, MAX_WARPS = 32, MAX_BARRIERS = 16;

// How copies land and in which order warps run.
struct Mode {
    bool eager = false; // asynchronous copies land at issue instead of as late as allowed
    uint32_t seed = 0;  // 0: warps in ascending order
};
extern Mode mode;

struct Copy {
    char* destination;
    const char* source;
    uint32_t bytes;
    bool valid;
};

enum class State { ready, in_warp, in_barrier, done };

struct Fibre : Thread {
    State state;
    uint32_t warp, lane, barrier_id;
    void* stack;
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;
};

// An operation that all lanes of a warp take part in.
enum class WarpOp { none, sync, shuffle, ballot, ldmatrix, mma };

struct Warp {
    WarpOp op = WarpOp::none;
    uint32_t arrived = 0;
    void* operands[LANES];
    // clock[v]: up to where this warp has seen warp v; clock[self] is its own time.
    uint32_t clock[MAX_WARPS];
};

struct Block {
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    char* shared = nullptr; // start of shared memory
    const char* kernel = "";
};
extern Block block;

inline Fibre& self() { return *static_cast<Fibre*>(current); }
inline Warp& own_warp() { return block.warps[self().warp]; }

// scheduler.cpp
void run_grid(const Kernel& kernel, void** arguments);
void yield();
uint32_t random_below(uint32_t n);
// sync.cpp
void collective(WarpOp op, void* operand, void (*execute)(Warp&));
void barrier_exit(Fibre& fibre);
// copy.cpp
void copies_at_exit(Fibre& fibre);
// memory.cpp
void memory_start(size_t shared_bytes);
void check_access(const void* p, size_t bytes, bool is_write, void* pc);
void shared_poison(const void* p, size_t bytes);
void shared_written(const void* p, size_t bytes);
uint64_t allocate(uint64_t bytes);
void release(uint64_t address);

// Prints "emulator: KERNEL, block B, thread T: ..." with the line in the kernel, and exits.
[[noreturn]] void fail_at(void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));
#define FAIL(...) fail_at(__builtin_return_address(0), __VA_ARGS__)

} // namespace emu
