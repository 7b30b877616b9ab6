// Streams, events, graphs.
#include "handles.h"

using namespace drv;

namespace {

std::set<Graph*> graphs;

} // namespace

EXPORT cuStreamCreate(void** stream, uint32_t) {
    IN_CONTEXT
    OR_RETURN(broken);
    auto* made = new Stream();
    streams.insert(made);
    return *stream = made, SUCCESS;
}
EXPORT cuStreamDestroy_v2(void* handle) {
    IN_CONTEXT
    Stream* stream = &stream_of(handle);
    if (stream->capture) die("a stream is destroyed while it is captured");
    streams.erase(stream);
    delete stream; // its work goes on
    return SUCCESS;
}
EXPORT cuStreamSynchronize(void* stream) {
    IN_CONTEXT
    Stream& waited_for = stream_of(stream);
    if (waited_for.capture) return waited_for.capture->is_invalid = true, CAPTURE_UNSUPPORTED;
    for (const OpPtr& op : waited_for.waits) run_until(op);
    return wait_until(waited_for.last);
}
EXPORT cuStreamWaitEvent(void* stream, void* event, uint32_t) {
    IN_CONTEXT
    return wait_for(stream_of(stream), event_of(event));
}
EXPORT cuStreamBeginCapture_v2(void* stream, int32_t mode) {
    IN_CONTEXT
    OR_RETURN(broken);
    if (mode != 1) return NOT_SUPPORTED; // THREAD_LOCAL
    return begin_capture(stream_of(stream));
}
EXPORT cuStreamEndCapture(void* stream, void** graph) {
    IN_CONTEXT
    Graph* made;
    const Result result = end_capture(stream_of(stream), made);
    if (made) graphs.insert(made);
    return *graph = made, result;
}
EXPORT cuEventCreate(void** event, uint32_t flags) {
    IN_CONTEXT
    OR_RETURN(broken);
    auto* made = new Event{!(flags & 2), nullptr, nullptr, {}}; // DISABLE_TIMING
    events.insert(made);
    return *event = made, SUCCESS;
}
EXPORT cuEventDestroy_v2(void* handle) {
    IN_CONTEXT
    Event* event = &event_of(handle);
    events.erase(event);
    delete event;
    return SUCCESS;
}
EXPORT cuEventRecord(void* event, void* stream) {
    IN_CONTEXT
    return record(event_of(event), stream_of(stream));
}
EXPORT cuEventSynchronize(void* handle) {
    IN_CONTEXT
    Event& event = event_of(handle);
    if (event.capture) return CAPTURED_EVENT;
    return wait_until(event.op);
}
EXPORT cuEventElapsedTime_v2(float* milliseconds, void* first, void* second) {
    IN_CONTEXT
    Event &a = event_of(first), &b = event_of(second);
    if (!a.has_time || !b.has_time || !a.op || !b.op) return INVALID_HANDLE;
    if (!a.op->done || !b.op->done) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(b.op->ended - a.op->ended).count();
    return broken;
}
EXPORT cuEventElapsedTime(float* milliseconds, void* first, void* second) {
    return cuEventElapsedTime_v2(milliseconds, first, second);
}
EXPORT cuGraphInstantiateWithFlags(void** executable, void* graph, uint64_t flags) {
    IN_CONTEXT
    OR_RETURN(broken);
    if (flags) return NOT_SUPPORTED;
    auto* made = new Graph(*live(graphs, graph, "graph"));
    executables.insert(made);
    return *executable = made, SUCCESS;
}
EXPORT cuGraphDestroy(void* handle) {
    IN_CONTEXT
    Graph* graph = live(graphs, handle, "graph");
    graphs.erase(graph);
    delete graph;
    return SUCCESS;
}
EXPORT cuGraphExecDestroy(void* handle) {
    IN_CONTEXT
    Graph* graph = live(executables, handle, "executable graph");
    executables.erase(graph);
    delete graph; // launches of it that are under way have what they need
    return SUCCESS;
}
EXPORT cuGraphLaunch(void* graph, void* stream) {
    IN_CONTEXT
    return launch_graph(*live(executables, graph, "executable graph"), stream_of(stream));
}
