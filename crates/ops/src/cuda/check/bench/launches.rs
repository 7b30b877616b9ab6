//! What a launch costs that does nothing: recorded, by itself, and overlapping with the one before.
//!
//! Recordings of two lengths are timed, and the difference is divided by the difference of their
//! lengths: what beginning a recording costs falls away.

use std::sync::Arc;

use crate::cuda::device::Device;
use crate::cuda::memory::{ArenaSizes, Memory, Place};
use crate::cuda::ops::CudaOps;
use crate::cuda::overlap::Level;
use crate::cuda::rehearsal::Rehearsal;
use crate::cuda::timing::{Effort, Timed};
use crate::traits::HyperConnectionOps;
use crate::{Activations, Backend, Batch, OpError, WeightData, WeightSource};

/// Launches of the two recordings.
const LENGTHS: [usize; 2] = [100, 200];
/// Width of the embedding that is copied: next to nothing.
const WIDTH: usize = 8;

/// Seconds that one more launch takes, each waiting for the one before.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchCost {
    /// How it is launched.
    pub name: &'static str,
    /// Seconds of a launch.
    pub seconds: f64,
    /// What this may be wrong by: the quartiles' distance of both lengths.
    pub spread: f64,
}

/// Times launches of the smallest kernel there is a launcher for, in every way that the device has.
///
/// # Errors
/// [`OpError::Device`].
pub fn launches(
    device: &Arc<dyn Device>,
    effort: Effort,
    report: &mut dyn FnMut(LaunchCost),
) -> Result<(), OpError> {
    let activations = Activations::Bf16;
    let rehearsal = Rehearsal::memory(device.arch());
    Tiny::new(&CudaOps::over(rehearsal.clone(), activations))?.run()?;
    let [weights, cache, workspace] = Place::ALL.map(|place| rehearsal.reach(place));
    let memory = Memory::planned(Arc::clone(device), ArenaSizes { weights, cache, workspace })?;
    let tiny = Tiny::new(&CudaOps::over(memory, activations))?;
    let before = device.set_overlap(Level::Off);
    let measured = tiny.measure(effort, report);
    device.set_overlap(before);
    measured
}

/// One token's embedding.
struct Tiny {
    ops: CudaOps,
    table: crate::cuda::DeviceLinear,
    step: crate::cuda::DeviceStep,
}

impl Tiny {
    fn new(ops: &CudaOps) -> Result<Self, OpError> {
        let bytes = vec![0; 2 * WIDTH].into();
        let source = WeightSource::new("embed.weight", 1, WIDTH, WeightData::Bf16(bytes))?;
        let table = ops.load_linear(&source)?;
        let step = ops.prepare_exact_step(&Batch::single(0, 0, &[0], &[]))?;
        Ok(Self { ops: ops.clone(), table, step })
    }

    fn run(&self) -> Result<(), OpError> {
        self.ops.embed(&self.table, &self.step).map(drop)
    }

    fn measure(&self, effort: Effort, report: &mut dyn FnMut(LaunchCost)) -> Result<(), OpError> {
        let recorded = |name| self.one_more(name, |n| self.recorded(n, effort));
        report(recorded("recorded")?);
        report(self.one_more("by itself", |n| self.by_itself(n, effort))?);
        let device = self.ops.memory().device();
        device.set_overlap(Level::Runs);
        // A device that cannot stays as it was.
        if device.set_overlap(Level::Runs) == Level::Runs {
            report(recorded("recorded, overlapping")?);
            report(self.one_more("by itself, overlapping", |n| self.by_itself(n, effort))?);
        }
        Ok(())
    }

    fn recorded(&self, n: usize, effort: Effort) -> Result<Timed, OpError> {
        let mut all = || (0..n).try_for_each(|_| self.run());
        self.ops.replayed(2, effort.samples, &mut all).map(Timed::of)
    }

    fn by_itself(&self, n: usize, effort: Effort) -> Result<Timed, OpError> {
        let mut all = || (0..n).try_for_each(|_| self.run());
        self.ops.stamped(effort.samples, &mut all).map(Timed::of)
    }

    fn one_more(
        &self,
        name: &'static str,
        timed: impl Fn(usize) -> Result<Timed, OpError>,
    ) -> Result<LaunchCost, OpError> {
        let [few, many] = LENGTHS;
        let (few_s, many_s) = (timed(few)?, timed(many)?);
        let n = (many - few) as f64;
        let distance = |timed: Timed| timed.quartiles[1] - timed.quartiles[0];
        Ok(LaunchCost {
            name,
            seconds: (many_s.median - few_s.median) / n,
            spread: (distance(few_s) + distance(many_s)) / n,
        })
    }
}
