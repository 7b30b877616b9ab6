//! How long operators take on a device: many launches as one recording, replayed and waited for.
//!
//! Not here: what should be timed and against which limit (`fathom bench kernels`).

use std::time::Instant;

use super::memory::Place;
use super::ops::{Call, CudaOps};
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

    /// Seconds of each of `n` calls of `body`, which launches work and does not wait: the device notes
    /// the time between them, so only where it waits for the host does that show.
    ///
    /// # Errors
    /// What `body` or the device fails with.
    pub fn stamped<E: From<OpError>>(
        &self,
        n: usize,
        body: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<Vec<f64>, E> {
        let device = self.memory().device();
        let mut stamps = vec![device.stamp().map_err(OpError::device)?];
        for _ in 0..n {
            body()?;
            stamps.push(device.stamp().map_err(OpError::device)?);
        }
        let seconds = stamps.windows(2).map(|pair| device.seconds_between(&pair[0], &pair[1]));
        Ok(seconds.collect::<Result<_, _>>().map_err(OpError::device)?)
    }

    /// Seconds of each of `n` replays of what `body` launches, after `n_before` others. Memory must be
    /// planned, as for [`time`](Self::time).
    ///
    /// # Errors
    /// What `body` or the device fails with.
    pub fn replayed<E: From<OpError>>(
        &self,
        n_before: usize,
        n: usize,
        body: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<Vec<f64>, E> {
        let device = self.memory().device();
        // Loads code.
        body()?;
        device.begin_record().map_err(OpError::device)?;
        let recorded = body();
        let id = device.end_record().map_err(OpError::device)?;
        let outcome = recorded.and_then(|()| {
            // SAFETY: as in `time`.
            let mut replay = || unsafe { device.replay(id) }.map_err(OpError::device);
            (0..n_before).try_for_each(|_| replay())?;
            Ok(self.stamped(n, &mut replay)?)
        });
        device.forget(id);
        outcome
    }

    /// Bytes per second at which the device copies memory, read and written bytes counted: the
    /// best of a few copies of `bytes` bytes.
    ///
    /// # Errors
    /// [`OpError::Device`] if there is no room for twice the bytes.
    pub fn copy_rate(&self, bytes: usize) -> Result<f64, OpError> {
        let [from, to] = [self.buffer(bytes)?, self.buffer(bytes)?];
        from.fill(0x5a)?;
        let device = self.memory().device();
        let seconds = self.stamped::<OpError>(SAMPLES, &mut || {
            device.copy(from.address(), to.address(), bytes).map_err(OpError::device)
        })?;
        Ok(2.0 * bytes as f64 / seconds.iter().copied().fold(f64::INFINITY, f64::min))
    }

    /// Operations per second at which the tensor cores multiply when nothing is in their way, with
    /// whether the values are FP8: of `n_rounds` rounds in each of `n_blocks` blocks.
    ///
    /// # Errors
    /// [`OpError::Device`].
    pub fn product_rate(&self, n_blocks: u32, n_rounds: u32) -> Result<(f64, bool), OpError> {
        const THREADS: u32 = 256;
        let is_hopper = self.is_hopper();
        let out = self.buffer(4 * n_blocks as usize * THREADS as usize / 32)?;
        // Products of a block in a round, and the multiplications and additions of each.
        let (kernel, shared_bytes, flops) = if is_hopper {
            ("rate90_e4m3", 16 << 10, 2 * 4 * 2 * 64 * 128 * 32)
        } else {
            ("rate_bf16", 0, 8 * 16 * 2 * 16 * 8 * 16)
        };
        let seconds = self.stamped::<OpError>(SAMPLES, &mut || {
            // SAFETY: `out` has a value for every warp of the grid.
            unsafe {
                self.launch(Call {
                    kernel,
                    grid: [n_blocks as usize, 1, 1],
                    threads: THREADS,
                    shared_bytes,
                    args: &[(&out).into(), n_rounds.into()],
                })
            }
        })?;
        let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        Ok((f64::from(n_blocks) * f64::from(n_rounds) * f64::from(flops) / best, is_hopper))
    }

    /// Waits for everything launched so far.
    fn wait(&self) -> Result<(), OpError> {
        self.memory().buffer(Place::Workspace, 4)?.read(0, 4).map(drop)
    }
}
