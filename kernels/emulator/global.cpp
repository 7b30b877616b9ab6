// Global memory: buffers in one reserved range with gaps between them, filled with 0xFF (NaN).
//
// A dependent launch may start before those before it have ended, however many they are. So a thread of
// it waits for them (`dependency_wait`) before it reads anything but weights, which no such launch
// writes, and before it writes at all; and a thread of each block does, since the launch after it takes
// its end for theirs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "sanitizers.h"
#include "state.h"

namespace emu {

namespace {

constexpr size_t GLOBAL_BYTES = size_t{16} << 30, GAP = 4096, FORBIDDEN_BEHIND = 1 << 20;

struct Allocation {
    uint64_t start, bytes;
    bool holds_weights;
};

char* const global_start = reserve(GLOBAL_BYTES);
uint64_t global_next = GAP;
std::map<uint64_t, Allocation> buffers; // by address
uint64_t releases = 0;

void check_dependency(const Allocation& buffer, bool is_write, void* pc) {
    if (!cluster.options.dependent || !current) return;
    if (is_write && buffer.holds_weights) fail_at(pc, "stores to weights, which the launch after it may read any time");
    if (self().has_waited_for_launch) return;
    if (is_write) fail_at(pc, "stores before it has waited for the launch before it");
    if (!buffer.holds_weights) fail_at(pc, "loads what is no weight before it has waited for the launch before it");
}

} // namespace

char* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("memory"), exit(2);
    return static_cast<char*>(p);
}

bool is_global(const char* p) { return p >= global_start && p < global_start + GLOBAL_BYTES; }

void dependency_wait() { self().has_waited_for_launch = true; }

void dependencies_at_exit() {
    if (!cluster.options.dependent) return;
    std::vector<bool> waited(launch.cluster);
    for (const Fibre& fibre : cluster.fibres)
        if (fibre.has_waited_for_launch) waited[fibre.rank] = true;
    for (uint32_t rank = 0; rank < launch.cluster; ++rank)
        if (!waited[rank]) FAIL("a block ends without having waited for the launch before it");
}

void prefetch(const void* p, uint32_t bytes) {
    void* pc = __builtin_return_address(0);
    if (bytes % 16 || reinterpret_cast<uintptr_t>(p) % 16)
        fail_at(pc, "a prefetch of %u bytes: length and address must be multiples of 16", bytes);
    check_global(static_cast<const char*>(p), bytes, false, pc);
}

void check_global(const char* p, size_t bytes, bool is_write, void* pc) {
    static Allocation* last = nullptr; // of the last access; map nodes do not move
    static uint64_t last_generation = 0;
    const uint64_t address = reinterpret_cast<uint64_t>(p);
    if (last && last_generation == releases && address >= last->start &&
        address + bytes <= last->start + last->bytes) {
        check_dependency(*last, is_write, pc);
        return;
    }
    auto next = buffers.upper_bound(address);
    if (next != buffers.begin()) {
        Allocation& buffer = (--next)->second;
        const uint64_t end = buffer.start + buffer.bytes;
        if (address + bytes <= end) {
            last = &buffer, last_generation = releases;
            check_dependency(buffer, is_write, pc);
            return;
        }
        const size_t over = address + bytes - end;
        if (over < GAP)
            fail_at(pc, "%s of %zu bytes ends %zu bytes behind a buffer of %zu bytes",
                    is_write ? "store" : "load", bytes, over, static_cast<size_t>(buffer.bytes));
    }
    fail_at(pc, "%s of %zu bytes outside of every buffer", is_write ? "store" : "load", bytes);
}

uint64_t allocate(uint64_t bytes) {
    const uint64_t start = reinterpret_cast<uint64_t>(global_start) + global_next;
    global_next += (bytes + GAP + 255) / 256 * 256;
    if (global_next > GLOBAL_BYTES) fprintf(stderr, "emulator: out of memory\n"), exit(2);
    buffers[start] = {start, bytes, false};
    // All that comes later would take as much memory again to forbid.
    forbid(reinterpret_cast<void*>(start - GAP), GAP + bytes + FORBIDDEN_BEHIND);
    permit(reinterpret_cast<void*>(start), bytes);
    memset(reinterpret_cast<void*>(start), 0xff, bytes);
    return start;
}

void hold_weights(uint64_t address) {
    const auto found = buffers.find(address);
    if (found != buffers.end()) found->second.holds_weights = true;
}

void release(uint64_t address) {
    const auto found = buffers.find(address);
    if (found == buffers.end()) return;
    const uint64_t first = (address + 4095) / 4096 * 4096;
    const uint64_t last = (address + found->second.bytes) / 4096 * 4096;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    forbid(reinterpret_cast<void*>(address), found->second.bytes);
    buffers.erase(found);
    ++releases;
}

} // namespace emu
