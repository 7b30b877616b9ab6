// The functions of the driver that the project calls, with the checks that a driver makes.
//
// Every call takes one lock: nothing runs at the same time here, but in every order that is allowed.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <set>

#include "driver.h"

namespace drv {

namespace {

constexpr Arch ARCHS[] = {
    {"sm_80", 8, 0, 108, 163 << 10}, {"sm_89", 8, 9, 128, 99 << 10},  {"sm_90a", 9, 0, 132, 227 << 10},
    {"sm_100f", 10, 0, 148, 227 << 10}, {"sm_120", 12, 0, 170, 99 << 10},
};

std::recursive_mutex lock;
bool is_initialised = false;

// The context: there is one, of the only GPU.
int context_object, pool_object;
void* const CONTEXT = &context_object;
uint32_t retained = 0;
thread_local void* current_context = nullptr;

struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
};

// What handles are out.
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Module*> modules;
std::set<Function*> functions;
std::set<Graph*> graphs, executables;
std::map<char*, size_t> pinned;
std::map<uint64_t, uint64_t> device_memory; // bytes by address
uint64_t used = 0, kept = 0, keeps_at_most = 0;
// Copies under way by the pinned memory they use.
std::multiset<const char*> in_copies;

template <class T>
T* live(const std::set<T*>& all, void* handle, const char* what) {
    T* object = static_cast<T*>(handle);
    if (!all.count(object)) die("%s %p is used, and is not or no longer there", what, handle);
    return object;
}
Stream& stream_of(void* handle) {
    if (!handle) die("the default stream is used, which is not emulated");
    return *live(streams, handle, "stream");
}
Event& event_of(void* handle) { return *live(events, handle, "event"); }

// What every call that needs a context begins with.
#define IN_CONTEXT                                                                   \
    const std::lock_guard<std::recursive_mutex> guard(lock);                         \
    if (!is_initialised) return NOT_INITIALIZED;                                     \
    if (!current_context || !retained) return INVALID_CONTEXT;                       \
    maybe_run_some();
#define OR_RETURN(call) \
    if (const Result result = (call); result != SUCCESS) return result;

void need_device(uint64_t address, uint64_t bytes, const char* what) {
    auto next = device_memory.upper_bound(address);
    if (next != device_memory.begin()) {
        const auto& [start, length] = *--next;
        if (address + bytes <= start + length) return;
    }
    die("%s of %zu bytes at %#zx is not inside of what was allocated", what, static_cast<size_t>(bytes),
        static_cast<size_t>(address));
}

// Whether all of it is pinned; ordinary memory is not at all.
bool is_pinned(const char* p, size_t bytes) {
    auto next = pinned.upper_bound(const_cast<char*>(p));
    if (next == pinned.begin()) return false;
    const auto& [start, length] = *--next;
    if (p >= start + length) return false;
    if (p + bytes > start + length) die("a copy of %zu bytes runs out of pinned memory", bytes);
    return true;
}

Result allocate(uint64_t* address, uint64_t bytes) {
    if (!bytes) return INVALID_VALUE;
    if (used + bytes > settings().memory) return OUT_OF_MEMORY;
    kept -= kept < bytes ? kept : bytes;
    used += bytes;
    if (used + kept > settings().memory) kept = settings().memory - used;
    *address = emu::allocate(bytes);
    device_memory[*address] = bytes;
    return SUCCESS;
}

void release(uint64_t address) {
    const auto found = device_memory.find(address);
    if (found == device_memory.end()) die("%#zx is given back, and was not allocated", static_cast<size_t>(address));
    used -= found->second, kept += found->second;
    device_memory.erase(found);
    emu::release(address);
}

// What a wait for the device does to memory that the pool has kept.
void waited() {
    if (kept > keeps_at_most) kept = keeps_at_most;
}

Result read_settings(Settings& out) {
    out.arch = &ARCHS[0];
    const char* text = getenv("EMULATED_GPU");
    std::string words = text ? text : "";
    for (size_t start = 0; start < words.size();) {
        const size_t end = std::min(words.find(' ', start), words.size());
        const std::string word = words.substr(start, end - start);
        start = end + 1;
        const size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        const uint64_t value = equals == std::string::npos ? 0 : strtoull(word.c_str() + equals + 1, nullptr, 10);
        const Arch* arch = nullptr;
        for (const Arch& one : ARCHS)
            if (word == one.name) arch = &one;
        if (arch) out.arch = arch;
        else if (word == "none") out.has_gpu = false;
        else if (word == "eager") out.eager = true;
        else if (word == "late" || word.empty()) out.eager = false;
        else if (name == "seed") out.seed = value;
        else if (name == "memory") out.memory = value;
        else if (name == "driver") out.driver_version = value;
        else if (name == "clusters") out.largest_cluster = value;
        else if (name == "fails_when") out.fails_when = word.substr(equals + 1);
        else die("EMULATED_GPU has a word that nobody knows: %s", word.c_str());
    }
    emu::mode = {out.eager, out.seed};
    return SUCCESS;
}

Result launch(Function& function, const LaunchShape& shape, Stream& stream, void** parameters) {
    OR_RETURN(broken);
    OR_RETURN(check_launch(function, shape));
    // By value, as they are now.
    struct alignas(128) Argument {
        char bytes[128];
    };
    std::vector<Argument> arguments(function.kernel->sizes.size());
    for (size_t i = 0; i < arguments.size(); ++i) memcpy(arguments[i].bytes, parameters[i], function.kernel->sizes[i]);
    return issue(stream, [&function, shape, arguments]() mutable {
        const std::string& file = settings().fails_when;
        if (!file.empty() && !access(file.c_str(), F_OK)) {
            broken = ILLEGAL_ADDRESS;
            return;
        }
        std::vector<void*> pointers;
        for (Argument& argument : arguments) pointers.push_back(argument.bytes);
        emu::launch.grid = shape.grid, emu::launch.block = shape.block;
        emu::launch.shared_bytes = shape.shared_bytes;
        emu::run_grid(*function.kernel, false, pointers.data());
    });
}

const char* name_of(Result error) {
    switch (error) {
    case SUCCESS: return "CUDA_SUCCESS";
    case INVALID_VALUE: return "CUDA_ERROR_INVALID_VALUE";
    case OUT_OF_MEMORY: return "CUDA_ERROR_OUT_OF_MEMORY";
    case NOT_INITIALIZED: return "CUDA_ERROR_NOT_INITIALIZED";
    case NO_DEVICE: return "CUDA_ERROR_NO_DEVICE";
    case INVALID_DEVICE: return "CUDA_ERROR_INVALID_DEVICE";
    case INVALID_IMAGE: return "CUDA_ERROR_INVALID_IMAGE";
    case INVALID_CONTEXT: return "CUDA_ERROR_INVALID_CONTEXT";
    case NO_BINARY_FOR_GPU: return "CUDA_ERROR_NO_BINARY_FOR_GPU";
    case INVALID_HANDLE: return "CUDA_ERROR_INVALID_HANDLE";
    case NOT_FOUND: return "CUDA_ERROR_NOT_FOUND";
    case NOT_READY: return "CUDA_ERROR_NOT_READY";
    case ILLEGAL_ADDRESS: return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case LAUNCH_OUT_OF_RESOURCES: return "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES";
    case INVALID_CLUSTER_SIZE: return "CUDA_ERROR_INVALID_CLUSTER_SIZE";
    case CAPTURE_UNSUPPORTED: return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
    case CAPTURE_INVALIDATED: return "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
    case CAPTURE_MERGE: return "CUDA_ERROR_STREAM_CAPTURE_MERGE";
    case CAPTURE_UNMATCHED: return "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED";
    case CAPTURE_UNJOINED: return "CUDA_ERROR_STREAM_CAPTURE_UNJOINED";
    case CAPTURE_ISOLATION: return "CUDA_ERROR_STREAM_CAPTURE_ISOLATION";
    case CAPTURED_EVENT: return "CUDA_ERROR_CAPTURED_EVENT";
    case CAPTURE_WRONG_THREAD: return "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD";
    case NOT_SUPPORTED: return "CUDA_ERROR_NOT_SUPPORTED";
    }
    return nullptr;
}

// Runs what an event or a stream stands for, and answers as of a wait.
Result wait_until(const OpPtr& op) {
    run_until(op);
    waited();
    return broken;
}

} // namespace

