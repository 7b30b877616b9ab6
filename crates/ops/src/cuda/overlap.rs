//! Launches that begin before the one before them has ended (programmatic dependent launch).
//!
//! Between two launches a GPU drains and fills again. A kernel that is `dependent` in the manifest lets
//! the next launch begin when all its own blocks have begun, fetches weights, and then waits inside for
//! the end of the launch before. The driver allows it by an attribute of the later launch; in a
//! recording that becomes a programmatic edge between two kernels of the graph.
//!
//! The attribute goes to a dependent kernel right behind a dependent kernel on the same stream. Not:
//! - behind a copy, a fill, a replay, or an event (fork and join): a programmatic edge leads from a
//!   kernel to a kernel, and a launch behind a join has two edges;
//! - behind a kernel that is not dependent: it may be one that packs weights.
//!
//! So the first of a run of launches waits as ever, and what comes after the run waits for its last,
//! which has waited for all before.
//!
//! One exception must be asked for by itself: while launches are recorded, the event of a fork is no
//! node of the graph, so the main stream's next kernel still has one edge, from the kernel before the
//! fork. The branch's first kernel, which waits for the event, keeps a full one.
//!
//! Off unless asked for. Not yet run on a GPU. One thread at a time uses a device, as engines do: another
//! thread's copy could come between what is noted here and what the driver is told.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use super::device::Launch;

/// Name of the variable that says which launches overlap: see [`Level`].
pub const PDL: &str = "FATHOM_CUDA_PDL";

/// Whether launches can overlap on `arch`: from compute capability 9.0 on.
#[must_use]
pub fn is_possible(arch: &str) -> bool {
    !matches!(arch, "sm_80" | "sm_89")
}

/// Which launches overlap, where that is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// None.
    Off,
    /// Those with nothing between: 1.
    Runs,
    /// In recordings also the main side of a fork: 2.
    Forks,
}

impl Level {
    /// What [`PDL`] asks for.
    #[must_use]
    pub fn asked_for() -> Self {
        match std::env::var_os(PDL) {
            Some(value) if value == "1" => Self::Runs,
            Some(value) if value == "2" => Self::Forks,
            Some(value) if value != "0" && !value.is_empty() => {
                tracing::warn!("{PDL} is {value:?}, expected 0, 1 or 2; launches do not overlap");
                Self::Off
            }
            _ => Self::Off,
        }
    }

    /// A remark on a device, or nothing.
    #[must_use]
    pub const fn remark(self) -> &'static str {
        match self {
            Self::Off => "",
            Self::Runs => ", launches overlap",
            Self::Forks => ", launches overlap beside forks too",
        }
    }
}

/// Which launches overlap.
#[derive(Debug)]
pub(super) struct Overlap {
    order: Mutex<Order>,
}

/// The level, and what it depends on.
#[derive(Debug)]
struct Order {
    level: Level,
    /// Whether the last thing on the main stream, and on the branch's, is a launch of a dependent kernel.
    is_open: [bool; 2],
}

