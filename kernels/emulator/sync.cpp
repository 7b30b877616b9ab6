// Operations of a whole warp, and barriers of a block.
//
// A lane that reaches a warp operation leaves its operands and waits; the last lane executes for
// all. Lanes of one warp in different operations, a warp half inside a barrier, and a lane that
// ends while its warp waits are errors.
#include <algorithm>

#include "state.h"

namespace emu {

namespace {

const char* name_of(WarpOp op) {
    static const char* const names[] = {"none", "warp_sync", "shuffle", "ballot", "ldmatrix", "mma"};
    return names[static_cast<int>(op)];
}

Fibre& lane_of(const Fibre& fibre, uint32_t lane) {
    return block.fibres[fibre.warp * LANES + lane];
}

} // namespace

void collective(WarpOp op, void* operand, void (*execute)(Warp&)) {
    Fibre& fibre = self();
    Warp& warp = own_warp();
    for (uint32_t l = 0; l < LANES; ++l) {
        const State other = lane_of(fibre, l).state;
        if (other == State::in_barrier)
            FAIL("divergent warp: %s here, lane %u is at a barrier", name_of(op), l);
        if (other == State::done) FAIL("divergent warp: %s here, lane %u has ended", name_of(op), l);
    }
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

namespace {

// Releases barrier `id` if enough threads have arrived.
void try_release(uint32_t id, uint32_t n_threads) {
    uint32_t arrived = 0, live = 0;
    for (const Fibre& f : block.fibres) {
        arrived += f.state == State::in_barrier && f.barrier_id == id;
        live += f.state != State::done;
    }
    if (arrived == 0 || arrived < (n_threads ? n_threads : live)) return;
    uint32_t joined[MAX_WARPS] = {};
    const size_t n_warps = block.warps.size();
    std::vector<bool> inside(n_warps, false);
    for (const Fibre& f : block.fibres)
        if (f.state == State::in_barrier && f.barrier_id == id) inside[f.warp] = true;
    for (size_t w = 0; w < n_warps; ++w)
        if (inside[w])
            for (size_t v = 0; v < n_warps; ++v)
                joined[v] = std::max(joined[v], block.warps[w].clock[v]);
    for (size_t w = 0; w < n_warps; ++w)
        if (inside[w]) {
            std::copy(joined, joined + n_warps, block.warps[w].clock);
            block.warps[w].clock[w]++;
        }
    for (Fibre& f : block.fibres)
        if (f.state == State::in_barrier && f.barrier_id == id) f.state = State::ready;
}

} // namespace

void barrier(uint32_t id, uint32_t n_threads) {
    Fibre& fibre = self();
    for (uint32_t l = 0; l < LANES; ++l) {
        const Fibre& other = lane_of(fibre, l);
        if (other.state == State::in_warp || other.state == State::done)
            FAIL("divergent warp: barrier %u here, lane %u is not on its way there", id, l);
        if (other.state == State::in_barrier && other.barrier_id != id)
            FAIL("divergent warp: barrier %u here, lane %u is at barrier %u", id, l,
                 other.barrier_id);
    }
    fibre.state = State::in_barrier;
    fibre.barrier_id = id;
    try_release(id, n_threads);
    if (fibre.state == State::in_barrier) yield();
}

void barrier_exit(Fibre& fibre) {
    for (uint32_t l = 0; l < LANES; ++l) {
        const State other = lane_of(fibre, l).state;
        if (other == State::in_warp || other == State::in_barrier)
            FAIL("ends while lane %u of its warp waits", l);
    }
    try_release(0, 0);
}

} // namespace emu
