//! A device that only counts: what a model, its cache and its steps would take on a real one.
//!
//! Loading a model and running steps over it takes the same allocations in the same order as on a
//! GPU, because it is the same code; nothing is stored, nothing computed. Afterwards
//! [`Memory::reach`] says how large each arena must be.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Device, DeviceError, Launch};
use super::memory::{ArenaSizes, Memory};
use super::overlap::{Level, Overlap};
use super::source;
use super::tensor_map::{TensorMap, TensorMapSpec};

/// Addresses of one arena: more than any GPU has.
const ARENA_BYTES: usize = 1 << 44;

/// See the module.
#[derive(Debug)]
pub struct Rehearsal {
    arch: &'static str,
    next: AtomicU64,
    recorded: Mutex<Recorded>,
}

/// What a recording would hold, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noted {
    /// A kernel, which waits for the one before it.
    Launch(&'static str),
    /// A branch begins.
    Fork,
    /// What runs beside the branch begins.
    Back,
    /// Both are waited for.
    Join,
}

impl Noted {
    /// Launches of which each waits for another: of a branch and what runs beside it, the longer
    /// counts.
    #[must_use]
    pub fn n_dependent(noted: &[Self]) -> usize {
        let (mut n, mut branch, mut beside) = (0, 0, 0);
        let mut current = &mut n;
        for one in noted {
            match one {
                Self::Launch(_) => *current += 1,
                Self::Fork => current = &mut branch,
                Self::Back => current = &mut beside,
                Self::Join => {
                    n += branch.max(beside);
                    (branch, beside) = (0, 0);
                    current = &mut n;
                }
            }
        }
        n
    }

    /// Launches of a recording that may begin before the one before them has ended, at `level`.
    #[must_use]
    pub fn n_overlapping(noted: &[Self], level: Level) -> usize {
        let order = Overlap::new(level);
        let (mut n, mut on_branch) = (0, false);
        for one in noted {
            match one {
                Self::Launch(kernel) => {
                    order.note(on_branch, source::is_dependent(kernel), &mut n);
                }
                Self::Fork => {
                    order.fork(true);
                    on_branch = true;
                }
                Self::Back => on_branch = false,
                Self::Join => order.interrupt(),
            }
        }
        n
    }
}

#[derive(Debug, Default)]
struct Recorded {
    is_on: bool,
    noted: Vec<Noted>,
}

impl Rehearsal {
    /// Memory whose arenas note how far they are used by what a device of `arch` runs, which decides
    /// how weights lie and which buffers a step needs.
    #[must_use]
    pub fn memory(arch: &'static str) -> Memory {
        Self::arenas(&Self::recording(arch))
    }

    /// A rehearsal to be asked what it [`recorded`](Self::recorded).
    #[must_use]
    pub fn recording(arch: &'static str) -> Arc<Self> {
        Arc::new(Self { arch, next: AtomicU64::new(0), recorded: Mutex::default() })
    }

    /// Memory without end on `rehearsal`.
    #[must_use]
    pub fn arenas(rehearsal: &Arc<Self>) -> Memory {
        let sizes = ArenaSizes { weights: ARENA_BYTES, cache: ARENA_BYTES, workspace: ARENA_BYTES };
        let device: Arc<dyn Device> = Arc::<Self>::clone(rehearsal);
        Memory::planned(device, sizes).expect("a rehearsal has addresses without end")
    }

    /// What was launched from the last recording's beginning to its end.
    #[must_use]
    pub fn recorded(&self) -> Vec<Noted> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).noted.clone()
    }

    fn note(&self, one: Noted) {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        if recorded.is_on {
            recorded.noted.push(one);
        }
    }
}

impl Device for Rehearsal {
    fn name(&self) -> String {
        "rehearsal".to_owned()
    }

    fn arch(&self) -> &'static str {
        self.arch
    }

    fn keeps_contents(&self) -> bool {
        false
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        let bytes = (bytes as u64).next_multiple_of(256);
        Ok(256 + self.next.fetch_add(bytes, Ordering::Relaxed))
    }

    fn free(&self, _address: u64, _bytes: usize) {}

    fn fill(&self, _address: u64, _bytes: usize, _value: u8) -> Result<(), DeviceError> {
        Ok(())
    }

    fn write(&self, _address: u64, _bytes: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn read(&self, _address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        out.fill(0);
        Ok(())
    }

    fn encode(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, DeviceError> {
        spec.check().map(|()| TensorMap::NONE)
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        self.note(Noted::Launch(launch.kernel));
        Ok(())
    }

    fn fork(&self) -> Result<(), DeviceError> {
        self.note(Noted::Fork);
        Ok(())
    }

    fn back(&self) -> Result<(), DeviceError> {
        self.note(Noted::Back);
        Ok(())
    }

    fn join(&self) -> Result<(), DeviceError> {
        self.note(Noted::Join);
        Ok(())
    }

    fn begin_record(&self) -> Result<(), DeviceError> {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        *recorded = Recorded { is_on: true, noted: Vec::new() };
        Ok(())
    }

    fn end_record(&self) -> Result<u64, DeviceError> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).is_on = false;
        Ok(0)
    }

    unsafe fn replay(&self, _record: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn forget(&self, _record: u64) {}

    fn copy(&self, _from: u64, _to: u64, _bytes: usize) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_branch_and_what_runs_beside_it_the_longer_counts() {
        use Noted::{Back, Fork, Join, Launch};
        let one = Launch("kernel");
        assert_eq!(Noted::n_dependent(&[one, one]), 2);
        assert_eq!(Noted::n_dependent(&[one, Fork, one, one, Back, one, Join, one]), 4);
        assert_eq!(Noted::n_dependent(&[Fork, one, Back, one, one, one, Join]), 3);
    }

    #[test]
    fn what_follows_a_fork_or_a_join_or_another_kind_of_kernel_does_not_overlap() {
        use Noted::{Back, Fork, Join, Launch};
        let (one, other) = (Launch("embed"), Launch("moe_pack_fp4"));
        let n = |noted: &[Noted], level| Noted::n_overlapping(noted, level);
        assert_eq!(n(&[one, one, one], Level::Runs), 2);
        assert_eq!(n(&[other, one, one, other, other, one], Level::Runs), 1);
        let forked = [one, Fork, one, one, Back, one, one, Join, one];
        assert_eq!((n(&forked, Level::Runs), n(&forked, Level::Forks)), (2, 3));
    }
}
