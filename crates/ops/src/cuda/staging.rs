//! Copies between host and device through pinned memory, several on their way at once.
//!
//! A copy from or to ordinary memory makes the driver wait; from pinned memory it goes on beside the
//! host. So bytes are copied here into one of a few pinned slots (by all cores, if there are many)
//! and sent from there, while the next slot is filled. A slot is used again when its copy has ended.
//!
//! Not yet run on a GPU.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use rayon::prelude::*;

use super::event::Event;

/// Slots and their size: enough in flight to keep a PCIe 5 link busy while one is filled.
const N_SLOTS: usize = 8;
const SLOT_BYTES: usize = 8 << 20;
/// How often all slots are sent to see how fast that is, and how often that is tried.
const RATE_ROUNDS: usize = 4;
const RATE_TRIES: usize = 3;
/// Bytes that one core copies at a time.
const PART_BYTES: usize = 1 << 20;

/// Pinned memory and the copy that last used it.
struct Slot {
    memory: NonNull<u8>,
    copied: sys::CUevent,
    is_busy: bool,
}

/// See the module. The context must be bound to the calling thread in every call.
pub(super) struct Staging {
    slots: Vec<Slot>,
    next: usize,
}

// SAFETY: slots are used through `&mut` only; pinned memory and events belong to no thread.
unsafe impl Send for Staging {}

impl Staging {
    /// Bytes of all slots.
    pub(super) const BYTES: usize = N_SLOTS * SLOT_BYTES;

