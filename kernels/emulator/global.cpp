// Global memory: buffers in one reserved range with gaps between them, filled with 0xFF (NaN).
//
// A kernel that may start before the launch before it has ended must wait for it
// (`dependency_wait`) before it reads what that launch wrote, and before it writes anything. When
// the host has read something, all launches before have ended.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "state.h"

namespace emu {

namespace {

constexpr size_t GLOBAL_BYTES = size_t{16} << 30, GAP = 4096;

struct Allocation {
    uint64_t start, bytes;
    uint64_t written_by; // number of a launch
};

char* const global_start = reserve(GLOBAL_BYTES);
uint64_t global_next = GAP, launch_number = 1; // buffers no launch wrote have 0
std::map<uint64_t, Allocation> buffers; // by address
uint64_t releases = 0;

void check_dependency(Allocation& buffer, bool is_write, void* pc) {
    if (cluster.options.dependent && current && !self().has_waited_for_launch) {
        if (is_write) fail_at(pc, "stores before it has waited for the launch before it");
        if (buffer.written_by + 1 == launch_number)
            fail_at(pc, "loads what the launch before it wrote without waiting for that launch");
    }
    if (is_write) buffer.written_by = launch_number;
}

} // namespace

char* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("memory"), exit(2);
    return static_cast<char*>(p);
}

bool is_global(const char* p) { return p >= global_start && p < global_start + GLOBAL_BYTES; }

void launch_starts() { ++launch_number; }

void dependency_wait() { self().has_waited_for_launch = true; }

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
    buffers[start] = {start, bytes, 0};
    memset(reinterpret_cast<void*>(start), 0xff, bytes);
    return start;
}

void release(uint64_t address) {
    const auto found = buffers.find(address);
    if (found == buffers.end()) return;
    const uint64_t first = (address + 4095) / 4096 * 4096;
    const uint64_t last = (address + found->second.bytes) / 4096 * 4096;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    buffers.erase(found);
    ++releases;
}

} // namespace emu
