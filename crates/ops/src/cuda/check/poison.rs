//! A device whose new memory holds no numbers, so that what is read before it is written shows.

use std::sync::Arc;

use crate::cuda::device::{Device, DeviceError, Launch, MemoryInfo, Stamp};
use crate::cuda::tensor_map::{TensorMap, TensorMapSpec};

/// Fills memory with 0xFF (NaN in every float format) when it is given out.
#[derive(Debug)]
pub struct Poisoned {
    device: Arc<dyn Device>,
    records: bool,
    arch: &'static str,
}

impl Poisoned {
    /// Memory of `device`, poisoned.
    #[must_use]
    pub fn new(device: Arc<dyn Device>) -> Self {
        let arch = device.arch();
        Self { device, records: true, arch }
    }

    /// The same, whose launchers take the kernels of `arch`, which must be compiled for the device too.
    #[must_use]
    pub fn with_arch(self, arch: &'static str) -> Self {
        Self { arch, ..self }
    }

    /// The same, which refuses to record launches.
    #[must_use]
    pub fn without_recordings(self) -> Self {
        Self { records: false, ..self }
    }
}

impl Device for Poisoned {
    fn name(&self) -> String {
        self.device.name()
    }

    fn arch(&self) -> &'static str {
        self.arch
    }

    fn memory(&self) -> Option<MemoryInfo> {
        self.device.memory()
    }

    fn keeps_contents(&self) -> bool {
        self.device.keeps_contents()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError> {
        let address = self.device.alloc(bytes)?;
        self.device.fill(address, bytes, 0xff)?;
        Ok(address)
    }

    fn hold_weights(&self, address: u64) -> Result<(), DeviceError> {
        self.device.hold_weights(address)
    }

    fn free(&self, address: u64, bytes: usize) {
        self.device.free(address, bytes);
    }

    fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<(), DeviceError> {
        self.device.fill(address, bytes, value)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.device.write(address, bytes)
    }

    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.device.read(address, out)
    }

    fn encode(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, DeviceError> {
        self.device.encode(spec)
    }

    fn has_room_for(&self, launch: &Launch<'_>) -> Result<bool, DeviceError> {
        self.device.has_room_for(launch)
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise is the one asked for.
        unsafe { self.device.launch(launch) }
    }

    fn fork(&self) -> Result<(), DeviceError> {
        self.device.fork()
    }

    fn back(&self) -> Result<(), DeviceError> {
        self.device.back()
    }

    fn join(&self) -> Result<(), DeviceError> {
        self.device.join()
    }

    fn begin_record(&self) -> Result<(), DeviceError> {
        if !self.records {
            let reason = "this device records nothing".to_owned();
            return Err(DeviceError::Failed { call: "begin_record", reason });
        }
        self.device.begin_record()
    }

    fn end_record(&self) -> Result<u64, DeviceError> {
        self.device.end_record()
    }

    unsafe fn replay(&self, record: u64) -> Result<(), DeviceError> {
        // SAFETY: as above.
        unsafe { self.device.replay(record) }
    }

    fn forget(&self, record: u64) {
        self.device.forget(record);
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError> {
        self.device.copy(from, to, bytes)
    }

    fn stamp(&self) -> Result<Stamp, DeviceError> {
        self.device.stamp()
    }

    fn seconds_between(&self, first: &Stamp, second: &Stamp) -> Result<f64, DeviceError> {
        self.device.seconds_between(first, second)
    }
}
