// Shared memory of the emulated blocks and what is watched there.
//
// Kernels are compiled with `-fsanitize=thread` and linked without its library: every load and
// store calls one of the entry points at the end of this file. (In the sanitizers' build none does, and of what
// follows only the bounds are checked; see `sanitizers.h`.) They find: reads of shared memory
// that was never written, races on shared memory, accesses outside of shared memory or of a buffer.
//
// Races: an access must be ordered after every earlier conflicting one, by a barrier or by an
// operation of the warp. Each warp has a vector clock; of each byte the last writer is kept, and
// its last readers from two warps. Asynchronous copies count as one more warp, whose time a warp
// learns from the barrier it waits for.
//
// Proxies: what ordinary stores wrote may be read by tensor cores or overwritten by an asynchronous
// copy only after the writing thread has executed `fence_proxy_async`.
#include <stdlib.h>
#include <string.h>

#include "sanitizers.h"
#include "state.h"

namespace emu {

namespace {

// A block's shared memory begins at a multiple of this.
constexpr size_t STRIDE = 256 * 1024;
constexpr uint8_t SEVERAL = 0xff;

struct Access {
    uint32_t clock = 0; // 0: none
    uint16_t warp = 0;
    uint8_t lane = 0;
};
struct Shadow {
    Access writer, reader, other_reader;
    uint32_t fences = 0; // of the writer when it wrote
    bool written = false, by_store = false;
};

char* const shared_start = reserve(STRIDE * MAX_CLUSTER);
size_t shared_bytes;
std::vector<Shadow> shadow; // of all blocks of the cluster, `shared_bytes` each

bool is_shared(const char* p) { return p >= shared_start && p < shared_start + STRIDE * MAX_CLUSTER; }

bool is_before(const Access& access, const Fibre& fibre) {
    if (access.clock == 0) return true;
    const Warp& warp = cluster.warps[fibre.warp];
    if (access.warp != fibre.warp) return access.clock <= warp.clock[access.warp];
    return access.lane == fibre.lane || access.clock < warp.clock[fibre.warp];
}

// Whether the byte was stored by a thread that has executed no proxy fence since.
bool is_dirty(const Shadow& s) {
    return s.by_store && cluster.fibres[s.writer.warp * LANES + s.writer.lane].fences == s.fences;
}

void read_by(Shadow& s, const Access& now) {
    Access& slot = s.reader.clock == 0 || s.reader.warp == now.warp ? s.reader : s.other_reader;
    const bool several = slot.clock == now.clock && slot.warp == now.warp && slot.lane != now.lane;
    slot = now;
    if (several) slot.lane = SEVERAL;
}

Shadow* shadow_of(uint32_t rank, size_t offset) { return &shadow[rank * shared_bytes + offset]; }

void check_bounds(size_t offset, size_t bytes, bool is_write, void* pc) {
    if (offset + bytes > shared_bytes)
        fail_at(pc, "%s of %zu bytes at shared offset %zu, the block has %zu",
                is_write ? "store" : "load", bytes, offset, shared_bytes);
}

[[noreturn]] void fail_race(void* pc, size_t offset, bool is_write, const Access& other, bool other_writes) {
    const char* what = is_write ? "store" : "load";
    if (other.warp == async_warp())
        fail_at(pc, "race at shared offset %zu: %s, unordered after an asynchronous copy", offset, what);
    fail_at(pc, "race at shared offset %zu: %s, unordered after a %s by warp %u lane %u", offset, what,
            other_writes ? "store" : "load", other.warp, other.lane);
}

// A tensor core reads the byte, for somebody whom `is_ordered` says to come after its writer.
template <class Ordered>
void check_tensor_core(const Shadow& s, size_t offset, const Ordered& is_ordered, void* pc) {
    if (!s.written) fail_at(pc, "a tensor core reads shared offset %zu, which was never written", offset);
    if (!is_ordered(s.writer)) fail_race(pc, offset, false, s.writer, true);
    if (is_dirty(s))
        fail_at(pc, "a tensor core reads shared offset %zu, stored by warp %u lane %u without fence_proxy_async", offset,
                s.writer.warp, s.writer.lane);
}

// An access of the running thread; `is_store` is false for what an asynchronous copy will write.
void check_shared(uint32_t rank, size_t offset, size_t bytes, bool is_write, bool is_store, void* pc) {
    check_bounds(offset, bytes, is_write, pc);
    if (!SEES_ACCESSES) return;
    const Fibre& fibre = self();
    const Access now = {cluster.warps[fibre.warp].clock[fibre.warp], static_cast<uint16_t>(fibre.warp),
                        static_cast<uint8_t>(fibre.lane)};
    Shadow* s = shadow_of(rank, offset);
    for (size_t i = offset; i < offset + bytes; ++i, ++s) {
        if (!is_before(s->writer, fibre)) fail_race(pc, i, is_write, s->writer, true);
        if (is_write) {
            for (const Access* reader : {&s->reader, &s->other_reader})
                if (!is_before(*reader, fibre)) fail_race(pc, i, true, *reader, false);
            s->writer = now, s->reader = s->other_reader = Access();
            s->written = true, s->by_store = is_store, s->fences = fibre.fences;
            continue;
        }
        if (!s->written) fail_at(pc, "load of shared offset %zu, which was never written", i);
        read_by(*s, now);
    }
}

} // namespace

void memory_start(size_t bytes) {
    if (bytes > 227 * 1024) FAIL("%zu bytes of shared memory; no block has more than 232448", bytes);
    shared_bytes = bytes;
    for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
        char* start = shared_start + rank * STRIDE;
        permit(start, bytes);
        forbid(start + bytes, STRIDE - bytes);
        memset(start, 0xff, bytes);
    }
    shadow.assign(bytes * cluster.blocks.size(), Shadow());
}

