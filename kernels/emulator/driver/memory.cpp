// Memory of the device, from a pool or not, pinned memory, and copies between them.
#include <stdlib.h>
#include <string.h>

#include "handles.h"

namespace drv {

namespace {

int pool_object;
std::map<uint64_t, uint64_t> device_memory; // bytes by address
uint64_t used = 0, kept = 0, keeps_at_most = 0;
// Copies under way by the pinned memory they use.
std::multiset<const char*> in_copies;

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

} // namespace

void waited() {
    if (kept > keeps_at_most) kept = keeps_at_most;
}

Result wait_until(const OpPtr& op) {
    run_until(op);
    waited();
    return broken;
}

} // namespace drv

using namespace drv;

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
