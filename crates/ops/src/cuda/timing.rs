//! How long operators take on a device: many launches as one recording, replayed and waited for.
//!
//! Not here: what should be timed and against which limit (`fathom bench kernels`).

use std::time::Instant;

use super::memory::Place;
use super::ops::CudaOps;
use crate::OpError;

/// Samples of which the median counts.
const SAMPLES: usize = 7;
/// Seconds one sample should take at least: launching and waiting cost some microseconds.
const SAMPLE_S: f64 = 0.02;

impl CudaOps {
    /// Median seconds of one of `n` calls of `body`, which gets the number of the call, so that
    /// inputs can rotate. Memory must be planned: nothing can be allocated while launches are
    /// recorded. Results are left to the next call.
    ///
    /// # Errors
    /// What `body` or the device fails with.
    pub fn time(
        &self,
        n: usize,
        body: &mut dyn FnMut(usize) -> Result<(), OpError>,
    ) -> Result<f64, OpError> {
        let device = self.memory().device();
        // Loads code.
        (0..n).try_for_each(&mut *body)?;
        device.begin_record().map_err(OpError::device)?;
        let recorded = (0..n).try_for_each(&mut *body);
        let id = device.end_record().map_err(OpError::device)?;
        let outcome = recorded.and_then(|()| {
            let mut replays = 1;
            let mut samples = Vec::with_capacity(SAMPLES);
            while samples.len() < SAMPLES {
                let start = Instant::now();
                for _ in 0..replays {
                    // SAFETY: the buffers of the recording lie in arenas that `self` keeps; what is
                    // alive of them is the caller's and was not given out again meanwhile, as
                    // nothing is allocated here.
                    unsafe { device.replay(id) }.map_err(OpError::device)?;
                }
                self.wait()?;
                let seconds = start.elapsed().as_secs_f64();
                if seconds < SAMPLE_S {
                    replays *= 2;
                } else {
                    samples.push(seconds / (replays * n) as f64);
                }
            }
            samples.sort_by(f64::total_cmp);
            Ok(samples[SAMPLES / 2])
        });
        device.forget(id);
        outcome
    }

    /// Waits for everything launched so far.
    fn wait(&self) -> Result<(), OpError> {
        self.memory().buffer(Place::Workspace, 4)?.read(0, 4).map(drop)
    }
}
