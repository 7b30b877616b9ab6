// Device bodies: asynchronous 16-byte copies from global to shared memory (sm_80 and later).
//
// Twin: `host.cuh`. Included by `device.cuh` only.
#pragma once

// 16 bytes from `source`, or 16 zero bytes if not `valid`; `source` is then not read.
INLINE void cp_async16(void* destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(destination)),
                 "l"(source), "r"(valid ? 16u : 0u)
                 : "memory");
}
INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's newest groups are still on their way.
template <int Pending>
INLINE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
