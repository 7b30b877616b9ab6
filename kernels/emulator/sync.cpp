// Operations of a whole warp or warpgroup, and barriers of a block and of a cluster.
//
// A lane that reaches such an operation leaves its operands and waits; the last lane executes for
// all. Lanes of one warp in different operations, a warp half inside a barrier, and a lane that
// ends while its warp waits are errors.
#include <string.h>

#include <algorithm>

#include "state.h"

namespace emu {

namespace {

const char* name_of(WarpOp op) {
    static const char* const names[] = {"none",  "warp_sync", "shuffle", "ballot",
                                        "elect", "ldmatrix",  "mma",     "set_registers",
                                        "tmem_alloc", "tmem_dealloc", "tmem_load", "tmem_load_wait",
                                        "tmem_store_tile", "tmem_store_wait"};
    return names[static_cast<int>(op)];
}
const char* name_of(GroupOp op) {
    static const char* const names[] = {"none", "wgmma_fence", "wgmma_commit", "wgmma_wait", "wgmma"};
    return names[static_cast<int>(op)];
}

Fibre& lane_of(const Fibre& fibre, uint32_t lane) {
    return cluster.fibres[fibre.warp * LANES + lane];
}

// No lane of the running warp may be somewhere that it cannot come from.
void check_lanes(const char* name) {
    for (uint32_t l = 0; l < LANES; ++l) {
        const State other = lane_of(self(), l).state;
        if (other == State::in_barrier || other == State::in_cluster)
            FAIL("divergent warp: %s here, lane %u is at a barrier", name, l);
        if (other == State::done) FAIL("divergent warp: %s here, lane %u has ended", name, l);
    }
}

} // namespace

void join(Clock& clock, const Clock& other) {
    for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void collective(WarpOp op, void* operand, void (*execute)(Warp&)) {
    Fibre& fibre = self();
    Warp& warp = own_warp();
    check_lanes(name_of(op));
    if (warp.arrived && warp.op != op)
        FAIL("divergent warp: %s here, other lanes are in %s", name_of(op), name_of(warp.op));
    warp.op = op;
    warp.operands[fibre.lane] = operand;
    warp.arrived |= 1u << fibre.lane;
    if (warp.arrived != 0xffffffffu) {
        fibre.state = State::in_warp;
        yield();
        return;
    }
    execute(warp);
    warp.arrived = 0;
    warp.clock[fibre.warp]++;
    for (uint32_t l = 0; l < LANES; ++l) lane_of(fibre, l).state = State::ready;
}

void warp_sync() {
    collective(WarpOp::sync, nullptr, [](Warp&) {});
}

// Each warp of the group is synchronised by it, but the warps are not ordered against each other.
void collective(GroupOp op, const void* operand, void (*execute)(Group&)) {
    Fibre& fibre = self();
    if (launch.block.x % GROUP_LANES) FAIL("%s in a block of %u threads: no whole warpgroups", name_of(op), launch.block.x);
    const uint32_t first_warp = fibre.index / GROUP_LANES * GROUP_WARPS + (fibre.warp - fibre.index / LANES);
    Group& group = cluster.groups[first_warp / GROUP_WARPS];
    check_lanes(name_of(op));
    if (group.arrived && group.op != op)
        FAIL("divergent warpgroup: %s here, other threads are in %s", name_of(op), name_of(group.op));
    group.op = op;
    group.operands[fibre.index % GROUP_LANES] = operand;
    if (++group.arrived != GROUP_LANES) {
        fibre.state = State::in_group;
        yield();
        return;
    }
    execute(group);
    group.arrived = 0;
    for (uint32_t w = first_warp; w < first_warp + GROUP_WARPS; ++w) {
        cluster.warps[w].clock[w]++;
        for (uint32_t l = 0; l < LANES; ++l) cluster.fibres[w * LANES + l].state = State::ready;
    }
}

namespace {

// Joins the clocks of all warps with a fibre in `state` of the barrier, and sets those going.
template <class Inside>
void release(State state, const Inside& inside) {
    Clock joined(cluster.warps.size() + 1, 0);
    std::vector<bool> takes_part(cluster.warps.size(), false);
    for (const Fibre& f : cluster.fibres)
        if (f.state == state && inside(f)) takes_part[f.warp] = true;
    for (size_t w = 0; w < cluster.warps.size(); ++w)
        if (takes_part[w]) join(joined, cluster.warps[w].clock);
    for (size_t w = 0; w < cluster.warps.size(); ++w)
        if (takes_part[w]) cluster.warps[w].clock = joined, cluster.warps[w].clock[w]++;
    for (Fibre& f : cluster.fibres)
        if (f.state == state && inside(f)) f.state = State::ready;
}

// Releases barrier `id` of block `rank` if enough threads have arrived.
void try_release(uint32_t rank, uint32_t id) {
    Block& block = cluster.blocks[rank];
    auto& barrier = block.barriers[id];
    if (barrier.arrived == 0) return;
    if (barrier.arrived < (barrier.wanted ? barrier.wanted : block.live)) return;
    barrier.arrived = 0;
    release(State::in_barrier, [&](const Fibre& f) { return f.rank == rank && f.barrier_id == id; });
}

// The cluster's barrier: those who have arrived in this phase, and what they had seen.
struct {
    uint32_t phase, arrived;
    Clock joining, joined;
} meeting;

void try_meet() {
    uint32_t live = 0;
    for (const Block& block : cluster.blocks) live += block.live;
    if (meeting.arrived == 0 || meeting.arrived < live) return;
    ++meeting.phase, meeting.arrived = 0;
    join(meeting.joined, meeting.joining);
    for (Fibre& f : cluster.fibres)
        if (f.state == State::in_cluster) f.state = State::ready;
}

} // namespace

void barrier(uint32_t id, uint32_t n_threads) {
    Fibre& fibre = self();
    check_tensor_fence(__builtin_return_address(0));
    for (uint32_t l = 0; l < LANES; ++l) {
        const Fibre& other = lane_of(fibre, l);
        if (other.state == State::in_warp || other.state == State::done)
            FAIL("divergent warp: barrier %u here, lane %u is not on its way there", id, l);
        if (other.state == State::in_barrier && other.barrier_id != id)
            FAIL("divergent warp: barrier %u here, lane %u is at barrier %u", id, l,
                 other.barrier_id);
    }
    auto& barrier = cluster.blocks[fibre.rank].barriers[id];
    if (barrier.arrived && barrier.wanted != n_threads)
        FAIL("barrier %u for %u threads, others wait there for %u", id, n_threads, barrier.wanted);
    barrier.wanted = n_threads;
    ++barrier.arrived;
    fibre.tensor_fenced = false;
    fibre.state = State::in_barrier;
    fibre.barrier_id = id;
    try_release(fibre.rank, id);
    if (fibre.state == State::in_barrier) yield();
}

void cluster_start() {
    meeting.phase = meeting.arrived = 0;
    meeting.joining = meeting.joined = Clock(cluster.warps.size() + 1, 0);
}

void cluster_arrive() {
    Fibre& fibre = self();
    if (fibre.in_cluster_barrier) FAIL("arrives twice at the cluster's barrier without waiting");
    fibre.in_cluster_barrier = true;
    fibre.meeting = meeting.phase;
    join(meeting.joining, own_warp().clock);
    own_warp().clock[fibre.warp]++;
    ++meeting.arrived;
    try_meet();
}

void cluster_wait() {
    Fibre& fibre = self();
    if (!fibre.in_cluster_barrier) FAIL("waits at the cluster's barrier without having arrived");
    if (meeting.phase == fibre.meeting) {
        fibre.state = State::in_cluster;
        yield();
    }
    fibre.in_cluster_barrier = false;
    join(own_warp().clock, meeting.joined);
}

void cluster_store(uint32_t address, uint32_t value) {
    check_remote(address, 4, __builtin_return_address(0));
    memcpy(shared_at(address), &value, sizeof value);
}

void barriers_at_exit(Fibre& fibre) {
    for (uint32_t l = 0; l < LANES; ++l) {
        const State other = lane_of(fibre, l).state;
        if (other == State::in_warp || other == State::in_barrier || other == State::in_group)
            FAIL("ends while lane %u of its warp waits", l);
    }
    // An arrival counts for whoever arrived and ended without waiting.
    if (fibre.in_cluster_barrier && meeting.phase == fibre.meeting) --meeting.arrived;
    --cluster.blocks[fibre.rank].live;
    try_release(fibre.rank, 0);
    try_meet();
}

} // namespace emu
