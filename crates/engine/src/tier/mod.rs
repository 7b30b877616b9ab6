//! Lower tiers of the prefix cache: host memory and a disk.
//!
//! What becomes reusable is written to the disk, so that it survives a restart; what the device
//! evicts goes to host memory, so that it can come back soon. Both are bounded. Nothing here is
//! needed for a right answer: a tier that is full, slow, damaged or gone only means more to compute.
//!
//! - `tiers`: both together, as the step loop uses them;
//! - `host`; `directory`, `disk`, `record`, `worker`: the two tiers.
//!
//! Not here: which prefixes exist and what is evicted from the device (`scheduler`).

mod directory;
mod disk;
mod host;
mod record;
mod tiers;
mod worker;

use std::path::PathBuf;

pub use directory::DirectoryError;
pub(crate) use tiers::{Arrived, Tiers};

/// Where cached state may go beside the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierConfig {
    /// Bytes of host memory for what the device evicts. Default 0: none.
    pub host_bytes: u64,
    /// Directory of the disk tier. Default: none. Only one process uses a directory at a time;
    /// another one runs without.
    pub directory: Option<PathBuf>,
    /// Bytes that files in the directory may take. Default 32 GiB.
    pub disk_bytes: u64,
}

impl Default for TierConfig {
    fn default() -> Self {
        Self { host_bytes: 0, directory: None, disk_bytes: 32 << 30 }
    }
}