const Settings& settings() {
    static const Settings read = [] {
        Settings out;
        read_settings(out);
        return out;
    }();
    return read;
}

std::vector<Stream*> streams_of(const Capture& capture) {
    std::vector<Stream*> joined;
    for (Stream* stream : streams)
        if (stream->capture.get() == &capture) joined.push_back(stream);
    return joined;
}

} // namespace drv

using namespace drv;

#define EXPORT extern "C" __attribute__((visibility("default"))) Result

// ---- Driver and device

EXPORT cuInit(uint32_t flags) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (flags) return INVALID_VALUE;
    if (!settings().has_gpu) return NO_DEVICE;
    is_initialised = true;
    return SUCCESS;
}
EXPORT cuDriverGetVersion(int32_t* version) { return *version = settings().driver_version, SUCCESS; }
EXPORT cuGetErrorName(Result error, const char** name) {
    *name = name_of(error);
    return *name ? SUCCESS : INVALID_VALUE;
}
EXPORT cuGetErrorString(Result error, const char** text) { return cuGetErrorName(error, text); }
EXPORT cuDeviceGetCount(int32_t* count) {
    if (!is_initialised) return NOT_INITIALIZED;
    return *count = 1, SUCCESS;
}
EXPORT cuDeviceGet(int32_t* device, int32_t ordinal) {
    if (!is_initialised) return NOT_INITIALIZED;
    return *device = ordinal, ordinal ? INVALID_DEVICE : SUCCESS;
}
EXPORT cuDeviceGetName(char* name, int32_t bytes, int32_t device) {
    if (device) return INVALID_DEVICE;
    snprintf(name, bytes, "Emulated %s", settings().arch->name);
    return SUCCESS;
}
EXPORT cuDeviceTotalMem_v2(size_t* bytes, int32_t device) {
    return *bytes = settings().memory, device ? INVALID_DEVICE : SUCCESS;
}
EXPORT cuDeviceGetAttribute(int32_t* value, int32_t attribute, int32_t device) {
    if (device) return INVALID_DEVICE;
    switch (attribute) {
    case 16: *value = settings().arch->n_sms; break;       // MULTIPROCESSOR_COUNT
    case 75: *value = settings().arch->major; break;       // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = settings().arch->minor; break;       // COMPUTE_CAPABILITY_MINOR
    case 97: *value = settings().arch->shared_bytes; break; // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 115: *value = 1; break;                           // MEMORY_POOLS_SUPPORTED
    default: die("device attribute %d is asked for, which is not emulated", attribute);
    }
    return SUCCESS;
}
EXPORT cuDevicePrimaryCtxRetain(void** context, int32_t device) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (!is_initialised) return NOT_INITIALIZED;
    if (device) return INVALID_DEVICE;
    return ++retained, *context = CONTEXT, SUCCESS;
}
EXPORT cuDevicePrimaryCtxRelease_v2(int32_t) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (!retained) return INVALID_CONTEXT;
    if (--retained == 0) {
        // Its memory goes with it; what else is left had an owner who forgot it.
        const size_t left = streams.size() + events.size() + modules.size() + executables.size() + pinned.size();
        if (left)
            fprintf(stderr, "emulated driver: left behind: %zu streams, %zu events, %zu modules, %zu graphs, %zu pinned buffers\n",
                    streams.size(), events.size(), modules.size(), executables.size(), pinned.size());
        run_all();
    }
    return SUCCESS;
}
EXPORT cuCtxGetCurrent(void** context) { return *context = current_context, SUCCESS; }
EXPORT cuCtxSetCurrent(void* context) {
    if (context && context != CONTEXT) die("a context that is none is made current");
    if (context && !retained) return INVALID_CONTEXT;
    return current_context = context, SUCCESS;
}
EXPORT cuCtxSynchronize() {
    IN_CONTEXT
    OR_RETURN(not_while_capturing());
    run_all();
    waited();
    return broken;
}

