//! The driver's pool of memory that allocations come from, one by one, where there is no plan.
//!
//! By default the driver returns what is free to the system whenever somebody waits for the device,
//! and every read waits: tools that allocate tensor by tensor would map memory again and again.
//!
//! Not here: arenas, which are three allocations (`memory`).

use cudarc::driver::{CudaContext, DriverError, sys};

/// The default pool of the context's device.
fn pool_of(context: &CudaContext) -> Result<sys::CUmemoryPool, DriverError> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: the pool's handle is written, and belongs to the device.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) }.result()?;
    Ok(pool)
}

/// Has the pool keep what is given back.
///
/// # Errors
/// What the driver says.
pub(super) fn keep_freed(context: &CudaContext) -> Result<(), DriverError> {
    let pool = pool_of(context)?;
    let mut threshold = u64::MAX;
    let name = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a `cuuint64_t`, which is read.
    unsafe { sys::cuMemPoolSetAttribute(pool, name, (&raw mut threshold).cast()) }.result()
}

/// Gives what the pool has kept back to the device.
///
/// # Errors
/// What the driver says.
pub(super) fn release_freed(context: &CudaContext) -> Result<(), DriverError> {
    let pool = pool_of(context)?;
    // SAFETY: the pool is the device's own; what is in use stays.
    unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result()
}
