// Memory of the emulated device and what is watched there.
//
// Kernels are compiled with `-fsanitize=thread` and linked without its library: every load and
// store calls one of the entry points at the end of this file. They find: reads of shared memory
// that was never written, races on shared memory, accesses outside of shared memory or of a buffer.
//
// Races: an access must be ordered after every earlier conflicting one, by a barrier or by an
// operation of the warp. Each warp has a vector clock; of each byte the last writer is kept, and
// its last readers from two warps.
//
// Global buffers lie in one reserved range with gaps between them, filled with 0xFF (NaN).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "state.h"

namespace emu {

namespace {

constexpr size_t GLOBAL_BYTES = size_t{16} << 30, SHARED_BYTES = 1 << 20, GAP = 4096;
constexpr uint8_t SEVERAL = 0xff;

struct Access {
    uint32_t clock = 0; // 0: none
    uint8_t warp = 0, lane = 0;
};
struct Shadow {
    Access writer, reader, other_reader;
    bool written = false;
};

char* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("memory"), exit(2);
    return static_cast<char*>(p);
}

char* const global_start = reserve(GLOBAL_BYTES);
char* const shared_start = reserve(SHARED_BYTES);
uint64_t global_next = GAP;
std::map<uint64_t, uint64_t> buffers; // address -> bytes
size_t shared_bytes;
std::vector<Shadow> shadow;

bool is_before(const Access& access, const Fibre& fibre) {
    if (access.clock == 0) return true;
    const Warp& warp = block.warps[fibre.warp];
    if (access.warp != fibre.warp) return access.clock <= warp.clock[access.warp];
    return access.lane == fibre.lane || access.clock < warp.clock[fibre.warp];
}

void check_shared(size_t offset, size_t bytes, bool is_write, void* pc) {
    if (offset + bytes > shared_bytes)
        fail_at(pc, "%s of %zu bytes at shared offset %zu, the block has %zu",
                is_write ? "store" : "load", bytes, offset, shared_bytes);
    const Fibre& fibre = self();
    const Access now = {block.warps[fibre.warp].clock[fibre.warp], static_cast<uint8_t>(fibre.warp),
                        static_cast<uint8_t>(fibre.lane)};
    for (size_t i = offset; i < offset + bytes; ++i) {
        Shadow& s = shadow[i];
        const Access* conflict = nullptr;
        if (!is_before(s.writer, fibre)) conflict = &s.writer;
        if (is_write && !is_before(s.reader, fibre)) conflict = &s.reader;
        if (is_write && !is_before(s.other_reader, fibre)) conflict = &s.other_reader;
        if (conflict)
            fail_at(pc, "race at shared offset %zu: %s, unordered after a %s by warp %u lane %u", i,
                    is_write ? "store" : "load", conflict == &s.writer ? "store" : "load",
                    conflict->warp, conflict->lane);
        if (is_write) {
            s.writer = now, s.reader = s.other_reader = Access(), s.written = true;
            continue;
        }
        if (!s.written) fail_at(pc, "load of shared offset %zu, which was never written", i);
        Access& slot = s.reader.clock == 0 || s.reader.warp == now.warp ? s.reader : s.other_reader;
        const bool several = slot.clock == now.clock && slot.warp == now.warp && slot.lane != now.lane;
        slot = now;
        if (several) slot.lane = SEVERAL;
    }
}

void check_global(const char* p, size_t bytes, bool is_write, void* pc) {
    static uint64_t start = 1, end = 0; // the buffer of the last access
    const uint64_t address = reinterpret_cast<uint64_t>(p);
    if (address >= start && address + bytes <= end) return;
    auto next = buffers.upper_bound(address);
    if (next != buffers.begin()) {
        --next;
        start = next->first, end = start + next->second;
        if (address + bytes <= end) return;
        const size_t over = address + bytes - end;
        start = 1, end = 0;
        if (over < GAP)
            fail_at(pc, "%s of %zu bytes ends %zu bytes behind a buffer of %zu bytes",
                    is_write ? "store" : "load", bytes, over, static_cast<size_t>(next->second));
    }
    fail_at(pc, "%s of %zu bytes outside of every buffer", is_write ? "store" : "load", bytes);
}

} // namespace

void memory_start(size_t bytes) {
    if (bytes > 227 * 1024) FAIL("%zu bytes of shared memory; no block has more than 232448", bytes);
    shared_bytes = bytes;
    block.shared = shared_start;
    memset(shared_start, 0xff, bytes);
    shadow.assign(bytes, Shadow());
}

void* shared_memory(size_t bytes) {
    if (bytes > shared_bytes)
        FAIL("uses %zu bytes of shared memory, launched with %zu", bytes, shared_bytes);
    return shared_start;
}

uint32_t shared_offset(const void* p) {
    const char* byte = static_cast<const char*>(p);
    if (byte < shared_start || byte >= shared_start + SHARED_BYTES)
        FAIL("an address that is not in shared memory");
    return static_cast<uint32_t>(byte - shared_start);
}

void shared_poison(const void* p, size_t bytes) {
    memset(const_cast<void*>(p), 0xff, bytes);
    for (size_t i = 0; i < bytes; ++i) shadow[shared_offset(p) + i].written = false;
}

void shared_written(const void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) shadow[shared_offset(p) + i].written = true;
}

void check_access(const void* p, size_t bytes, bool is_write, void* pc) {
    const char* byte = static_cast<const char*>(p);
    if (byte >= shared_start && byte < shared_start + SHARED_BYTES) {
        if (current) check_shared(byte - shared_start, bytes, is_write, pc);
    } else if (byte >= global_start && byte < global_start + GLOBAL_BYTES) {
        if (reinterpret_cast<uintptr_t>(p) % bytes && bytes <= 16 && !(bytes & (bytes - 1)))
            fail_at(pc, "%zu bytes at an address that is no multiple of it", bytes);
        check_global(byte, bytes, is_write, pc);
    }
}

// Atomics are not ordered against each other, so they are no races; a plain access beside them
// that needs a barrier is not found.
uint32_t atomic_add(uint32_t* p, uint32_t x) {
    void* pc = __builtin_return_address(0);
    const char* byte = reinterpret_cast<const char*>(p);
    if (byte >= shared_start && byte < shared_start + SHARED_BYTES) {
        const size_t offset = byte - shared_start;
        if (offset + 4 > shared_bytes || !shadow[offset].written)
            fail_at(pc, "atomic on shared offset %zu, which was never written", offset);
    } else {
        check_access(p, 4, true, pc);
    }
    const uint32_t old = *p;
    *p = old + x;
    return old;
}

uint64_t allocate(uint64_t bytes) {
    const uint64_t start = reinterpret_cast<uint64_t>(global_start) + global_next;
    global_next += (bytes + GAP + 255) / 256 * 256;
    if (global_next > GLOBAL_BYTES) fprintf(stderr, "emulator: out of memory\n"), exit(2);
    buffers[start] = bytes;
    memset(reinterpret_cast<void*>(start), 0xff, bytes);
    return start;
}

void release(uint64_t address) {
    const auto found = buffers.find(address);
    if (found == buffers.end()) return;
    const uint64_t first = (address + 4095) / 4096 * 4096;
    const uint64_t last = (address + found->second) / 4096 * 4096;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    buffers.erase(found);
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