    /// Allocates the slots.
    pub(super) fn new() -> Result<Self, DriverError> {
        let mut staging = Self { slots: Vec::with_capacity(N_SLOTS), next: 0 };
        for _ in 0..N_SLOTS {
            // SAFETY: the context is bound; the memory is freed in `drop`.
            let memory = unsafe { result::malloc_host(SLOT_BYTES, 0) }?;
            let memory = NonNull::new(memory.cast::<u8>())
                .ok_or(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY))?;
            let copied = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .inspect_err(|_| {
                    // SAFETY: just allocated, used by nobody. A failure leaks it.
                    let _ = unsafe { result::free_host(memory.as_ptr().cast::<c_void>()) };
                })?;
            staging.slots.push(Slot { memory, copied, is_busy: false });
        }
        Ok(staging)
    }

    /// The next slot, free.
    fn slot(&mut self) -> Result<usize, DriverError> {
        let index = self.next;
        self.next = (index + 1) % self.slots.len();
        let slot = &mut self.slots[index];
        if slot.is_busy {
            // SAFETY: the event was recorded after the slot's last copy.
            unsafe { result::event::synchronize(slot.copied) }?;
            slot.is_busy = false;
        }
        Ok(index)
    }

    /// Sends `bytes` to `address`; has taken them when it returns.
    ///
    /// # Safety
    /// `address` has room for the bytes and `stream` is alive.
    pub(super) unsafe fn write(
        &mut self,
        address: u64,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        for (index, chunk) in bytes.chunks(SLOT_BYTES).enumerate() {
            let at = self.slot()?;
            let slot = &mut self.slots[at];
            // SAFETY: the slot has SLOT_BYTES bytes, no copy reads it any more, and `self` is
            // borrowed mutably.
            let pinned = unsafe { slice::from_raw_parts_mut(slot.memory.as_ptr(), chunk.len()) };
            if chunk.len() > PART_BYTES {
                pinned
                    .par_chunks_mut(PART_BYTES)
                    .zip(chunk.par_chunks(PART_BYTES))
                    .for_each(|(to, from)| to.copy_from_slice(from));
            } else {
                pinned.copy_from_slice(chunk);
            }
            let to = address + (index * SLOT_BYTES) as u64;
            // SAFETY: the caller's promise; the slot is not written before the event below.
            unsafe { result::memcpy_htod_async(to, pinned, stream) }?;
            slot.is_busy = true;
            // SAFETY: event and stream are alive.
            unsafe { sent(slot.copied, stream) }?;
        }
        Ok(())
    }

    /// Bytes per second at which the slots reach `address` when nobody has to fill them: the best of a few
    /// tries.
    ///
    /// # Safety
    /// `address` has room for [`BYTES`](Self::BYTES) and `stream` is alive.
    pub(super) unsafe fn rate(
        &mut self,
        address: u64,
        context: &Arc<CudaContext>,
        stream: &CudaStream,
    ) -> Result<f64, DriverError> {
        for _ in 0..N_SLOTS {
            let at = self.slot()?;
            // SAFETY: the slot has SLOT_BYTES bytes, and no copy reads it any more.
            unsafe { self.slots[at].memory.write_bytes(0x5a, SLOT_BYTES) };
        }
        let mut best = f64::INFINITY;
        for _ in 0..RATE_TRIES {
            let begun = Event::record(context, stream)?;
            for slot in std::iter::repeat_n(&self.slots, RATE_ROUNDS).flat_map(|all| (0..).zip(all))
            {
                let (index, Slot { memory, .. }) = slot;
                // SAFETY: filled above; nobody writes it before the copies have ended, below.
                let pinned = unsafe { slice::from_raw_parts(memory.as_ptr(), SLOT_BYTES) };
                let to = address + (index * SLOT_BYTES) as u64;
                // SAFETY: the caller's promise.
                unsafe { result::memcpy_htod_async(to, pinned, stream.cu_stream()) }?;
            }
            let ended = Event::record(context, stream)?;
            best = best.min(f64::from(begun.milliseconds_to(&ended)?) / 1e3);
        }
        Ok((RATE_ROUNDS * Self::BYTES) as f64 / best)
    }

    /// Fetches the bytes at `address`, after everything on `stream` so far.
    ///
    /// # Safety
    /// There are as many bytes at `address` and `stream` is alive.
    pub(super) unsafe fn read(
        &mut self,
        address: u64,
        out: &mut [u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        let n_slots = self.slots.len();
        for (round, group) in out.chunks_mut(n_slots * SLOT_BYTES).enumerate() {
            let mut used = Vec::with_capacity(n_slots);
            for (index, chunk) in group.chunks(SLOT_BYTES).enumerate() {
                let at = self.slot()?;
                let slot = &mut self.slots[at];
                // SAFETY: as in `write`.
                let pinned =
                    unsafe { slice::from_raw_parts_mut(slot.memory.as_ptr(), chunk.len()) };
                let from = address + ((round * n_slots + index) * SLOT_BYTES) as u64;
                // SAFETY: the caller's promise; the slot is read after the event below.
                unsafe { result::memcpy_dtoh_async(pinned, from, stream) }?;
                slot.is_busy = true;
                // SAFETY: event and stream are alive.
                unsafe { sent(slot.copied, stream) }?;
                used.push(at);
            }
            for (at, chunk) in used.into_iter().zip(group.chunks_mut(SLOT_BYTES)) {
                let slot = &mut self.slots[at];
                // SAFETY: the event was recorded after this slot's copy.
                unsafe { result::event::synchronize(slot.copied) }?;
                slot.is_busy = false;
                // SAFETY: the copy has ended, so nothing writes the slot.
                chunk.copy_from_slice(unsafe {
                    slice::from_raw_parts(slot.memory.as_ptr(), chunk.len())
                });
            }
        }
        Ok(())
    }
}

/// Notes where a copy that was just sent ends. If that fails the copy is waited for: nobody could know
/// later when its slot is free.
///
/// # Safety
/// Both are alive.
unsafe fn sent(copied: sys::CUevent, stream: sys::CUstream) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    let noted = unsafe { result::event::record(copied, stream) };
    if noted.is_err() {
        // SAFETY: as above. The error to tell is the first.
        let _ = unsafe { result::stream::synchronize(stream) };
    }
    noted
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in self.slots.drain(..) {
            // A failure here means that the context is gone, and the memory with it.
            // SAFETY: every copy of the slot has ended after the synchronisation.
            unsafe {
                let _ = result::event::synchronize(slot.copied);
                let _ = result::event::destroy(slot.copied);
                let _ = result::free_host(slot.memory.as_ptr().cast::<c_void>());
            }
        }
    }
}
