// Machine code, what is allowed to its kernels, launches of them, and the maps they copy through.
#include <string.h>
#include <unistd.h>

#include "handles.h"

namespace drv {

namespace {

std::set<Function*> functions;

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

} // namespace

} // namespace drv

using namespace drv;

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
