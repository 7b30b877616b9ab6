// Machine code as far as a launch is judged by it: what the compiler has left in a cubin (an ELF file) about
// each kernel's parameters, registers, threads, shared memory and cluster.
//
// The format of `.nv.info` is not documented; the few attributes read here are plain in what the compiler
// prints for the same kernel (`cuobjdump -elf`).
#include <string.h>

#include <map>

#include "driver.h"

namespace drv {

namespace {

constexpr uint32_t REGISTERS = 65536; // of a multiprocessor, on every architecture here
constexpr uint32_t REGISTER_UNIT = 8, WARP = 32;

template <class T>
T at(const char* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

struct Section {
    std::string name;
    const char* data;
    uint64_t bytes;
    uint32_t info;
};

std::vector<Section> sections(const char* elf) {
    const auto offset = at<uint64_t>(elf + 0x28);
    const uint32_t entry = at<uint16_t>(elf + 0x3a), count = at<uint16_t>(elf + 0x3c), names = at<uint16_t>(elf + 0x3e);
    const auto header = [&](uint32_t i) { return elf + offset + uint64_t{entry} * i; };
    const char* strings = elf + at<uint64_t>(header(names) + 0x18);
    std::vector<Section> all;
    for (uint32_t i = 0; i < count; ++i) {
        const char* h = header(i);
        all.push_back({strings + at<uint32_t>(h), elf + at<uint64_t>(h + 0x18), at<uint64_t>(h + 0x20), at<uint32_t>(h + 0x2c)});
    }
    return all;
}

// Attributes of one kernel: a byte each for format and name, then two of value or of length.
void read_attributes(const Section& section, KernelInfo& kernel) {
    std::map<uint32_t, uint32_t> parameters;
    for (const char *p = section.data, *end = p + section.bytes; p + 4 <= end;) {
        const uint8_t format = p[0], attribute = p[1];
        const uint16_t value = at<uint16_t>(p + 2);
        p += 4;
        if (format != 4) continue; // the value was all
        switch (attribute) {
        case 0x05: kernel.max_threads = at<uint32_t>(p) * at<uint32_t>(p + 4) * at<uint32_t>(p + 8); break;
        case 0x17: parameters[at<uint16_t>(p + 4)] = at<uint32_t>(p + 8) >> 18; break;
        case 0x3d: kernel.cluster = at<uint32_t>(p) * at<uint32_t>(p + 4) * at<uint32_t>(p + 8); break;
        }
        p += value;
    }
    for (const auto& [ordinal, bytes] : parameters) kernel.parameters.push_back(bytes);
}

bool starts_with(const std::string& text, const char* start) { return !text.rfind(start, 0); }

} // namespace

std::vector<KernelInfo> read_image(const void* image, const Arch& arch, Result& error) {
    error = INVALID_IMAGE;
    const char* elf = static_cast<const char*>(image);
    if (memcmp(elf, "\x7f" "ELF", 4)) return {};
    if (elf[4] == 0) { // the stand-in: nothing follows
        error = SUCCESS;
        return {};
    }
    const uint32_t made_for = at<uint32_t>(elf + 0x30) >> 8 & 0xff;
    error = NO_BINARY_FOR_GPU;
    if (static_cast<int32_t>(made_for / 10) != arch.major || static_cast<int32_t>(made_for % 10) > arch.minor) return {};
    const std::vector<Section> all = sections(elf);
    std::map<std::string, KernelInfo> kernels;
    const char text[] = ".text.", info[] = ".nv.info.", shared[] = ".nv.shared.";
    for (const Section& section : all)
        if (starts_with(section.name, text)) {
            KernelInfo& kernel = kernels[section.name.substr(sizeof text - 1)];
            kernel.name = section.name.substr(sizeof text - 1);
            kernel.n_registers = section.info >> 24;
            kernel.is_known = true;
        }
    for (const Section& section : all) {
        const bool is_info = starts_with(section.name, info), is_shared = starts_with(section.name, shared);
        if (!is_info && !is_shared) continue;
        const auto found = kernels.find(section.name.substr(is_info ? sizeof info - 1 : sizeof shared - 1));
        if (found == kernels.end()) continue;
        if (is_info) read_attributes(section, found->second);
        if (is_shared) found->second.static_shared_bytes = section.bytes;
    }
    std::vector<KernelInfo> out;
    for (auto& [name, kernel] : kernels) out.push_back(std::move(kernel));
    error = out.empty() ? INVALID_IMAGE : SUCCESS;
    return out;
}

Result check_launch(const Function& function, const LaunchShape& shape) {
    const KernelInfo& info = function.info;
    const emu::Dim3 g = shape.grid, b = shape.block;
    const uint64_t threads = uint64_t{b.x} * b.y * b.z;
    if (!g.x || !g.y || !g.z || !threads) return INVALID_VALUE;
    if (g.x > 0x7fffffff || g.y > 0xffff || g.z > 0xffff || b.x > 1024 || b.y > 1024 || b.z > 64) return INVALID_VALUE;
    if (threads > info.max_threads) return INVALID_VALUE;
    const uint64_t registers = (info.n_registers + REGISTER_UNIT - 1) / REGISTER_UNIT * REGISTER_UNIT;
    if (registers * ((threads + WARP - 1) / WARP * WARP) > REGISTERS) return LAUNCH_OUT_OF_RESOURCES;
    if (shape.shared_bytes > function.dynamic_shared_bytes) return INVALID_VALUE;
    if (shape.shared_bytes + info.static_shared_bytes > settings().arch->shared_bytes) return INVALID_VALUE;
    if (g.x % info.cluster) return INVALID_CLUSTER_SIZE;
    if (info.cluster > 8 && !function.may_have_large_clusters) return INVALID_CLUSTER_SIZE;
    return info.cluster > settings().largest_cluster ? INVALID_CLUSTER_SIZE : SUCCESS;
}

} // namespace drv
