// Asynchronous copies of one thread. Late mode moves the bytes when a wait covers them, and the
// destination reads as never written until then; eager mode moves them at once.
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
    shared_written(copy.destination, copy.bytes);
}

} // namespace

void cp_async(void* destination, const void* source, uint32_t bytes, bool valid) {
    void* pc = __builtin_return_address(0);
    if (shared_offset(destination) % bytes || (valid && reinterpret_cast<uintptr_t>(source) % bytes))
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

} // namespace emu