// ---- Memory

EXPORT cuMemGetInfo_v2(size_t* free, size_t* total) {
    IN_CONTEXT
    *total = settings().memory, *free = settings().memory - used - kept;
    return broken;
}
EXPORT cuDeviceGetDefaultMemPool(void** pool, int32_t device) {
    return *pool = &pool_object, device ? INVALID_DEVICE : SUCCESS;
}
EXPORT cuMemPoolSetAttribute(void* pool, int32_t attribute, void* value) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (pool != &pool_object) return INVALID_VALUE;
    if (attribute != 4) return NOT_SUPPORTED; // RELEASE_THRESHOLD
    memcpy(&keeps_at_most, value, sizeof keeps_at_most);
    return SUCCESS;
}
EXPORT cuMemPoolTrimTo(void* pool, size_t bytes) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (pool != &pool_object) return INVALID_VALUE;
    if (kept > bytes) kept = bytes;
    return SUCCESS;
}
EXPORT cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    IN_CONTEXT
    OR_RETURN(broken);
    OR_RETURN(not_while_capturing());
    return allocate(address, bytes);
}
EXPORT cuMemFree_v2(uint64_t address) {
    IN_CONTEXT
    OR_RETURN(not_while_capturing());
    run_all(); // it waits for the device
    release(address);
    return broken;
}
EXPORT cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
    IN_CONTEXT
    OR_RETURN(broken);
    if (Capture* capture = stream_of(stream).capture.get()) return capture->is_invalid = true, NOT_SUPPORTED;
    if (allocate(address, bytes) == SUCCESS) return SUCCESS;
    // What the stream is still to give back may be enough.
    run_all();
    OR_RETURN(broken);
    return allocate(address, bytes);
}
EXPORT cuMemFreeAsync(uint64_t address, void* stream) {
    IN_CONTEXT
    if (Capture* capture = stream_of(stream).capture.get()) return capture->is_invalid = true, INVALID_VALUE;
    return issue(stream_of(stream), [address] { release(address); });
}
EXPORT cuMemHostAlloc(void** memory, size_t bytes, uint32_t) {
    IN_CONTEXT
    OR_RETURN(broken);
    OR_RETURN(not_while_capturing());
    char* p = static_cast<char*>(aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    if (!p) return OUT_OF_MEMORY;
    memset(p, 0xff, bytes);
    pinned[p] = bytes;
    return *memory = p, SUCCESS;
}
EXPORT cuMemFreeHost(void* memory) {
    IN_CONTEXT
    OR_RETURN(not_while_capturing());
    char* p = static_cast<char*>(memory);
    const auto found = pinned.find(p);
    if (found == pinned.end()) return INVALID_VALUE;
    const auto copy = in_copies.lower_bound(p);
    if (broken == SUCCESS && copy != in_copies.end() && *copy < p + found->second) die("pinned memory is freed while a copy uses it");
    pinned.erase(found);
    free(p);
    return SUCCESS;
}
EXPORT cuMemsetD8Async(uint64_t address, uint8_t value, size_t bytes, void* stream) {
    IN_CONTEXT
    return issue(stream_of(stream), [=] {
        need_device(address, bytes, "a fill");
        memset(reinterpret_cast<void*>(address), value, bytes);
    });
}
EXPORT cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    IN_CONTEXT
    const char* source = static_cast<const char*>(from);
    if (stream_of(stream).capture) return NOT_SUPPORTED; // a program could, this one has no need to
    if (!is_pinned(source, bytes)) {
        // Ordinary memory has been read when the call returns.
        const std::string text(source, bytes);
        return issue(stream_of(stream), [=] {
            need_device(to, bytes, "a copy to it");
            memcpy(reinterpret_cast<void*>(to), text.data(), bytes);
        });
    }
    in_copies.insert(source);
    return issue(stream_of(stream), [=] {
        need_device(to, bytes, "a copy to it");
        memcpy(reinterpret_cast<void*>(to), source, bytes);
        in_copies.erase(in_copies.find(source));
    });
}
EXPORT cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    IN_CONTEXT
    char* target = static_cast<char*>(to);
    if (stream_of(stream).capture) return NOT_SUPPORTED;
    const bool is_asynchronous = is_pinned(target, bytes);
    // Until the copy has run nobody can know what is here.
    memset(target, 0xff, bytes);
    in_copies.insert(target);
    const Result result = issue(stream_of(stream), [=] {
        need_device(from, bytes, "a copy from it");
        memcpy(target, reinterpret_cast<const void*>(from), bytes);
        in_copies.erase(in_copies.find(target));
    });
    return result == SUCCESS && !is_asynchronous ? wait_until(stream_of(stream).last) : result;
}
EXPORT cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    IN_CONTEXT
    return issue(stream_of(stream), [=] {
        need_device(to, bytes, "a copy to it");
        need_device(from, bytes, "a copy from it");
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    });
}