void* shared_memory(size_t bytes) {
    if (bytes > shared_bytes)
        FAIL("uses %zu bytes of shared memory, launched with %zu", bytes, shared_bytes);
    return shared_start + current->rank * STRIDE;
}

uint32_t shared_address(const void* p) {
    const char* byte = static_cast<const char*>(p);
    if (!is_shared(byte)) FAIL("an address that is not in shared memory");
    const size_t at = byte - shared_start;
    return static_cast<uint32_t>(at / STRIDE << 24 | at % STRIDE);
}

char* shared_at(uint32_t address) {
    return shared_start + (address >> 24) * STRIDE + (address & 0xffffffu);
}

void shared_poison(const void* p, size_t bytes) {
    memset(const_cast<void*>(p), 0xff, bytes);
    const uint32_t address = shared_address(p);
    Shadow* s = shadow_of(address >> 24, address & 0xffffffu);
    for (size_t i = 0; i < bytes; ++i) s[i].written = false;
}

void shared_landed(const void* p, size_t bytes, uint32_t clock) {
    const uint32_t address = shared_address(p);
    Shadow* s = shadow_of(address >> 24, address & 0xffffffu);
    for (size_t i = 0; i < bytes; ++i) {
        s[i].writer = {clock, static_cast<uint16_t>(async_warp()), 0};
        s[i].written = true, s[i].by_store = false;
    }
}

void check_not_dirty(const void* p, size_t bytes, void* pc) {
    const uint32_t address = shared_address(p);
    check_bounds(address & 0xffffffu, bytes, true, pc);
    if (!SEES_ACCESSES) return;
    const Shadow* s = shadow_of(address >> 24, address & 0xffffffu);
    for (size_t i = 0; i < bytes; ++i)
        if (is_dirty(s[i]))
            fail_at(pc, "an asynchronous copy to shared offset %zu, stored to by warp %u lane %u without "
                        "fence_proxy_async", (address & 0xffffffu) + i, s[i].writer.warp, s[i].writer.lane);
}

void check_async_read(uint32_t rank, size_t offset, size_t bytes, uint32_t warp) {
    void* pc = __builtin_return_address(0);
    check_bounds(offset, bytes, false, pc);
    if (!SEES_ACCESSES) return;
    const Fibre& first = cluster.fibres[warp * LANES];
    const uint32_t clock = cluster.warps[warp].clock[warp];
    Shadow* s = shadow_of(rank, offset);
    for (size_t i = offset; i < offset + bytes; ++i, ++s) {
        // Same-warp stores count as ordered only after a later operation of the warp; the fence is one.
        check_tensor_core(*s, i, [&](const Access& writer) { return writer.warp == warp || is_before(writer, first); }, pc);
        // All four warps of the group read; the first and the last stand for them.
        s->reader = {clock, static_cast<uint16_t>(warp), SEVERAL};
        const uint32_t other = warp + GROUP_WARPS - 1;
        s->other_reader = {cluster.warps[other].clock[other], static_cast<uint16_t>(other), SEVERAL};
    }
}

