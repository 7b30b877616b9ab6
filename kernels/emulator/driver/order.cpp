// When asynchronous work runs, and how streams are captured into graphs.
//
// Work is a graph of its own: each piece knows what must have run before it, from the order of its stream
// and from the events that the stream was told to wait for. Nothing else orders it.
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <set>
#include <thread>
#include <unordered_map>
#include <unordered_set>

#include "driver.h"

namespace drv {

Result broken = SUCCESS;

namespace {

std::vector<OpPtr> pending; // in order of issue
std::map<uint64_t, std::shared_ptr<Capture>> captures; // under way, by thread
uint64_t draws = 0x9e3779b97f4a7c15;

uint64_t draw(uint64_t below) {
    draws ^= draws << 13, draws ^= draws >> 7, draws ^= draws << 17;
    return (draws + settings().seed * 0x2545f4914f6cdd1dull) % below;
}

uint64_t this_thread() { return std::hash<std::thread::id>()(std::this_thread::get_id()); }

void run(Op& op) {
    if (broken == SUCCESS && op.run) op.run();
    op.run = nullptr;
    op.before.clear();
    op.done = true;
    op.ended = std::chrono::steady_clock::now();
}

// Runs `ops` and whatever they wait for, each after what is before it, else in a drawn order.
void run_all_of(std::vector<OpPtr> wanted) {
    std::vector<OpPtr> found;
    std::unordered_map<Op*, size_t> n_before;
    std::unordered_map<Op*, std::vector<OpPtr>> after;
    std::unordered_set<Op*> seen;
    while (!wanted.empty()) {
        OpPtr op = wanted.back();
        wanted.pop_back();
        if (op->done || !seen.insert(op.get()).second) continue;
        found.push_back(op);
        for (const OpPtr& before : op->before)
            if (!before->done) {
                ++n_before[op.get()];
                after[before.get()].push_back(op);
                wanted.push_back(before);
            }
    }
    std::vector<OpPtr> ready;
    for (const OpPtr& op : found)
        if (!n_before[op.get()]) ready.push_back(op);
    while (!ready.empty()) {
        const size_t at = settings().seed ? draw(ready.size()) : ready.size() - 1;
        const OpPtr op = ready[at];
        ready.erase(ready.begin() + at);
        run(*op);
        for (const OpPtr& next : after[op.get()])
            if (!--n_before[next.get()]) ready.push_back(next);
    }
    pending.erase(std::remove_if(pending.begin(), pending.end(), [](const OpPtr& op) { return op->done; }),
                  pending.end());
}

// Work behind what `stream` has so far.
OpPtr follow(Stream& stream, std::function<void()> run, std::vector<OpPtr> before) {
    auto op = std::make_shared<Op>();
    op->run = std::move(run);
    op->before = std::move(before);
    pending.push_back(op);
    stream.last = op;
    return op;
}

std::vector<OpPtr> tail_of(Stream& stream) {
    std::vector<OpPtr> tail = std::move(stream.waits);
    stream.waits.clear();
    if (stream.last && !stream.last->done) tail.push_back(stream.last);
    return tail;
}

void issued() {
    if (settings().eager) run_all_of(pending);
    maybe_run_some();
}

Result spoil(Capture& capture, Result error) {
    capture.is_invalid = true;
    return error;
}

} // namespace

void die(const char* format, ...) {
    fprintf(stderr, "emulated driver: ");
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    _exit(3);
}

void run_until(const OpPtr& op) {
    if (op && !op->done) run_all_of({op});
}

void run_all() { run_all_of(pending); }

void maybe_run_some() {
    if (!settings().seed || pending.empty() || draw(4)) return;
    run_all_of({pending[draw(pending.size())]});
}

Result issue(Stream& stream, std::function<void()> run) {
    if (broken != SUCCESS) return broken;
    if (stream.capture) {
        Capture& capture = *stream.capture;
        if (capture.is_invalid) return CAPTURE_INVALIDATED;
        capture.graph.nodes.push_back({stream.leaves, std::move(run)});
        stream.leaves = {capture.graph.nodes.size() - 1};
        return SUCCESS;
    }
    follow(stream, std::move(run), tail_of(stream));
    issued();
    return broken;
}

Result record(Event& event, Stream& stream) {
    event = {event.has_time, nullptr, nullptr, {}};
    if (stream.capture) {
        event.capture = stream.capture, event.leaves = stream.leaves;
        return stream.capture->is_invalid ? CAPTURE_INVALIDATED : SUCCESS;
    }
    if (broken != SUCCESS) return broken;
    event.op = follow(stream, nullptr, tail_of(stream));
    issued();
    return SUCCESS;
}

Result wait_for(Stream& stream, Event& event) {
    if (event.capture) {
        if (event.capture->is_invalid) return CAPTURE_INVALIDATED;
        if (event.capture->origin->capture != event.capture) return INVALID_VALUE; // of a capture that has ended
        if (stream.capture && stream.capture != event.capture) return spoil(*stream.capture, CAPTURE_MERGE);
        if (!stream.capture) stream.capture = event.capture, stream.leaves.clear();
        for (const size_t leaf : event.leaves)
            if (std::find(stream.leaves.begin(), stream.leaves.end(), leaf) == stream.leaves.end())
                stream.leaves.push_back(leaf);
        return SUCCESS;
    }
    // To wait for work outside of the capture cannot be recorded.
    if (stream.capture) return event.op ? spoil(*stream.capture, CAPTURE_ISOLATION) : SUCCESS;
    if (event.op && !event.op->done) stream.waits.push_back(event.op);
    return SUCCESS;
}

Result begin_capture(Stream& stream) {
    if (stream.capture) return spoil(*stream.capture, CAPTURE_UNSUPPORTED);
    const uint64_t thread = this_thread();
    if (captures.count(thread)) return spoil(*captures[thread], CAPTURE_UNSUPPORTED);
    stream.capture = std::make_shared<Capture>();
    stream.capture->origin = &stream;
    stream.capture->thread = thread;
    stream.leaves.clear();
    captures[thread] = stream.capture;
    return SUCCESS;
}

std::vector<Stream*> streams_of(const Capture& capture); // context.cpp

Result end_capture(Stream& stream, Graph*& graph) {
    graph = nullptr;
    if (!stream.capture) return INVALID_VALUE;
    const std::shared_ptr<Capture> capture = stream.capture;
    if (capture->origin != &stream) return spoil(*capture, CAPTURE_UNMATCHED);
    if (capture->thread != this_thread()) return CAPTURE_WRONG_THREAD;
    // Everything that joined must have been waited for.
    std::set<size_t> reached(stream.leaves.begin(), stream.leaves.end());
    const std::vector<Node>& nodes = capture->graph.nodes;
    for (size_t at = nodes.size(); at-- > 0;)
        if (reached.count(at)) reached.insert(nodes[at].before.begin(), nodes[at].before.end());
    bool unjoined = false;
    for (Stream* other : streams_of(*capture)) {
        for (const size_t leaf : other->leaves) unjoined |= !reached.count(leaf);
        other->capture = nullptr, other->leaves.clear();
    }
    captures.erase(capture->thread);
    if (capture->is_invalid) return CAPTURE_INVALIDATED;
    if (unjoined) return CAPTURE_UNJOINED;
    graph = new Graph(std::move(capture->graph));
    return SUCCESS;
}

Result not_while_capturing() {
    const auto found = captures.find(this_thread());
    return found == captures.end() ? SUCCESS : spoil(*found->second, CAPTURE_UNSUPPORTED);
}

Result launch_graph(const Graph& graph, Stream& stream) {
    if (broken != SUCCESS) return broken;
    if (stream.capture) return spoil(*stream.capture, CAPTURE_UNSUPPORTED);
    const std::vector<OpPtr> tail = tail_of(stream);
    std::vector<OpPtr> ops;
    std::vector<bool> is_leaf(graph.nodes.size(), true);
    for (const Node& node : graph.nodes) {
        std::vector<OpPtr> before = node.before.empty() ? tail : std::vector<OpPtr>();
        for (const size_t at : node.before) before.push_back(ops[at]), is_leaf[at] = false;
        ops.push_back(follow(stream, node.run, before));
    }
    std::vector<OpPtr> leaves = ops.empty() ? tail : std::vector<OpPtr>();
    for (size_t at = 0; at < ops.size(); ++at)
        if (is_leaf[at]) leaves.push_back(ops[at]);
    follow(stream, nullptr, leaves);
    issued();
    return broken;
}

} // namespace drv