// ---- Code

EXPORT cuModuleLoadData(void** module, const void* image) {
    IN_CONTEXT
    OR_RETURN(broken);
    OR_RETURN(not_while_capturing());
    Result error;
    std::vector<KernelInfo> kernels = read_image(image, *settings().arch, error);
    OR_RETURN(error);
    auto made = std::make_unique<Module>();
    for (KernelInfo& info : kernels) {
        auto function = std::make_unique<Function>();
        function->kernel = emu::Kernel::find(info.name.c_str());
        if (!function->kernel) die("an image has kernel `%s`, the emulator has not", info.name.c_str());
        if (info.parameters != function->kernel->sizes || info.cluster != function->kernel->options.cluster)
            die("kernel `%s` has other parameters or another cluster than the emulator's", info.name.c_str());
        function->info = std::move(info);
        made->functions[function->info.name] = std::move(function);
    }
    modules.insert(made.get());
    return *module = made.release(), SUCCESS;
}
EXPORT cuModuleUnload(void* handle) {
    IN_CONTEXT
    OR_RETURN(not_while_capturing());
    Module* module = live(modules, handle, "module");
    run_all(); // launches of its kernels
    for (const auto& [name, function] : module->functions) functions.erase(function.get());
    modules.erase(module);
    delete module;
    return SUCCESS;
}
EXPORT cuModuleGetFunction(void** function, void* handle, const char* name) {
    IN_CONTEXT
    Module* module = live(modules, handle, "module");
    auto found = module->functions.find(name);
    if (found == module->functions.end()) {
        const emu::Kernel* kernel = emu::Kernel::find(name);
        // A stand-in has every kernel, an image those it says.
        if (!kernel || (!module->functions.empty() && module->functions.begin()->second->info.is_known)) return NOT_FOUND;
        auto made = std::make_unique<Function>();
        made->kernel = kernel;
        made->info.name = name, made->info.cluster = kernel->options.cluster;
        found = module->functions.emplace(name, std::move(made)).first;
    }
    functions.insert(found->second.get());
    return *function = found->second.get(), SUCCESS;
}
EXPORT cuFuncLoad(void* function) {
    IN_CONTEXT
    OR_RETURN(not_while_capturing());
    live(functions, function, "function");
    return broken;
}
EXPORT cuFuncSetAttribute(void* handle, int32_t attribute, int32_t value) {
    IN_CONTEXT
    Function* function = live(functions, handle, "function");
    if (value < 0) return INVALID_VALUE;
    switch (attribute) {
    case 8: // MAX_DYNAMIC_SHARED_SIZE_BYTES
        if (value + function->info.static_shared_bytes > settings().arch->shared_bytes) return INVALID_VALUE;
        function->dynamic_shared_bytes = value;
        return SUCCESS;
    case 14: // NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        if (settings().arch->major < 9) return NOT_SUPPORTED;
        function->may_have_large_clusters = value != 0;
        return SUCCESS;
    }
    die("function attribute %d is set, which is not emulated", attribute);
}

