//! A time on the driver's clock.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

/// A driver's event with a time.
pub struct Event {
    event: sys::CUevent,
    /// Alive as long as the event.
    context: Arc<CudaContext>,
}

// SAFETY: the driver does not care which thread uses an event; nothing here changes one after it
// was recorded.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One for when everything on `stream` so far is done; the context is bound.
    pub(super) fn record(
        context: &Arc<CudaContext>,
        stream: &CudaStream,
    ) -> Result<Self, DriverError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        let made = Self { event, context: Arc::clone(context) };
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(event, stream.cu_stream()) }?;
        Ok(made)
    }

    /// Milliseconds from `self` to `later`, which is waited for; the context is bound.
    pub(super) fn milliseconds_to(&self, later: &Self) -> Result<f32, DriverError> {
        // SAFETY: both events are alive and were recorded.
        unsafe {
            result::event::synchronize(later.event)?;
            result::event::elapsed(self.event, later.event)
        }
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").finish_non_exhaustive()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // A failure means that the context is gone already.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the event was made by `record` and nobody else has it.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