impl Overlap {
    pub(super) fn new(level: Level) -> Self {
        Self { order: Mutex::new(Order { level, is_open: [false; 2] }) }
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn level(&self) -> Level {
        self.order().level
    }

    /// Another level from the next launch on; the one before.
    pub(super) fn set_level(&self, level: Level) -> Level {
        std::mem::replace(&mut self.order().level, level)
    }

    /// The branch begins with the event that the main stream records.
    pub(super) fn fork(&self, is_recording: bool) {
        let mut order = self.order();
        let stays_open = is_recording && order.level == Level::Forks;
        order.is_open = [order.is_open[0] && stays_open, false];
    }

    /// Something that is no launch goes to one of the streams.
    pub(super) fn interrupt(&self) {
        self.order().is_open = [false; 2];
    }

    /// Adds one to `n` if a launch that cannot fail overlaps.
    pub(super) fn note(&self, on_branch: bool, is_dependent: bool, n: &mut usize) {
        let launched = self.launch(on_branch, is_dependent, |overlaps| {
            *n += usize::from(overlaps);
            Ok::<_, std::convert::Infallible>(())
        });
        let Ok(()) = launched;
    }

    /// Calls `launch` with whether it may overlap with the launch before it on its stream.
    pub(super) fn launch<E>(
        &self,
        on_branch: bool,
        is_dependent: bool,
        launch: impl FnOnce(bool) -> Result<(), E>,
    ) -> Result<(), E> {
        // Held meanwhile: nothing may come between.
        let mut order = self.order();
        let can_overlap = order.level > Level::Off && is_dependent;
        let is_open = &mut order.is_open[usize::from(on_branch)];
        let overlaps = std::mem::take(is_open) && can_overlap;
        launch(overlaps)?;
        *is_open = is_dependent;
        Ok(())
    }
}

/// Puts a launch on `stream`.
///
/// # Safety
/// As for [`Device::launch`](super::Device::launch), with `params` for the arguments; all are of one
/// context, which is bound.
pub(super) unsafe fn launch_kernel(
    function: sys::CUfunction,
    launch: &Launch<'_>,
    stream: sys::CUstream,
    params: &mut [*mut c_void],
    overlaps: bool,
) -> Result<(), DriverError> {
    if !overlaps {
        let (grid, block) = (launch.grid.into(), launch.block.into());
        // SAFETY: the caller's promise is the one asked for.
        return unsafe {
            result::launch_kernel(function, grid, block, launch.shared_bytes, stream, params)
        };
    }
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let config = sys::CUlaunchConfig {
        gridDimX: launch.grid[0],
        gridDimY: launch.grid[1],
        gridDimZ: launch.grid[2],
        blockDimX: launch.block[0],
        blockDimY: launch.block[1],
        blockDimZ: launch.block[2],
        sharedMemBytes: launch.shared_bytes,
        hStream: stream,
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    // SAFETY: as above; the driver copies the attribute and the arguments.
    unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function,
            params.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    }
    .result()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a launch may overlap.
    fn overlaps(order: &Overlap, on_branch: bool, is_dependent: bool) -> bool {
        let mut told = None;
        let launch = |overlaps| {
            told = Some(overlaps);
            Ok::<_, ()>(())
        };
        order.launch(on_branch, is_dependent, launch).unwrap();
        told.unwrap()
    }

    #[test]
    fn only_a_dependent_kernel_right_behind_another_overlaps() {
        let order = Overlap::new(Level::Runs);
        let run = [(true, false), (true, true), (true, true), (false, false), (true, false)];
        for (is_dependent, expected) in run {
            assert_eq!(overlaps(&order, false, is_dependent), expected);
        }
        order.interrupt();
        assert!(!overlaps(&order, false, true) && overlaps(&order, false, true));
        // The other stream has a run of its own.
        assert!(!overlaps(&order, true, true) && overlaps(&order, true, true));
    }

    #[test]
    fn the_main_side_of_a_fork_overlaps_in_a_recording_if_asked_for() {
        for (level, is_recording, expected) in
            [(Level::Runs, true, false), (Level::Forks, false, false), (Level::Forks, true, true)]
        {
            let order = Overlap::new(level);
            assert!(!overlaps(&order, false, true) && !overlaps(&order, true, true));
            order.fork(is_recording);
            assert!(!overlaps(&order, true, true), "the branch");
            assert_eq!(overlaps(&order, false, true), expected, "{level:?}, {is_recording}");
        }
    }

    #[test]
    fn the_level_can_be_another_from_a_launch_on() {
        let order = Overlap::new(Level::Off);
        assert!(!overlaps(&order, false, true) && !overlaps(&order, false, true));
        assert_eq!(order.set_level(Level::Runs), Level::Off);
        assert!(overlaps(&order, false, true));
        assert_eq!(order.set_level(Level::Off), Level::Runs);
        assert!(!overlaps(&order, false, true) && order.level() == Level::Off);
    }

    #[test]
    fn nothing_overlaps_with_a_launch_that_failed_or_where_it_is_off() {
        let order = Overlap::new(Level::Forks);
        assert!(!overlaps(&order, false, true));
        assert!(order.launch(false, true, |_| Err("refused")).is_err());
        assert!(!overlaps(&order, false, true));
        let off = Overlap::new(Level::Off);
        assert!(!overlaps(&off, false, true) && !overlaps(&off, false, true));
    }
}
