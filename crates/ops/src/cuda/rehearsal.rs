//! A device that only counts: what a model, its cache and its steps would take on a real one.
//!
//! Loading a model and running steps over it takes the same allocations in the same order as on a
//! GPU, because it is the same code; nothing is stored, nothing computed. Afterwards
//! [`Memory::reach`] says how large each arena must be.

use std::sync::atomic::{AtomicU64, Ordering};

use super::device::{Device, DeviceError, Launch};
use super::memory::{ArenaSizes, Memory};
use super::tensor_map::{TensorMap, TensorMapSpec};

/// Addresses of one arena: more than any GPU has.
const ARENA_BYTES: usize = 1 << 44;

/// See the module.
#[derive(Debug)]
pub struct Rehearsal {
    arch: &'static str,
    next: AtomicU64,
}

impl Rehearsal {
    /// Memory whose arenas note how far they are used by what a device of `arch` runs, which decides
    /// how weights lie and which buffers a step needs.
    #[must_use]
    pub fn memory(arch: &'static str) -> Memory {
        let sizes = ArenaSizes { weights: ARENA_BYTES, cache: ARENA_BYTES, workspace: ARENA_BYTES };
        Memory::planned(std::sync::Arc::new(Self::new(arch)), sizes)
            .expect("a rehearsal has addresses without end")
    }

    fn new(arch: &'static str) -> Self {
        Self { arch, next: AtomicU64::new(0) }
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

    unsafe fn launch(&self, _launch: Launch<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn begin_record(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn end_record(&self) -> Result<u64, DeviceError> {
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
