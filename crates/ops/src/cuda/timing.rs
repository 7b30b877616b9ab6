//! How long operators take on a device: many launches as one recording, replayed and waited for.
//!
//! Not here: what should be timed and against which limit (`fathom bench kernels`).

use super::ops::{Call, CudaOps};
use crate::OpError;

/// Copies and bare products of which the best counts.
const TRIES: usize = 7;
/// Calls of a recording at most: the driver keeps some memory for each.
const MAX_CALLS: usize = 1024;

/// How much is measured of one operator.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Samples of which the median counts.
    pub samples: usize,
    /// Seconds that one sample should take at least: beginning a recording costs some microseconds.
    pub sample_s: f64,
}

impl Effort {
    /// Enough to tell a few hundredths apart.
    pub const FULL: Self = Self { samples: 30, sample_s: 0.002 };
    /// To see that everything runs.
    pub const LEAST: Self = Self { samples: 1, sample_s: 0.0 };
}

/// Seconds of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timed {
    /// The median of the samples.
    pub median: f64,
    /// A quarter of the samples is below the first, a quarter above the second.
    pub quartiles: [f64; 2],
    /// How many there are.
    pub samples: usize,
}

impl Timed {
    /// Of the seconds of single samples; all zero without any.
    #[must_use]
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = samples.len().saturating_sub(1);
            samples.get((last as f64 * share).round() as usize).copied().unwrap_or(0.0)
        };
        Self { median: at(0.5), quartiles: [at(0.25), at(0.75)], samples: samples.len() }
    }

    /// The distance of the quartiles as a share of the median.
    #[must_use]
    pub fn spread(&self) -> f64 {
        if self.median > 0.0 { (self.quartiles[1] - self.quartiles[0]) / self.median } else { 0.0 }
    }
}

impl CudaOps {
    /// Seconds of one call of `body`, which gets the number of an input below `n_inputs`: inputs
    /// rotate, and every sample reads each of them. A sample is a replay of a recording. Memory must be
    /// planned: nothing can be allocated while launches are recorded. Results are left to the next
    /// call.
    ///
    /// # Errors
    /// What `body` or the device fails with.
    pub fn time(
        &self,
        n_inputs: usize,
        effort: Effort,
        body: &mut dyn FnMut(usize) -> Result<(), OpError>,
    ) -> Result<Timed, OpError> {
        let device = self.memory().device();
        let n_inputs = n_inputs.max(1);
        let mut rounds = |n: usize| (0..n * n_inputs).try_for_each(|call| body(call % n_inputs));
        // Loads code.
        rounds(1)?;
        let one: f64 = self.stamped::<OpError>(1, &mut || rounds(1))?.iter().sum();
        let wanted = if one > 0.0 { (effort.sample_s / one).ceil() as usize } else { 1 };
        let n_rounds = wanted.clamp(1, (MAX_CALLS / n_inputs).max(1));
        device.begin_record().map_err(OpError::device)?;
        let recorded = rounds(n_rounds);
        let id = device.end_record().map_err(OpError::device)?;
        let outcome = recorded.and_then(|()| {
            // SAFETY: the buffers of the recording lie in arenas that `self` keeps; what is alive of
            // them is the caller's and was not given out again meanwhile, as nothing is allocated here.
            let mut replay = || unsafe { device.replay(id) }.map_err(OpError::device);
            // The first brings the recording to the device, and keeps it busy until the next begins.
            replay()?;
            let seconds = self.stamped(effort.samples.max(1), &mut replay)?;
            let n_calls = (n_rounds * n_inputs) as f64;
            Ok(Timed::of(seconds.iter().map(|seconds| seconds / n_calls).collect()))
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
        let seconds = self.stamped::<OpError>(TRIES, &mut || {
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
        let seconds = self.stamped::<OpError>(TRIES, &mut || {
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
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::Rehearsal;
    use super::*;
    use crate::Activations;

    #[test]
    fn the_median_and_the_middle_half_are_told() {
        let timed = Timed::of(vec![5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!((timed.median, timed.quartiles, timed.samples), (3.0, [2.0, 4.0], 5));
        assert!((timed.spread() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(Timed::of(Vec::new()).spread(), 0.0);
    }

    #[test]
    fn every_sample_reads_each_input_as_often_as_the_others() {
        // Where nothing takes time, a recording has as many calls as it may.
        for (effort, n_recorded) in [(Effort::LEAST, 1), (Effort::FULL, MAX_CALLS / 3)] {
            let ops = CudaOps::over(Rehearsal::memory("sm_80"), Activations::Bf16);
            let mut calls = [0; 3];
            let timed = ops.time(3, effort, &mut |input| {
                calls[input] += 1;
                Ok(())
            });
            assert_eq!(timed.unwrap().samples, effort.samples);
            // Twice before.
            assert_eq!(calls, [2 + n_recorded; 3]);
        }
    }
}
