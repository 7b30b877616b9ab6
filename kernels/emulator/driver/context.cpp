// The driver, its only device and the context of that.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "handles.h"

namespace drv {

std::recursive_mutex lock;
bool is_initialised = false;
uint32_t retained = 0;
thread_local void* current_context = nullptr;
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Module*> modules;
std::set<Graph*> executables;
std::map<char*, size_t> pinned;

namespace {

int context_object;
void* const CONTEXT = &context_object;

constexpr Arch ARCHS[] = {
    {"sm_80", 8, 0, 108, 163 << 10}, {"sm_89", 8, 9, 128, 99 << 10},  {"sm_90a", 9, 0, 132, 227 << 10},
    {"sm_100f", 10, 0, 148, 227 << 10}, {"sm_120", 12, 0, 170, 99 << 10},
};

Settings read_settings() {
    Settings out;
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
    return out;
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

} // namespace

const Settings& settings() {
    static const Settings read = read_settings();
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
