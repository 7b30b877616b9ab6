//! Clusters of more than eight blocks: whether a GPU has room for one.
//!
//! Sixteen blocks need a group of multiprocessors that has as many left; the driver knows, for a kernel's
//! registers and shared memory, and must be told that a kernel may have them.
//!
//! Not yet run on a GPU.

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaFunction, CudaStream, LaunchConfig};

use super::device::Launch;

/// Whether one cluster of this launch of `function` can run, which is allowed from here on. A driver that
/// refuses says no.
pub(super) fn has_room(function: &CudaFunction, launch: &Launch<'_>, stream: &CudaStream) -> bool {
    let name = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
    let config = LaunchConfig {
        grid_dim: launch.grid.into(),
        block_dim: launch.block.into(),
        shared_mem_bytes: launch.shared_bytes,
    };
    let n_at_once = function
        .set_attribute(name, 1)
        .and_then(|()| function.occupancy_max_active_clusters(config, stream));
    let has_room = matches!(n_at_once, Ok(1..));
    if !has_room {
        tracing::info!(
            kernel = launch.kernel,
            ?n_at_once,
            "no room for a cluster; others do its work"
        );
    }
    has_room
}
