//! How many threads compute.

use std::num::NonZeroUsize;

use anyhow::{Context, Result};

/// Gives the compute pool `wanted` threads, all processors by default; returns how many.
///
/// # Errors
/// If the pool was used before.
pub(crate) fn use_for_compute(wanted: Option<NonZeroUsize>) -> Result<usize> {
    let all = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let n = wanted.map_or_else(all, NonZeroUsize::get);
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|index| format!("compute-{index}"))
        .build_global()
        .context("starting the compute threads")?;
    Ok(n)
}