struct LaunchConfig {
    uint32_t grid[3], block[3], shared_bytes;
    void* stream;
    struct Attribute {
        uint32_t id;
        char padding[4], value[64];
    }* attributes;
    uint32_t n_attributes;
};
LaunchShape shape_of(const LaunchConfig& c) {
    return {{c.grid[0], c.grid[1], c.grid[2]}, {c.block[0], c.block[1], c.block[2]}, c.shared_bytes};
}

EXPORT cuOccupancyMaxActiveClusters(int32_t* count, void* handle, const LaunchConfig* config) {
    IN_CONTEXT
    if (settings().arch->major < 9) return NOT_SUPPORTED;
    const Function* function = live(functions, handle, "function");
    const Result refusal = check_launch(*function, shape_of(*config));
    *count = refusal == SUCCESS ? settings().arch->n_sms / static_cast<int32_t>(function->info.cluster) : 0;
    return refusal == INVALID_CLUSTER_SIZE && function->may_have_large_clusters ? SUCCESS : refusal;
}
EXPORT cuLaunchKernel(void* function, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by, uint32_t bz,
                      uint32_t shared_bytes, void* stream, void** parameters, void** extra) {
    IN_CONTEXT
    if (extra) return NOT_SUPPORTED;
    const LaunchShape shape = {{gx, gy, gz}, {bx, by, bz}, shared_bytes};
    return launch(*live(functions, function, "function"), shape, stream_of(stream), parameters);
}
EXPORT cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
    IN_CONTEXT
    if (extra) return NOT_SUPPORTED;
    for (uint32_t i = 0; i < config->n_attributes; ++i) {
        // PROGRAMMATIC_STREAM_SERIALIZATION: a launch that waits in full does no more than it allows.
        if (config->attributes[i].id != 6) return NOT_SUPPORTED;
        if (settings().arch->major < 9) return NOT_SUPPORTED;
    }
    return launch(*live(functions, function, "function"), shape_of(*config), stream_of(config->stream), parameters);
}

