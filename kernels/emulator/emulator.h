// The block emulator: runs kernels thread by thread on a CPU. This is what kernels see of it.
//
// Threads are fibres of one OS thread; the blocks of a cluster run together, and a cluster runs to
// its end before the next starts. A thread gives up the core only at an operation of its warp,
// warpgroup, block or cluster, so what depends on lockstep without a synchronisation fails here, as
// it may on a GPU. An error prints one line beginning "emulator: " and ends the process.
//
// Not here: what the operations mean (`warp.cpp`, `wgmma.cpp`, `sync.cpp`, `mbarrier.cpp`,
// `copy.cpp`, `tmem.cpp`, `tmem_products.cpp`), who runs when (`scheduler.cpp`), memory and races (`memory.cpp`, `global.cpp`), the
// protocol with the tests (`serve.cpp`).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

namespace emu {

struct Dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

// A thread of the cluster that is running.
struct Thread {
    Dim3 thread, block_id;
    uint32_t index; // in the block
    uint32_t rank;  // of the block in its cluster
    void* stack_pointer;
};

struct Launch {
    Dim3 grid, block;
    size_t shared_bytes;
    uint32_t cluster;
};

extern Thread* current;
extern Launch launch;

// What a kernel says of itself beside its code.
struct Options {
    uint32_t cluster = 1;   // blocks of a cluster, along x
    bool dependent = false; // as in the manifest; a planted error's own
};

// A kernel by name; made by EMU_KERNEL.
struct Kernel {
    const char* name;
    void (*run)(void**);
    std::vector<uint32_t> sizes; // of its parameters, in bytes
    Options options;
    const Kernel* next;
    Kernel(const char* name, void (*run)(void**), std::vector<uint32_t> sizes, Options options);
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

template <class... Args>
std::vector<uint32_t> sizes_of(void (*)(Args...)) {
    return {static_cast<uint32_t>(sizeof(Args))...};
}

void* shared_memory(size_t bytes);
// Offset in the block's shared memory, with the block's rank in bits 24 and up.
uint32_t shared_address(const void* p);

void barrier(uint32_t id, uint32_t n_threads);
void warp_sync();
uint32_t shuffle(uint32_t value, uint32_t lane);
uint32_t ballot(bool predicate);
bool elect();
uint32_t atomic_add(uint32_t* p, uint32_t x);
uint32_t e4m3_pair(float low, float high);
void atomic_add64(unsigned long long* p, unsigned long long x);

void cp_async(void* destination, const void* source, uint32_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(uint32_t pending);

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void fence_mbarrier_init();
void fence_proxy_async();
void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier);
void tensor_load(void* destination, const void* map, uint32_t rank, const uint32_t* at, uint64_t* barrier);

void cluster_arrive();
void cluster_wait();
void cluster_store(uint32_t address, uint32_t value);
void set_registers(uint32_t n);
void dependency_wait();
void prefetch(const void* p, uint32_t bytes);

enum class Input { e4m3, bf16 };
// One warpgroup product d[64][n] (+)= a b. `a`: four registers, or null for `a_matrix`.
struct Wgmma {
    Input input;
    uint32_t n;
    float* d;
    const uint32_t* a;
    uint64_t a_matrix, b_matrix;
    bool b_is_mn_major, accumulate;
};
void wgmma(const Wgmma& operands);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t pending);

// One product of `mma_scaled`, as the instruction takes it.
struct ScaledProduct {
    uint32_t d;
    uint64_t a_matrix, b_matrix;
    uint32_t kind, a_scales, b_scales;
    bool accumulate;
};
// One product of `mma_bf16` or `mma_bf16_shared`. `a_matrix`: a descriptor, or an address of tensor memory.
struct Bf16Product {
    uint32_t d;
    uint64_t a_matrix, b_matrix;
    uint32_t kind;
    bool a_is_shared, accumulate;
};
void tmem_alloc(uint32_t* to, uint32_t columns);
void tmem_dealloc(uint32_t address, uint32_t columns);
void tmem_fence_before();
void tmem_fence_after();
void tmem_copy_scales(uint32_t to, uint64_t matrix);
void mma_scaled(const ScaledProduct& operands);
void tensor_bf16(const Bf16Product& operands);
void tmem_commit(uint64_t* barrier);
void tmem_load(float (&d)[8], uint32_t address);
void tmem_load_tile(float (&d)[32], uint32_t address);
void tmem_load_wait();
void tmem_store_tile(uint32_t address, const uint32_t (&d)[32]);
void tmem_store_wait();

} // namespace emu
