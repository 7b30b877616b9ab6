// Asynchronous copies to shared memory. Late mode moves the bytes as late as the rules allow, and
// the destination reads as never written until then; eager mode moves them at once.
//
// cp.async lands when its thread waits for its group. A bulk or tensor copy lands when no thread can
// run any more, in random order, and then counts its bytes down on its barrier.
//
// A tensor map is what `emulator/process.rs` of the ops crate encodes, see `Map`; the limits of the
// real one are checked there, for the driver too.
#include <string.h>

#include <algorithm>

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
    uint32_t counted;  // bytes
    bool is_tensor;
    Map map;
    uint32_t at[5];
};
std::vector<Bulk> under_way;
uint32_t n_landed = 0; // in this cluster: the time of asynchronous copies

// Calls `body(row of the box, first byte in memory or null, elements of the row inside)`.
template <class Body>
void for_each_row(const Map& map, const uint32_t (&at)[5], const Body& body) {
    for (uint32_t row = 0; row < map.n_rows(); ++row) {
        uint64_t offset = static_cast<uint64_t>(at[0]) * map.element / 8;
        bool inside = at[0] < map.dims[0];
        for (uint32_t d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
            const uint64_t index = at[d] + rest % map.box[d];
            inside &= index < map.dims[d];
            offset += index * map.strides[d - 1];
        }
        const uint64_t n = inside ? std::min<uint64_t>(map.box[0], map.dims[0] - at[0]) : 0;
        body(row, inside ? reinterpret_cast<const char*>(map.address + offset) : nullptr, static_cast<uint32_t>(n));
    }
}

// Where byte `byte` of the box goes: 16-byte pieces are exchanged by bits 7 and up of the address.
uint32_t swizzled_address(const Map& map, uint32_t address) {
    const uint32_t mask = map.swizzle ? map.swizzle / 16 - 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
}

void land_box(const Bulk& bulk) {
    const Map& map = bulk.map;
    const uint32_t start = shared_address(bulk.copy.destination);
    for_each_row(map, bulk.at, [&](uint32_t row, const char* from, uint32_t n) {
        std::vector<char> bytes(map.row_bytes(), 0);
        if (map.element == 4) {
            for (uint32_t i = 0; i < n; i += 16) memcpy(&bytes[i], from + i / 2, 8);
        } else if (from) {
            memcpy(bytes.data(), from, n * map.element / 8);
        }
        for (uint32_t i = 0; i < bytes.size(); i += 16)
            memcpy(shared_at(swizzled_address(map, start + row * map.row_bytes() + i)), &bytes[i], 16);
    });
}

void land(const Bulk& bulk) {
    if (bulk.is_tensor) land_box(bulk);
    else memcpy(bulk.copy.destination, bulk.copy.source, bulk.copy.bytes);
    shared_landed(bulk.copy.destination, bulk.copy.bytes, ++n_landed);
    complete_bytes(bulk.barrier, bulk.counted, n_landed);
}

void start(const Bulk& bulk, void* pc) {
    const Copy& copy = bulk.copy;
    check_not_dirty(copy.destination, copy.bytes, pc);
    // The thread that issues the copy must be ordered after all who use the destination.
    check_access(copy.destination, copy.bytes, true, pc);
    shared_poison(copy.destination, copy.bytes);
    if (mode.eager) land(bulk);
    else under_way.push_back(bulk);
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
        if (valid) check_access(source, bytes, false, pc);
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
    check_global(static_cast<const char*>(source), bytes, false, pc);
    start({{static_cast<char*>(destination), static_cast<const char*>(source), bytes, true},
           barrier_for_copies(barrier), bytes, false, {}, {}}, pc);
}

void tensor_load(void* destination, const void* p, uint32_t rank, const uint32_t* at, uint64_t* barrier) {
    void* pc = __builtin_return_address(0);
    Bulk bulk = {};
    memcpy(&bulk.map, p, sizeof bulk.map);
    const Map& map = bulk.map;
    if (map.rank != rank) fail_at(pc, "a tensor copy of %u dimensions, the map has %u", rank, map.rank);
    const uint32_t align = map.swizzle == 128 ? 1024 : 128;
    if (shared_address(destination) % align)
        fail_at(pc, "a tensor copy with %u-byte swizzle to a shared address that is no multiple of %u", map.swizzle, align);
    memcpy(bulk.at, at, rank * sizeof *at);
    if (map.element == 4 && at[0] % 128) fail_at(pc, "a tensor copy of 4-bit values from column %u: no multiple of 128", at[0]);
    for_each_row(map, bulk.at, [&](uint32_t, const char* from, uint32_t n) {
        if (from) check_global(from, n * map.element / 8, false, pc);
    });
    const uint32_t bytes = map.n_rows() * map.row_bytes();
    bulk.copy = {static_cast<char*>(destination), nullptr, bytes, true};
    bulk.barrier = barrier_for_copies(barrier);
    bulk.is_tensor = true;
    // Gaps beside 4-bit values are not counted.
    bulk.counted = map.n_elements() * map.element / 8;
    start(bulk, pc);
}

bool land_one() {
    const uint32_t n = under_way.size() + tensor_work_under_way();
    if (n == 0) return false;
    const uint32_t index = mode.seed ? random_below(n) : 0;
    if (index == under_way.size()) {
        land_tensor_work();
        return true;
    }
    const Bulk bulk = under_way[index];
    under_way.erase(under_way.begin() + index);
    land(bulk);
    return true;
}

uint32_t next_async_time() { return ++n_landed; }

size_t bulk_copies_under_way() { return under_way.size(); }

} // namespace emu
