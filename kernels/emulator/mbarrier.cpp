// Barriers in shared memory (mbarrier): arrivals and bytes of asynchronous copies.
//
// A phase is complete when all arrivals have come and no bytes are outstanding. Errors: a use before
// the initialisation is visible, more arrivals than announced, copies to a barrier whose
// initialisation was not fenced, and a phase that completes before all have seen the last.
#include <stdio.h>

#include <algorithm>
#include <map>

#include "state.h"

namespace emu {

struct Mbarrier {
    uint32_t rank, offset;
    uint32_t count, pending;
    int64_t bytes = 0; // outstanding
    uint32_t phase = 0;
    const Fibre* owner; // who initialised it
    bool fenced = false;
    uint32_t unseen = 0; // threads that were woken and have not run yet
    Clock joining, joined;
};

namespace {

std::map<uint64_t, Mbarrier> barriers; // by rank and offset

uint64_t key_of(const uint64_t* barrier) { return shared_address(barrier); }

void check_aligned(const uint64_t* barrier, void* pc) {
    if (shared_address(barrier) % 8) fail_at(pc, "a barrier at an address that is no multiple of 8");
}

Mbarrier& find(uint64_t* barrier, void* pc) {
    check_aligned(barrier, pc);
    const auto found = barriers.find(key_of(barrier));
    if (found == barriers.end())
        fail_at(pc, "barrier at shared offset %u is used before it is initialised",
                shared_address(barrier) & 0xffffffu);
    // Whoever uses it must be ordered after its initialisation.
    check_access(barrier, 8, false, pc);
    return found->second;
}

void try_complete(Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    if (barrier.unseen)
        FAIL("barrier at shared offset %u completes a phase before %u threads have seen the last one",
             barrier.offset, barrier.unseen);
    const uint32_t parity = barrier.phase & 1;
    ++barrier.phase;
    barrier.pending = barrier.count;
    join(barrier.joined, barrier.joining);
    std::fill(barrier.joining.begin(), barrier.joining.end(), 0);
    for (Fibre& fibre : cluster.fibres)
        if (fibre.state == State::in_mbarrier && fibre.waits_for == &barrier && fibre.parity == parity)
            fibre.state = State::ready, ++barrier.unseen;
}

} // namespace

void mbarriers_start() { barriers.clear(); }

void mbarrier_init(uint64_t* barrier, uint32_t count) {
    void* pc = __builtin_return_address(0);
    check_aligned(barrier, pc);
    check_access(barrier, 8, true, pc);
    if (barriers.count(key_of(barrier)))
        fail_at(pc, "barrier at shared offset %u is initialised twice", shared_address(barrier) & 0xffffffu);
    if (count == 0 || count >= 1u << 20) fail_at(pc, "a barrier for %u arrivals", count);
    *barrier = 0;
    const uint32_t address = shared_address(barrier);
    const Clock none(cluster.warps.size() + 1, 0);
    barriers[key_of(barrier)] = {address >> 24, address & 0xffffffu, count, count, 0, 0, &self(), false, 0,
                                 none, none};
}

void fence_mbarrier_init() {
    for (auto& [_, barrier] : barriers) barrier.fenced |= barrier.owner == &self();
}

void fence_proxy_async() {
    ++self().fences;
    fence_mbarrier_init();
}

void mbarrier_arrive(uint64_t* at, uint32_t expected_bytes) {
    void* pc = __builtin_return_address(0);
    Mbarrier& barrier = find(at, pc);
    if (barrier.pending == 0)
        fail_at(pc, "barrier at shared offset %u: one arrival more than the %u it was made for",
                barrier.offset, barrier.count);
    check_tensor_fence(pc);
    Fibre& fibre = self();
    Warp& warp = own_warp();
    join(barrier.joining, warp.clock);
    // What this warp does from here on is not ordered by this arrival.
    warp.clock[fibre.warp]++;
    barrier.bytes += expected_bytes;
    --barrier.pending;
    try_complete(barrier);
}

void mbarrier_wait(uint64_t* at, uint32_t parity) {
    Mbarrier& barrier = find(at, __builtin_return_address(0));
    Fibre& fibre = self();
    if ((barrier.phase & 1) == (parity & 1)) {
        fibre.waits_for = &barrier, fibre.parity = parity & 1;
        fibre.state = State::in_mbarrier;
        yield();
        --barrier.unseen;
    }
    join(own_warp().clock, barrier.joined);
    fibre.tensor_fenced = false;
}

uint64_t barrier_for_copies(uint64_t* at) {
    void* pc = __builtin_return_address(0);
    const Mbarrier& barrier = find(at, pc);
    if (!barrier.fenced)
        fail_at(pc, "a copy counts on the barrier at shared offset %u, whose initialisation was not fenced",
                barrier.offset);
    return key_of(at);
}

void complete_bytes(uint64_t key, uint32_t bytes, uint32_t clock) {
    Mbarrier& barrier = barriers.at(key);
    barrier.joining[async_warp()] = std::max(barrier.joining[async_warp()], clock);
    barrier.bytes -= bytes;
    try_complete(barrier);
}

void arrive_async(uint64_t key, uint32_t clock) {
    Mbarrier& barrier = barriers.at(key);
    if (barrier.pending == 0)
        FAIL("barrier at shared offset %u: a commit is one arrival more than the %u it was made for", barrier.offset,
             barrier.count);
    barrier.joining[async_warp()] = std::max(barrier.joining[async_warp()], clock);
    --barrier.pending;
    try_complete(barrier);
}

void describe(const Mbarrier& barrier) {
    fprintf(stderr, " (shared offset %u: phase %u, %u of %u arrivals missing, %lld bytes outstanding)",
            barrier.offset, barrier.phase, barrier.pending, barrier.count,
            static_cast<long long>(barrier.bytes));
}

} // namespace emu
