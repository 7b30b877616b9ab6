// What handles are out, and what every exported function begins with.
//
// Every call takes one lock: nothing runs at the same time here, but in every order that is allowed.
#pragma once

#include <map>
#include <mutex>
#include <set>

#include "driver.h"

namespace drv {

// context.cpp
extern std::recursive_mutex lock;
extern bool is_initialised;
extern uint32_t retained; // how often the only context is
extern thread_local void* current_context;

struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
};

extern std::set<Stream*> streams;
extern std::set<Event*> events;
extern std::set<Module*> modules;
extern std::set<Graph*> executables;
extern std::map<char*, size_t> pinned; // bytes of pinned memory by address

template <class T>
T* live(const std::set<T*>& all, void* handle, const char* what) {
    T* object = static_cast<T*>(handle);
    if (!all.count(object)) die("%s %p is used, and is not or no longer there", what, handle);
    return object;
}
inline Stream& stream_of(void* handle) {
    if (!handle) die("the default stream is used, which is not emulated");
    return *live(streams, handle, "stream");
}
inline Event& event_of(void* handle) { return *live(events, handle, "event"); }

// memory.cpp
// What a wait for the device does to memory that the pool has kept.
void waited();
// Runs what an event or a stream stands for, and answers as of a wait.
Result wait_until(const OpPtr& op);

} // namespace drv

#define EXPORT extern "C" __attribute__((visibility("default"))) drv::Result
// What every call that needs a context begins with.
#define IN_CONTEXT                                                                   \
    const std::lock_guard<std::recursive_mutex> guard(lock);                         \
    if (!is_initialised) return NOT_INITIALIZED;                                     \
    if (!current_context || !retained) return INVALID_CONTEXT;                       \
    maybe_run_some();
#define OR_RETURN(call) \
    if (const Result result = (call); result != SUCCESS) return result;
