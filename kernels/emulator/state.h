// What the parts of the emulator know of each other. Not included by kernels.
#pragma once

#include <stdarg.h>

#include <vector>

#include "emulator.h"

namespace emu {

constexpr uint32_t LANES = 32, MAX_BARRIERS = 16, MAX_CLUSTER = 16;
constexpr uint32_t GROUP_WARPS = 4, GROUP_LANES = GROUP_WARPS * LANES;

// How copies land and in which order warps run.
struct Mode {
    bool eager = false; // asynchronous work is done at issue instead of as late as allowed
    uint32_t seed = 0;  // 0: warps in ascending order
};
extern Mode mode;

// Times of all warps of the cluster as one of them knows them; the last is that of asynchronous
// copies.
using Clock = std::vector<uint32_t>;
void join(Clock& clock, const Clock& other);

struct Copy {
    char* destination;
    const char* source;
    uint32_t bytes;
    bool valid;
};

enum class State { ready, in_warp, in_group, in_barrier, in_mbarrier, in_cluster, done };

struct Mbarrier;
struct Fibre : Thread {
    State state;
    const char* stack;   // its lowest byte
    uint32_t warp, lane; // the warp is numbered within the cluster
    uint32_t barrier_id;
    uint32_t fences; // fence_proxy_async so far
    Mbarrier* waits_for;
    uint32_t parity, meeting;
    bool in_cluster_barrier, has_waited_for_launch;
    bool tensor_fenced; // tmem_fence_after since the last wait at a barrier
    bool tensor_touched; // an access to tensor memory since the last tmem_fence_before
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;
};

// An operation that all lanes of a warp take part in.
enum class WarpOp {
    none, sync, shuffle, ballot, elect, ldmatrix, mma, set_registers, tensor_alloc, tensor_dealloc, tensor_load, tensor_wait,
    tensor_store, tensor_store_wait
};

struct Warp {
    WarpOp op = WarpOp::none;
    uint32_t arrived = 0;
    void* operands[LANES];
    uint32_t registers = 0; // as set by set_registers
    // clock[v]: up to where this warp has seen warp v; clock[self] is its own time.
    Clock clock;
};

// An operation of the four warps of a warpgroup, and its products that are under way.
enum class GroupOp { none, fence, commit, wait, product };
struct Products;
struct Group {
    GroupOp op = GroupOp::none;
    uint32_t arrived = 0;
    const void* operands[GROUP_LANES];
    Products* products = nullptr;
};

// A block of the cluster.
struct Block {
    uint32_t live;
    struct {
        uint32_t arrived = 0, wanted = 0;
    } barriers[MAX_BARRIERS];
};

struct Cluster {
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    std::vector<Group> groups;
    std::vector<Block> blocks;
    const char* kernel = "";
    Options options;
};
extern Cluster cluster;

inline Fibre& self() { return *static_cast<Fibre*>(current); }
inline Warp& own_warp() { return cluster.warps[self().warp]; }
// The entry of asynchronous copies in every clock.
inline uint32_t async_warp() { return static_cast<uint32_t>(cluster.warps.size()); }

// scheduler.cpp
void run_grid(const Kernel& kernel, bool dependent, void** arguments);
void yield();
uint32_t random_below(uint32_t n);
// sync.cpp
void collective(WarpOp op, void* operand, void (*execute)(Warp&));
void collective(GroupOp op, const void* operand, void (*execute)(Group&));
void barriers_at_exit(Fibre& fibre);
void cluster_start();
// mbarrier.cpp
void mbarriers_start();
void complete_bytes(uint64_t key, uint32_t bytes, uint32_t clock);
uint64_t barrier_for_copies(uint64_t* barrier);
// An arrival of asynchronous work, at its time `clock`.
void arrive_async(uint64_t key, uint32_t clock);
void describe(const Mbarrier& barrier);
// A tensor map, innermost dimension first.
struct Map {
    uint64_t address;
    uint32_t rank, element; // bits; 4: 16 codes of 4 bits come to lie in 16 bytes
    uint32_t swizzle;       // bytes of the span, 0 for none
    uint32_t box[5];
    uint64_t dims[5], strides[4];

    uint32_t shared_bits() const { return element == 4 ? 8 : element; }
    uint32_t n_rows() const {
        uint32_t n = 1;
        for (uint32_t d = 1; d < rank; ++d) n *= box[d];
        return n;
    }
    uint32_t row_bytes() const { return box[0] * shared_bits() / 8; }
    uint32_t n_elements() const { return box[0] * n_rows(); }
};
static_assert(sizeof(Map) <= 128);

// copy.cpp
void copies_at_exit(Fibre& fibre);
bool land_one();
size_t bulk_copies_under_way();
// The next time of asynchronous work.
uint32_t next_async_time();
// tmem.cpp
void tensor_memory_start();
void tensor_memory_at_exit();
void tensor_accesses_at_exit(Fibre& fibre);
// The running thread comes to a barrier.
void check_tensor_fence(void* pc);
bool tensor_work_under_way();
void land_tensor_work();
// wgmma.cpp
void products_start();
void products_at_exit();
// memory.cpp
enum class Proxy { generic, async };
void memory_start(size_t shared_bytes);
void check_access(const void* p, size_t bytes, bool is_write, void* pc);
void check_remote(uint32_t address, size_t bytes, void* pc);
char* shared_at(uint32_t address);
void shared_poison(const void* p, size_t bytes);
// Bytes that an asynchronous copy has brought, at time `clock` of the copies.
void shared_landed(const void* p, size_t bytes, uint32_t clock);
// A read of tensor cores on behalf of `warp`.
void check_async_read(uint32_t rank, size_t offset, size_t bytes, uint32_t warp);
// A read of shared memory that the running thread starts and that goes on after it, at `time`.
void check_started_read(size_t offset, size_t bytes, uint32_t time, void* pc);
bool is_seen(uint32_t warp, uint32_t lane, uint32_t clock);
void check_not_dirty(const void* p, size_t bytes, void* pc);
// global.cpp
void check_global(const char* p, size_t bytes, bool is_write, void* pc);
bool is_global(const char* p);
void dependencies_at_exit();
uint64_t allocate(uint64_t bytes);
void hold_weights(uint64_t address);
void release(uint64_t address);
char* reserve(size_t bytes);

// Prints "emulator: KERNEL, block B, thread T: ..." with the line in the kernel, and exits.
[[noreturn]] void fail_at(void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));
#define FAIL(...) fail_at(__builtin_return_address(0), __VA_ARGS__)

} // namespace emu
