//! What the CUDA backend asks of a device: memory by address, and launches by kernel name.
//!
//! Two implementations exist: the driver's ([`driver`](super::driver)) and, in the tests, the block
//! emulator, a process that runs the same kernel sources on the CPU. Launchers see only this trait,
//! so their checks and their grid arithmetic are tested without a GPU.
//!
//! Not here: what is in the memory (the launchers), how kernels are compiled.

use std::fmt::Debug;
use std::sync::Arc;

use crate::OpError;

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
        "no kernels are made for compute capability {major}.{minor}; 8.0 to 12.x are supported"
    )]
    UnknownArch { major: i32, minor: i32 },
    #[error("the device cannot allocate {bytes} bytes; {free} bytes are free")]
    OutOfMemory { bytes: usize, free: usize },
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
}

impl Arg {
    /// Bytes as the kernel reads them.
    #[must_use]
    pub fn bytes(&self) -> ([u8; 8], usize) {
        let mut bytes = [0; 8];
        let len = match self {
            Self::Address(address) => {
                bytes = address.to_le_bytes();
                8
            }
            Self::U32(value) => {
                bytes[..4].copy_from_slice(&value.to_le_bytes());
                4
            }
            Self::F32(value) => {
                bytes[..4].copy_from_slice(&value.to_le_bytes());
                4
            }
        };
        (bytes, len)
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

/// A device with its own memory. Calls take effect in order, as on one stream.
pub trait Device: Debug + Send + Sync + 'static {
    /// Name, for messages.
    fn name(&self) -> String;

    /// The architecture whose variants of kernels run here, as in `kernels/MANIFEST.toml`.
    fn arch(&self) -> &'static str {
        "sm_80"
    }

    /// Address of `bytes` new bytes, aligned to 256; their values are undefined.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the numbers.
    fn alloc(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back; launches that still use it are not disturbed.
    fn free(&self, address: u64, bytes: usize);

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

    /// Starts a kernel; does not wait for it.
    ///
    /// # Safety
    /// `launch.args` have the count, order and types of the kernel's signature, and for these
    /// arguments the kernel stays inside of live allocations of this device.
    ///
    /// # Errors
    /// [`DeviceError`] if the kernel is unknown or the launch is refused.
    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), DeviceError>;
}

/// Device memory, freed when the last holder is gone.
#[derive(Debug, Clone)]
pub struct Buffer {
    memory: Arc<Allocation>,
}

#[derive(Debug)]
struct Allocation {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.device.free(self.address, self.bytes);
    }
}

impl Buffer {
    /// `bytes` bytes with undefined values.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device has no room.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, OpError> {
        // An empty tensor still needs an address of its own.
        let bytes = bytes.max(1);
        let address = device.alloc(bytes).map_err(OpError::device)?;
        Ok(Self { memory: Arc::new(Allocation { device: Arc::clone(device), address, bytes }) })
    }

    /// A copy of `bytes`.
    ///
    /// # Errors
    /// [`OpError::Device`] if the device has no room or the copy fails.
    pub fn from_bytes(device: &Arc<dyn Device>, bytes: &[u8]) -> Result<Self, OpError> {
        let buffer = Self::new(device, bytes.len())?;
        device.write(buffer.address(), bytes).map_err(OpError::device)?;
        Ok(buffer)
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.memory.address
    }

    /// Length in bytes, at least 1.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.bytes
    }

    /// Never: see [`len`](Self::len).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The bytes from `start` on.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if the buffer ends before; [`OpError::Device`] if the copy fails.
    pub fn read(&self, start: usize, len: usize) -> Result<Vec<u8>, OpError> {
        self.check("read", start, len)?;
        let mut bytes = vec![0; len];
        let address = self.address() + start as u64;
        self.memory.device.read(address, &mut bytes).map_err(OpError::device)?;
        Ok(bytes)
    }

    /// Overwrites the bytes from `start` on.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, start: usize, bytes: &[u8]) -> Result<(), OpError> {
        self.check("write", start, bytes.len())?;
        let address = self.address() + start as u64;
        self.memory.device.write(address, bytes).map_err(OpError::device)
    }

    fn check(&self, op: &'static str, start: usize, len: usize) -> Result<(), OpError> {
        let (got, limit) = (start + len, self.len());
        if got <= limit {
            return Ok(());
        }
        Err(OpError::OutOfRange { op, what: "device byte", got, limit })
    }
}
