//! Steps of a shape that has run before are replayed: one call instead of a launch per kernel.
//!
//! The first step of a shape runs launch by launch, which also loads all code; the second is recorded
//! and replayed, later ones are replayed. This works because buffers of a step are where they were
//! ([`memory`](super::memory)) and everything that differs is in the step's block in device memory
//! ([`step`](super::step)).
//!
//! Where the device refuses to record or to replay a shape, its steps go on running launch by launch.
//!
//! Invariants:
//! - a recording keeps the arenas that its launches name alive;
//! - nothing but the step's own block is in the workspace when a recording is made or replayed, so
//!   nobody else's buffer is written, and the launches find the block where they expect it.

use std::collections::HashMap;

use super::DeviceCache;
use super::device::DeviceError;
use super::memory::{ALIGNMENT, Memory, Place};
use super::ops::CudaOps;
use super::step::{DeviceStep, Shape};
use super::tensor::{DeviceTensor, Element};
use crate::OpError;
use crate::traits::PassOutput;

/// Recordings a cache keeps; each takes some MiB of the driver's memory. Then the one that was used
/// longest ago makes room.
pub(super) const MAX_RECORDINGS: usize = 64;

/// What is known of the steps of one pass and shape.
#[derive(Debug)]
enum Known {
    /// One has run.
    Seen,
    Recorded(Recorded),
    /// The device would not record one, or not replay it: they run launch by launch.
    Refused,
}

/// All recordings over one cache.
#[derive(Debug, Default)]
pub(crate) struct Recordings {
    known: HashMap<(&'static str, Shape), Known>,
    n_replays: usize,
}

impl Recordings {
    /// Replays the recording of `key`. Where that fails, later steps run launch by launch.
    fn replay(
        &mut self,
        key: (&'static str, Shape),
        step: &DeviceStep,
        cache: &DeviceCache,
    ) -> Result<PassOutput<DeviceTensor>, OpError> {
        self.n_replays += 1;
        let Some(Known::Recorded(recorded)) = self.known.get_mut(&key) else {
            return Err(OpError::OutOfRange { op: "replay", what: "recording", got: 0, limit: 0 });
        };
        recorded.last_use = self.n_replays;
        let output = recorded.replay(step, cache);
        if output.is_err() {
            self.known.insert(key, Known::Refused);
        }
        output
    }

    /// Has room for one more.
    fn make_room(&mut self) {
        let recorded = self.known.iter().filter_map(|(key, known)| match known {
            Known::Recorded(recorded) => Some((recorded.last_use, *key)),
            Known::Seen | Known::Refused => None,
        });
        let all: Vec<_> = recorded.collect();
        if all.len() >= MAX_RECORDINGS
            && let Some((_, oldest)) = all.into_iter().min_by_key(|(last_use, _)| *last_use)
        {
            self.known.insert(oldest, Known::Seen);
        }
    }
}

/// Launches of a step, and where it leaves its results.
#[derive(Debug)]
struct Recorded {
    memory: Memory,
    id: u64,
    /// Address of the step's block.
    block: u64,
    token_limit: u32,
    /// The number of replays when it was last used.
    last_use: usize,
    logits: Option<Left>,
    copies: Option<Left>,
}

/// Where a tensor lies in the workspace.
#[derive(Debug, Clone, Copy)]
struct Left {
    address: u64,
    rows: usize,
    cols: usize,
    element: Element,
}

impl Left {
    fn of(tensor: &DeviceTensor) -> Self {
        let DeviceTensor { rows, cols, element, .. } = *tensor;
        Self { address: tensor.values.address(), rows, cols, element }
    }

    /// The tensor, taken into possession again.
    fn tensor(self, memory: &Memory) -> Result<DeviceTensor, OpError> {
        let Self { address, rows, cols, element } = self;
        let bytes = rows * cols * element.bytes();
        let values = memory.claim(Place::Workspace, address, bytes).ok_or(OpError::OutOfRange {
            op: "replay",
            what: "result in a workspace that is in use, bytes",
            got: memory.used(Place::Workspace),
            limit: 0,
        })?;
        Ok(DeviceTensor { rows, cols, element, values, quantised: None, addends: None })
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.memory.device().forget(self.id);
    }
}

/// The error of a recording, whose steps then run launch by launch: slower, and else nobody would know.
fn told(error: DeviceError) -> OpError {
    tracing::warn!(%error, "steps of one shape cannot be recorded and are launched kernel by kernel");
    OpError::device(error)
}

/// Runs what it holds when it goes.
struct OnDrop<T, F: FnOnce() -> T>(Option<F>);

impl<T, F: FnOnce() -> T> Drop for OnDrop<T, F> {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            run();
        }
    }
}

