//! What the CUDA backend asks of a device: memory by address, and launches by kernel name.
//!
//! Three implementations exist: the driver's ([`driver`](super::driver)), the block emulator, a
//! process that runs the same kernel sources on the CPU ([`emulator`](super::emulator)), and one that
//! only counts ([`rehearsal`](super::rehearsal)). Launchers see only this trait, so their checks and
//! their grid arithmetic are tested without a GPU.
//!
//! Not here: who owns which part of the memory ([`memory`](super::memory)), what is in it (the
//! launchers), how kernels are compiled.

use std::fmt::Debug;
use std::time::Instant;

use super::memory::Buffer;
use super::overlap::Level;
use super::tensor_map::{TensorMap, TensorMapSpec};

/// A device failed, or cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum DeviceError {
    #[error("there is no CUDA driver (libcuda); install one, or use the CPU")]
    NoDriver,
    #[error("GPU {ordinal} cannot be opened: {reason}")]
    NoGpu { ordinal: usize, reason: String },
    #[error(
        "no kernels are made for compute capability {major}.{minor}; 8.x, 9.0, 10.x and 12.x are supported"
    )]
    UnknownArch { major: i32, minor: i32 },
    #[error(
        "the CUDA driver is too old: it knows CUDA {}.{}, the kernels need {}.{} (driver 580 or later)",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    DriverTooOld { found: i32, needed: i32 },
    #[error("the device cannot allocate {bytes} bytes; {free} bytes are free")]
    OutOfMemory { bytes: usize, free: usize },
    #[error(
        "the {place} arena has no room for {bytes} bytes: {used} of its {capacity} bytes are used; \
         steps are larger than planned"
    )]
    ArenaFull { place: &'static str, bytes: usize, used: usize, capacity: usize },
    #[error("a tensor map is not possible: {reason}")]
    TensorMap { reason: String },
    #[error("{call} is not possible while launches are recorded")]
    Recording { call: &'static str },
    #[error("kernel `{kernel}` is not available for {arch}: {reason}")]
    NoKernel { kernel: String, arch: String, reason: String },
    #[error("{call} failed: {reason}")]
    Failed { call: &'static str, reason: String },
}

/// An argument of a kernel, by value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// A device address.
    Address(u64),
    /// An unsigned 32-bit value.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
    /// A tensor map of this device.
    Map(TensorMap),
}

/// An argument's bytes, aligned as a kernel's parameters are.
#[derive(Debug, Clone, Copy)]
#[repr(align(128))]
pub struct ArgBytes(pub [u8; 128]);

impl Arg {
    /// Bytes as the kernel reads them.
    #[must_use]
    pub fn bytes(&self) -> (ArgBytes, usize) {
        let mut out = ArgBytes([0; 128]);
        let mut put = |bytes: &[u8]| {
            out.0[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        };
        let len = match self {
            Self::Address(address) => put(&address.to_le_bytes()),
            Self::U32(value) => put(&value.to_le_bytes()),
            Self::F32(value) => put(&value.to_le_bytes()),
            Self::Map(map) => put(&map.0),
        };
        (out, len)
    }
}

impl Arg {
    /// No buffer, where a kernel takes one only sometimes.
    pub const NULL: Self = Self::Address(0);
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        Self::Address(buffer.address())
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Entry point, as in `kernels/MANIFEST.toml`.
    pub kernel: &'static str,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads per block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Arguments in the kernel's order.
    pub args: &'a [Arg],
}

/// Bytes of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not allocated by anybody.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// A device with its own memory. Calls take effect in order, as on one stream, except for a *branch*:
/// what is launched from [`fork`](Self::fork) to [`back`](Self::back) and from there to
/// [`join`](Self::join) comes after everything before and before everything after, but may run at
/// the same time.
///
/// Launches can be *recorded*: from [`begin_record`](Self::begin_record) to
/// [`end_record`](Self::end_record) they are noted instead of run, and [`replay`](Self::replay) runs
/// all of them at the cost of one (a CUDA graph). The arguments are those of the recording; what
/// changes from replay to replay is in the memory they point to.
///
/// In order means that a launch finds what those before it wrote, not that they have ended when it
/// begins: between a kernel that is `dependent` in the manifest and another right behind it a device
/// may let the second read weights ([`hold_weights`](Self::hold_weights)) ahead of everything that the
/// first ones do ([`overlap`](super::overlap) says when).
pub trait Device: Debug + Send + Sync + 'static {
    /// Name, for messages.
    fn name(&self) -> String;

    /// The architecture whose variants of kernels run here, as in `kernels/MANIFEST.toml`.
    fn arch(&self) -> &'static str {
        "sm_80"
    }

    /// How much memory there is; `None` where that means nothing.
    fn memory(&self) -> Option<MemoryInfo> {
        None
    }

    /// Whether what is written can be read back. Only a rehearsal says no: then nobody need read
    /// a checkpoint to write it.
    fn keeps_contents(&self) -> bool {
        true
    }

    /// Address of `bytes` new bytes, aligned to 256; their values are undefined.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the numbers.
    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// What is allocated at `address` changes only while a model is loaded, by copies and by kernels that
    /// are not `dependent`: launches of dependent ones may read it ahead of those before them.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn hold_weights(&self, _address: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Gives memory back; launches that still use it are not disturbed.
    fn free(&self, address: u64, bytes: usize);

    /// Sets bytes to `value`. `address` as for [`write`](Self::write).
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<(), DeviceError>;

    /// Copies to the device. `address` must lie in an allocation of this device, with room.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Copies from the device, after everything launched so far.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]; also for errors of earlier launches.
    fn read(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError>;

    /// Bytes per second at which the device takes large copies from pinned host memory; `None` where
    /// that means nothing.
    ///
    /// # Errors
    /// [`DeviceError`] if it has no room, or a copy fails.
    fn host_rate(&self) -> Result<Option<f64>, DeviceError> {
        Ok(None)
    }

    /// The tensor map that kernels of this device copy through. It stays true as long as the memory
    /// it is of.
    ///
    /// # Errors
    /// [`DeviceError::TensorMap`] if there can be no such map.
    fn encode(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, DeviceError>;

    /// Whether a cluster of blocks of this launch can run at all; its arguments do not matter. Every
    /// device with clusters runs eight blocks; more need a part of the GPU that has as many.
    ///
    /// # Errors
    /// [`DeviceError`] if the kernel is unknown or the device does not say.
    fn has_room_for(&self, _launch: &Launch<'_>) -> Result<bool, DeviceError> {
        Ok(matches!(self.arch(), "sm_90a" | "sm_100f"))
    }

    /// Starts a kernel; does not wait for it.
    ///
    /// # Safety
    /// `launch.args` have the count, order and types of the kernel's signature, and for these
    /// arguments the kernel stays inside of live allocations of this device.
    ///
    /// # Errors
    /// [`DeviceError`] if the kernel is unknown or the launch is refused.
    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError>;

    /// Lets launches overlap from here on as `level` says, where the device can ([`overlap`](super::overlap));
    /// the level before. Recordings stay as they were made.
    fn set_overlap(&self, _level: Level) -> Level {
        Level::Off
    }

    /// Begins a branch. Branches do not nest, and memory is neither allocated nor copied while one is
    /// open. A device may as well run everything in order, as this one does.
    ///
    /// # Errors
    /// [`DeviceError`] if the device cannot, or a branch is open.
    fn fork(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What is launched from here on runs beside the branch.
    ///
    /// # Errors
    /// [`DeviceError`] if no branch is open.
    fn back(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What is launched from here on comes after the branch too.
    ///
    /// # Errors
    /// [`DeviceError`] if no branch is open.
    fn join(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Begins to note launches instead of running them. Until the end nothing else is possible:
    /// [`DeviceError::Recording`]. Kernels must have run before, so that their code is there.
    ///
    /// # Errors
    /// [`DeviceError`] if the device cannot.
    fn begin_record(&self) -> Result<(), DeviceError>;

    /// Ends a recording; its number.
    ///
    /// # Errors
    /// [`DeviceError`] if a launch could not be recorded; the recording is gone then.
    fn end_record(&self) -> Result<u64, DeviceError>;

    /// Runs the launches of a recording.
    ///
    /// # Safety
    /// The promise of every recorded launch holds now.
    ///
    /// # Errors
    /// [`DeviceError`] if there is no such recording or the device refuses.
    unsafe fn replay(&self, record: u64) -> Result<(), DeviceError>;

    /// Gives a recording back.
    fn forget(&self, record: u64);

    /// Copies `bytes` bytes on the device; the ranges do not overlap.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError> {
        // Devices with memory worth the name copy by themselves.
        let mut through_host = vec![0; bytes];
        self.read(from, &mut through_host)?;
        self.write(to, &through_host)
    }

    /// Notes the time at which everything launched so far is done, without waiting for it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn stamp(&self) -> Result<Stamp, DeviceError> {
        Ok(Stamp::Host(Instant::now()))
    }

    /// Seconds from one stamp to a later one, which is waited for.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]; also for errors of launches between them.
    fn seconds_between(&self, first: &Stamp, second: &Stamp) -> Result<f64, DeviceError> {
        match (first, second) {
            (Stamp::Host(first), Stamp::Host(second)) => {
                Ok(second.duration_since(*first).as_secs_f64())
            }
            _ => Err(DeviceError::Failed {
                call: "seconds_between",
                reason: "the stamps are another device's".to_owned(),
            }),
        }
    }
}

/// A time on a device's clock.
#[derive(Debug)]
pub enum Stamp {
    /// For devices that run each launch when it is made.
    Host(Instant),
    /// An event of the driver.
    Event(super::event::Event),
}
