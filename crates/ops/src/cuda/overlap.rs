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
//! which has waited for all before. Off unless asked for. Not yet run on a GPU.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use super::device::Launch;

/// Name of the variable that lets launches overlap if it is 1, from compute capability 9.0 on.
pub const PDL: &str = "FATHOM_CUDA_PDL";

/// Which launches overlap.
#[derive(Debug)]
pub(super) struct Overlap {
    is_on: bool,
    /// Whether the last thing on the main stream, and on the branch's, is a launch of a dependent kernel.
    is_open: Mutex<[bool; 2]>,
}

impl Overlap {
    pub(super) fn new(is_on: bool) -> Self {
        Self { is_on, is_open: Mutex::default() }
    }

    pub(super) const fn is_on(&self) -> bool {
        self.is_on
    }

    /// Whether [`PDL`] asks for it.
    pub(super) fn is_asked_for() -> bool {
        std::env::var_os(PDL).is_some_and(|value| value == "1")
    }

    /// Something that is no launch goes to one of the streams.
    pub(super) fn interrupt(&self) {
        *self.is_open.lock().unwrap_or_else(PoisonError::into_inner) = [false; 2];
    }

    /// Calls `launch` with whether it may overlap with the launch before it on its stream.
    pub(super) fn launch<E>(
        &self,
        on_branch: bool,
        is_dependent: bool,
        launch: impl FnOnce(bool) -> Result<(), E>,
    ) -> Result<(), E> {
        // Held meanwhile: nothing may come between.
        let mut is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = &mut is_open[usize::from(on_branch)];
        let overlaps = std::mem::take(is_open) && self.is_on && is_dependent;
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
        let order = Overlap::new(true);
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
    fn nothing_overlaps_with_a_launch_that_failed_or_where_it_is_off() {
        let order = Overlap::new(true);
        assert!(!overlaps(&order, false, true));
        assert!(order.launch(false, true, |_| Err("refused")).is_err());
        assert!(!overlaps(&order, false, true));
        let off = Overlap::new(false);
        assert!(!overlaps(&off, false, true) && !overlaps(&off, false, true));
    }
}