impl Recorded {
    /// Records what `pass` launches; nothing of it runs.
    fn new<E: From<OpError>>(
        ops: &CudaOps,
        step: &DeviceStep,
        cache: &mut DeviceCache,
        pass: &mut impl FnMut(&mut DeviceCache) -> Result<PassOutput<DeviceTensor>, E>,
    ) -> Result<Self, E> {
        let device = ops.memory.device();
        device.begin_record().map_err(told)?;
        // Ended in any case, also if the pass panics: else the device would record for ever.
        let mut open = OnDrop(Some(|| device.end_record().map(|id| device.forget(id))));
        let output = pass(cache);
        open.0 = None;
        let id = device.end_record().map_err(told);
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                if let Ok(id) = id {
                    device.forget(id);
                }
                return Err(error);
            }
        };
        Ok(Self {
            memory: ops.memory.clone(),
            id: id?,
            block: step.block.address(),
            token_limit: step.token_limit(),
            last_use: 0,
            logits: output.logits.as_ref().map(Left::of),
            copies: output.copies.as_ref().map(Left::of),
        })
    }

    fn replay(
        &self,
        step: &DeviceStep,
        cache: &DeviceCache,
    ) -> Result<PassOutput<DeviceTensor>, OpError> {
        step.check_tokens("replay", self.token_limit as usize)?;
        step.check_cache("replay", &cache.spec)?;
        let device = self.memory.device();
        // SAFETY: weights, cache and workspace are in the arenas that `memory` keeps; the launches
        // were checked for every step of this shape whose tokens and ids are in range, as this
        // one's are; the workspace holds this step's block at the recorded address (the caller
        // compared it) and nothing else.
        unsafe { device.replay(self.id) }.map_err(OpError::device)?;
        let take = |left: Option<Left>| left.map(|left| left.tensor(&self.memory)).transpose();
        Ok(PassOutput { logits: take(self.logits)?, copies: take(self.copies)? })
    }
}

impl CudaOps {
    /// See [`Backend::run_pass`](crate::Backend::run_pass).
    pub(crate) fn run_or_replay<E: From<OpError>>(
        &self,
        name: &'static str,
        step: &DeviceStep,
        cache: &mut DeviceCache,
        mut pass: impl FnMut(&mut DeviceCache) -> Result<PassOutput<DeviceTensor>, E>,
    ) -> Result<PassOutput<DeviceTensor>, E> {
        let Some(shape) = step.shape else { return pass(cache) };
        let key = (name, shape);
        let block_bytes = step.block.len().next_multiple_of(ALIGNMENT);
        let is_alone = self.memory.used(Place::Workspace) == block_bytes;
        let mut recordings = std::mem::take(&mut cache.recordings);
        let output = match recordings.known.get(&key) {
            Some(Known::Recorded(recorded))
                if is_alone && recorded.block == step.block.address() =>
            {
                recordings.replay(key, step, cache).map_err(E::from)
            }
            Some(Known::Seen) if is_alone => {
                recordings.make_room();
                match Recorded::new(self, step, cache, &mut pass) {
                    Ok(recorded) => {
                        recordings.known.insert(key, Known::Recorded(recorded));
                        recordings.replay(key, step, cache).map_err(E::from)
                    }
                    // If it is the pass that cannot run, it says so again.
                    Err(_) => {
                        recordings.known.insert(key, Known::Refused);
                        pass(cache)
                    }
                }
            }
            _ => {
                recordings.known.entry(key).or_insert(Known::Seen);
                pass(cache)
            }
        };
        cache.recordings = recordings;
        // What was computed for rows that repeat the first is nobody's.
        let cut = |tensor: Option<DeviceTensor>| {
            tensor.map(|tensor| DeviceTensor {
                rows: step.batch.n_tokens(),
                quantised: None,
                ..tensor
            })
        };
        output.map(|output| PassOutput { logits: cut(output.logits), copies: cut(output.copies) })
    }

    /// Steps over `cache` that were replayed so far.
    #[must_use]
    pub fn n_replays(&self, cache: &DeviceCache) -> usize {
        cache.recordings.n_replays
    }
}

#[cfg(test)]
mod tests {
    use super::super::rehearsal::Rehearsal;
    use super::*;

    #[test]
    fn the_recording_that_was_used_longest_ago_makes_room_for_a_new_one() {
        let recorded = |last_use| {
            let memory = Rehearsal::memory("sm_80");
            let (id, block, token_limit) = (0, 0, 1);
            let (logits, copies) = (None, None);
            Known::Recorded(Recorded { memory, id, block, token_limit, last_use, logits, copies })
        };
        let key = |n: usize| ("step", Shape { rows: n, context: 1024, has_blocks: true });
        let mut recordings = Recordings::default();
        // The third is the oldest.
        for n in 0..MAX_RECORDINGS {
            recordings.make_room();
            recordings.known.insert(key(n), recorded(if n == 2 { 1 } else { 10 + n }));
        }
        assert!(recordings.known.values().all(|known| matches!(known, Known::Recorded(_))));
        recordings.make_room();
        assert!(matches!(recordings.known[&key(2)], Known::Seen));
        recordings.known.insert(key(MAX_RECORDINGS), recorded(100));
        recordings.make_room();
        assert!(matches!(recordings.known[&key(0)], Known::Seen));
    }
}