// ---- Streams, events, graphs

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

// The map that the emulator reads in place of a GPU's, after the checks of the manual.
EXPORT cuTensorMapEncodeTiled(void* out, int32_t type, uint32_t rank, void* address, const uint64_t* dims,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                              int32_t interleave, int32_t swizzle, int32_t, int32_t fill) {
    if (settings().arch->major < 9 || reinterpret_cast<uintptr_t>(out) % 64) return INVALID_VALUE;
    if (rank < 1 || rank > 5 || interleave || swizzle < 0 || swizzle > 3 || fill) return INVALID_VALUE;
    constexpr int32_t U8 = 0, BF16 = 9, PADDED_U4 = 14;
    emu::Map map = {};
    map.address = reinterpret_cast<uint64_t>(address);
    map.rank = rank;
    map.swizzle = swizzle ? 16u << swizzle : 0;
    switch (type) {
    case U8: map.element = 8; break;
    case BF16: map.element = 16; break;
    case PADDED_U4: map.element = 4; break;
    default: return INVALID_VALUE;
    }
    if (type == PADDED_U4 && settings().arch->major < 10) return INVALID_VALUE;
    const uint32_t unit = type == PADDED_U4 ? 32 : 16;
    if (map.address % unit) return INVALID_VALUE;
    for (uint32_t d = 0; d < 5; ++d) {
        map.box[d] = d < rank ? box[d] : 1, map.dims[d] = d < rank ? dims[d] : 1;
        if (map.box[d] < 1 || map.box[d] > 256 || map.dims[d] < 1 || map.dims[d] > uint64_t{1} << 32) return INVALID_VALUE;
        if (d < rank && element_strides[d] != 1) return NOT_SUPPORTED;
        if (d + 1 < rank) map.strides[d] = strides[d];
        if (d + 1 < rank && (strides[d] % unit || strides[d] >= uint64_t{1} << 40)) return INVALID_VALUE;
    }
    if (map.row_bytes() % 16 || (map.swizzle && map.row_bytes() > map.swizzle)) return INVALID_VALUE;
    if (type == PADDED_U4 && (map.box[0] != 128 || map.dims[0] % 128)) return INVALID_VALUE;
    memset(out, 0, 128);
    memcpy(out, &map, sizeof map);
    return SUCCESS;
}
