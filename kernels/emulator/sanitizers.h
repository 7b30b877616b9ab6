// What AddressSanitizer must be told, where the emulator is built with it: which memory nobody may touch,
// and which stack is in use. Nothing in the build whose accesses call the emulator.
//
// In the sanitizers' build no access calls the emulator, so it cannot know what was written and by whom:
// reads of what was never written, races and missing proxy fences are found by the other build alone.
#pragma once

#include <stddef.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool SEES_ACCESSES = false;
inline void forbid(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void permit(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
// Around a switch of stacks: `from` keeps what the sanitizer knows of the one that is left, null if for good.
inline void before_switch(void** from, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(from, bottom, bytes);
}
inline void after_switch(void* own, const void** bottom, size_t* bytes) {
    __sanitizer_finish_switch_fiber(own, bottom, bytes);
}
#else
constexpr bool SEES_ACCESSES = true;
inline void forbid(const void*, size_t) {}
inline void permit(const void*, size_t) {}
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
#endif

} // namespace emu
