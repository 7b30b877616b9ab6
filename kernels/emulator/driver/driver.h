// The emulated driver: what a program that opens `libcuda` finds, with the block emulator for a GPU.
//
// A test puts the library ahead of an installed driver on the library path of a whole program, which then
// runs as it does on a GPU: same calls, same machine code packs (each launch is held against what the
// compiled kernel says of itself: `image.cpp`), same streams, events and graphs (`order.cpp`).
//
// Asynchronous work runs when a caller waits for it and not before (`late`), at once (`eager`), or in an
// order drawn among what streams and graphs allow (`seed`): what a program wrongly takes for done, or for
// ordered, differs in one of them. What a driver would refuse is refused with its error code; what a driver
// would let pass and a GPU might not survive (memory given back while a copy uses it, objects used after
// they are gone) prints a line beginning "emulated driver: " and ends the process.
//
// Set up by the variable EMULATED_GPU, words of which all are optional:
//   sm_80 | sm_89 | sm_90a | sm_100f | sm_120   whose kernels run; sm_80 without
//   none           no GPU is there
//   late | eager   see above; late without
//   seed=N         see above; also the order of warps
//   memory=BYTES   of the GPU; 8 GiB without
//   driver=N       the CUDA version that the driver knows, as 13000
//   clusters=N     blocks of the largest cluster that it has room for; 16 without
//   fails_when=F   once there is a file F launches fail, and everything after them, as on a GPU
//
// Not here: the default stream, managed memory, several GPUs, memory nodes of graphs.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../state.h"

namespace drv {

enum Result : int32_t {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    INVALID_CLUSTER_SIZE = 912,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
    NOT_SUPPORTED = 801,
};

// An architecture and what its GPUs have.
struct Arch {
    const char* name;
    int32_t major, minor, n_sms;
    uint32_t shared_bytes; // of a block at most, static and dynamic
};

struct Settings {
    const Arch* arch;
    bool has_gpu = true, eager = false;
    uint32_t seed = 0, largest_cluster = 16;
    uint64_t memory = uint64_t{8} << 30;
    int32_t driver_version = 13000;
    std::string fails_when;
};
const Settings& settings();

// What a compiled kernel says of itself.
struct KernelInfo {
    std::string name;
    std::vector<uint32_t> parameters; // sizes in bytes, in order
    uint32_t n_registers = 0, max_threads = 1024, static_shared_bytes = 0, cluster = 1;
    bool is_known = false; // else the image was a stand-in that says nothing
};
// Kernels of an image; `error` is set if it is none for this GPU. A stand-in is the four bytes that an ELF
// file begins with and nothing else: every kernel of the emulator is in it.
std::vector<KernelInfo> read_image(const void* image, const Arch& arch, Result& error);

struct Function {
    KernelInfo info;
    const emu::Kernel* kernel;
    uint32_t dynamic_shared_bytes = 48 * 1024; // allowed
    bool may_have_large_clusters = false;
};

struct LaunchShape {
    emu::Dim3 grid, block;
    uint32_t shared_bytes;
};
// Whether a GPU takes a launch of this shape.
Result check_launch(const Function& function, const LaunchShape& shape);

// Something asynchronous; it runs when everything before it has run.
struct Op {
    std::vector<std::shared_ptr<Op>> before;
    std::function<void()> run;
    bool done = false;
    std::chrono::steady_clock::time_point ended;
};
using OpPtr = std::shared_ptr<Op>;

// A node of a graph; `before` are indices of earlier nodes.
struct Node {
    std::vector<size_t> before;
    std::function<void()> run;
};
struct Graph {
    std::vector<Node> nodes;
};

struct Stream;
// What is captured from one stream, and from those that join it.
struct Capture {
    Graph graph;
    Stream* origin;
    uint64_t thread;
    bool is_invalid = false;
};

struct Stream {
    OpPtr last;
    std::vector<OpPtr> waits; // of the next work, beside `last`
    std::shared_ptr<Capture> capture;
    std::vector<size_t> leaves; // nodes that the next captured one follows
};

struct Event {
    bool has_time;
    OpPtr op;                          // recorded
    std::shared_ptr<Capture> capture;  // recorded while capturing
    std::vector<size_t> leaves;
};

// order.cpp
// Adds work to a stream, or a node where it is captured.
Result issue(Stream& stream, std::function<void()> run);
void run_until(const OpPtr& op);
// Lets some of what is ready run, if an order is drawn.
void maybe_run_some();
// Waits for everything.
void run_all();
Result record(Event& event, Stream& stream);
Result wait_for(Stream& stream, Event& event);
Result begin_capture(Stream& stream);
Result end_capture(Stream& stream, Graph*& graph);
// Refuses what a capture of this thread forbids, and spoils it.
Result not_while_capturing();
Result launch_graph(const Graph& graph, Stream& stream);
// The error that all calls give since a launch failed.
extern Result broken;

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

} // namespace drv
