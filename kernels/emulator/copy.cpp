// Asynchronous copies to shared memory. Late mode moves the bytes as late as the rules allow, and
// the destination reads as never written until then; eager mode moves them at once.
//
// cp.async lands when its thread waits for its group. A bulk copy lands when no thread can run any
// more, in random order, and then counts its bytes down on its barrier.
#include <string.h>

#include "state.h"

namespace emu {

namespace {

void land(const Copy& copy, void* pc) {
    check_access(copy.destination, copy.bytes, true, pc);
    if (copy.valid) {
        check_access(copy.source, copy.bytes, false, pc);
        memcpy(copy.destination, copy.source, copy.bytes);
    } else {
        memset(copy.destination, 0, copy.bytes);
    }
}

struct Bulk {
    Copy copy;
    uint64_t barrier;
};
std::vector<Bulk> under_way;
uint32_t n_landed = 0; // in this cluster: the time of asynchronous copies

void land(const Bulk& bulk) {
    memcpy(bulk.copy.destination, bulk.copy.source, bulk.copy.bytes);
    shared_landed(bulk.copy.destination, bulk.copy.bytes, ++n_landed);
    complete_bytes(bulk.barrier, bulk.copy.bytes, n_landed);
}

} // namespace

void cp_async(void* destination, const void* source, uint32_t bytes, bool valid) {
    void* pc = __builtin_return_address(0);
    if (shared_address(destination) % bytes || (valid && reinterpret_cast<uintptr_t>(source) % bytes))
        fail_at(pc, "cp.async of %u bytes at an address that is no multiple of it", bytes);
    const Copy copy = {static_cast<char*>(destination), static_cast<const char*>(source), bytes,
                       valid};
    if (mode.eager) {
        land(copy, pc);
    } else {
        check_access(destination, bytes, true, pc);
        shared_poison(destination, bytes);
    }
    self().open_group.push_back(copy);
}

void cp_async_commit() {
    Fibre& fibre = self();
    fibre.groups.push_back(std::move(fibre.open_group));
    fibre.open_group.clear();
}

void cp_async_wait(uint32_t pending) {
    Fibre& fibre = self();
    while (fibre.groups.size() > pending) {
        if (!mode.eager)
            for (const Copy& copy : fibre.groups.front())
                land(copy, __builtin_return_address(0));
        fibre.groups.erase(fibre.groups.begin());
    }
}

void copies_at_exit(Fibre& fibre) {
    size_t open = fibre.open_group.size();
    for (const auto& group : fibre.groups) open += group.size();
    if (open) FAIL("ends with %zu copies on their way", open);
}

void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    void* pc = __builtin_return_address(0);
    if (bytes == 0 || bytes % 16 || shared_address(destination) % 16 ||
        reinterpret_cast<uintptr_t>(source) % 16)
        fail_at(pc, "a bulk copy of %u bytes: size and addresses must be multiples of 16", bytes);
    check_not_dirty(destination, bytes, pc);
    // The thread that issues the copy must be ordered after all who use the destination.
    check_access(destination, bytes, true, pc);
    check_global(static_cast<const char*>(source), bytes, false, pc);
    shared_poison(destination, bytes);
    const Bulk bulk = {{static_cast<char*>(destination), static_cast<const char*>(source), bytes, true},
                       barrier_for_copies(barrier)};
    if (mode.eager) land(bulk);
    else under_way.push_back(bulk);
}

bool land_one() {
    if (under_way.empty()) return false;
    const uint32_t index = mode.seed ? random_below(under_way.size()) : 0;
    const Bulk bulk = under_way[index];
    under_way.erase(under_way.begin() + index);
    land(bulk);
    return true;
}

size_t bulk_copies_under_way() { return under_way.size(); }

} // namespace emu