void check_started_read(size_t offset, size_t bytes, uint32_t time, void* pc) {
    check_bounds(offset, bytes, false, pc);
    if (!SEES_ACCESSES) return;
    const Fibre& fibre = self();
    Shadow* s = shadow_of(fibre.rank, offset);
    for (size_t i = offset; i < offset + bytes; ++i, ++s) {
        check_tensor_core(*s, i, [&](const Access& writer) { return is_before(writer, fibre); }, pc);
        read_by(*s, {time, static_cast<uint16_t>(async_warp()), 0});
    }
}

// Whether what (warp, lane) did at `clock` is ordered before the running thread.
bool is_seen(uint32_t warp, uint32_t lane, uint32_t clock) {
    return is_before({clock, static_cast<uint16_t>(warp), static_cast<uint8_t>(lane)}, self());
}

void check_access(const void* p, size_t bytes, bool is_write, void* pc) {
    const char* byte = static_cast<const char*>(p);
    if (!is_shared(byte) && !is_global(byte)) return;
    if (bytes && bytes <= 16 && !(bytes & (bytes - 1)) && reinterpret_cast<uintptr_t>(p) % bytes)
        fail_at(pc, "%zu bytes at an address that is no multiple of it", bytes);
    if (is_shared(byte)) {
        if (!current) return;
        const uint32_t address = shared_address(p);
        if (address >> 24 != current->rank)
            fail_at(pc, "a plain access to the shared memory of block %u of the cluster", address >> 24);
        check_shared(address >> 24, address & 0xffffffu, bytes, is_write, true, pc);
    } else {
        check_global(byte, bytes, is_write, pc);
    }
}

void check_remote(uint32_t address, size_t bytes, void* pc) {
    const uint32_t rank = address >> 24;
    if (rank >= cluster.blocks.size()) fail_at(pc, "shared memory of block %u; the cluster has %zu", rank,
                                               cluster.blocks.size());
    if (cluster.blocks[rank].live == 0) fail_at(pc, "shared memory of block %u, which has ended", rank);
    check_shared(rank, address & 0xffffffu, bytes, true, true, pc);
}

// Atomics are not ordered against each other, so they are no races; a plain access beside them
// that needs a barrier is not found.
static void check_atomic(const void* p, size_t bytes, void* pc) {
    const char* byte = static_cast<const char*>(p);
    if (is_shared(byte)) {
        const uint32_t address = shared_address(p);
        const size_t offset = address & 0xffffffu;
        if (offset + bytes > shared_bytes || (SEES_ACCESSES && !shadow_of(address >> 24, offset)->written))
            fail_at(pc, "atomic on shared offset %zu, which was never written", offset);
    } else {
        check_access(p, bytes, true, pc);
    }
}

void atomic_add64(unsigned long long* p, unsigned long long x) {
    check_atomic(p, sizeof *p, __builtin_return_address(0));
    *p += x;
}

uint32_t atomic_add(uint32_t* p, uint32_t x) {
    check_atomic(p, sizeof *p, __builtin_return_address(0));
    const uint32_t old = *p;
    *p = old + x;
    return old;
}

} // namespace emu

#define PC __builtin_return_address(0)
#define ACCESS(n)                                                                          \
    void __tsan_read##n(void* p) { emu::check_access(p, n, false, PC); }                   \
    void __tsan_write##n(void* p) { emu::check_access(p, n, true, PC); }                   \
    void __tsan_unaligned_read##n(void* p) { emu::check_access(p, n, false, PC); }         \
    void __tsan_unaligned_write##n(void* p) { emu::check_access(p, n, true, PC); }         \
    void __tsan_volatile_read##n(void* p) { emu::check_access(p, n, false, PC); }          \
    void __tsan_volatile_write##n(void* p) { emu::check_access(p, n, true, PC); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { emu::check_access(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { emu::check_access(p, n, true, PC); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    emu::check_access(from, n, false, PC);
    emu::check_access(to, n, true, PC);
    return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
    emu::check_access(to, n, true, PC);
    return memset(to, value, n);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
