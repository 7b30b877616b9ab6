// The block emulator: runs kernels thread by thread on a CPU. This is what kernels see of it.
//
// Threads are fibres of one OS thread; a block runs to its end before the next starts. A thread
// gives up the core only at an operation of its warp or block, so what depends on lockstep without
// a synchronisation fails here, as it may on a GPU. An error prints one line beginning
// "emulator: " and ends the process.
//
// Not here: what the operations mean (`warp.cpp`, `sync.cpp`, `copy.cpp`), who runs when
// (`scheduler.cpp`), memory and races (`memory.cpp`), the protocol with the tests (`serve.cpp`).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

namespace emu {

struct Dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

// A thread of the block that is running.
struct Thread {
    Dim3 thread, block_id;
    uint32_t index; // in the block
    void* stack_pointer;
};

struct Launch {
    Dim3 grid, block;
    size_t shared_bytes;
};

extern Thread* current;
extern Launch launch;

// A kernel by name; made by EMU_KERNEL.
struct Kernel {
    const char* name;
    void (*run)(void**);
    const Kernel* next;
    Kernel(const char* name, void (*run)(void**));
    static const Kernel* find(const char* name);
};

template <class... Args, size_t... I>
void invoke_at(void (*kernel)(Args...), void** p, std::index_sequence<I...>) {
    kernel(*static_cast<Args*>(p[I])...);
}
template <class... Args>
void invoke(void (*kernel)(Args...), void** p) {
    invoke_at(kernel, p, std::index_sequence_for<Args...>());
}

void* shared_memory(size_t bytes);
uint32_t shared_offset(const void* p);

void barrier(uint32_t id, uint32_t n_threads);
void warp_sync();
uint32_t shuffle(uint32_t value, uint32_t lane);
uint32_t ballot(bool predicate);
uint32_t atomic_add(uint32_t* p, uint32_t x);

void cp_async(void* destination, const void* source, uint32_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(uint32_t pending);

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

} // namespace emu
