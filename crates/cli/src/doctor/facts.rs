//! What there is on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use fathom_ops::cuda::{GpuFacts, KernelSources, compile, gpu};
use fathom_weights::Checkpoint;

/// Everything the findings depend on.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// CUDA version of the driver, or why there is none.
    pub(super) driver: Option<i32>,
    /// Its release.
    pub(super) release: Option<String>,
    /// The GPUs, or why none can be used.
    pub(super) gpus: Result<Vec<GpuFacts>, String>,
    /// Whether the binary carries kernels for the first GPU.
    pub(super) has_pack: bool,
    /// Version of the kernel compiler.
    pub(super) nvrtc: Option<(i32, i32)>,
    /// Where compiled kernels are kept, and whether that can be written.
    pub(super) kernel_cache: Option<(PathBuf, bool)>,
    /// File names of NCCL on the library path.
    pub(super) nccl: Vec<String>,
    /// Bytes of memory: available, all.
    pub(super) memory: Option<(u64, u64)>,
    /// Open files allowed, and bytes of memory that may be locked; `None` for no limit.
    pub(super) open_files: Option<u64>,
    pub(super) locked_bytes: Option<u64>,
    /// Bytes of the checkpoint's tensors, or why it cannot be opened.
    pub(super) checkpoint: Option<Result<u64, String>>,
}

impl Facts {
    pub(super) fn of_this_machine(model: Option<&Path>) -> Self {
        let gpus = gpu::gpus().map_err(|error| error.to_string());
        let first = gpus.as_ref().ok().and_then(|gpus| gpus.first());
        let archs = first.map_or(&[][..], |gpu| gpu::archs_for(gpu.capability.0, gpu.capability.1));
        let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            driver: gpu::driver_cuda().ok(),
            release: gpu::driver_release(),
            has_pack: KernelSources::default().has_pack_for(archs),
            gpus,
            nvrtc: compile::nvrtc_version(),
            kernel_cache: crate::gpu::kernel_cache().map(|folder| {
                let writable = is_writable(&folder);
                (folder, writable)
            }),
            nccl: nccl_files(&library_folders()),
            memory: kib(&meminfo, "MemAvailable:").zip(kib(&meminfo, "MemTotal:")),
            open_files: limit(&limits, "Max open files"),
            locked_bytes: limit(&limits, "Max locked memory"),
            checkpoint: model.map(|directory| match Checkpoint::open(directory) {
                Ok(checkpoint) => Ok(checkpoint.n_bytes()),
                Err(error) => Err(error.to_string()),
            }),
        }
    }
}

/// Whether a file can be made in `folder`, or in the first folder above it that exists.
fn is_writable(folder: &Path) -> bool {
    let existing = folder.ancestors().find(|path| path.is_dir());
    existing.is_some_and(|path| {
        let probe = path.join(format!(".fathom-doctor-{}", std::process::id()));
        let written = fs::write(&probe, b"").is_ok();
        let _ = fs::remove_file(&probe);
        written
    })
}

/// Bytes that a line of `/proc/meminfo` tells in KiB.
fn kib(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The soft limit `name` of `/proc/self/limits`; `None` for no limit.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Folders in which the loader looks, roughly.
fn library_folders() -> Vec<PathBuf> {
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
        "/usr/local/cuda/lib64",
        "/usr/local/nvidia/lib64",
    ];
    std::env::split_paths(&path).chain(usual.into_iter().map(PathBuf::from)).collect()
}

fn nccl_files(folders: &[PathBuf]) -> Vec<String> {
    let mut files: Vec<String> = folders
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.starts_with("libnccl.so"))
        .collect();
    files.sort();
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_memory_are_read_from_the_kernels_tables() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 1048576              files     \n\
                      Max locked memory         unlimited            unlimited            bytes     \n";
        assert_eq!(limit(limits, "Max open files"), Some(1024));
        assert_eq!(limit(limits, "Max locked memory"), None);
        assert_eq!(kib("MemTotal:  8 kB\nMemAvailable:  4 kB\n", "MemAvailable:"), Some(4096));
    }

    #[test]
    fn nccl_is_found_under_the_names_it_is_installed_as() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["libnccl.so.2", "libnccl.so.2.28.9", "libother.so"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        let found = nccl_files(&[folder.path().to_owned(), folder.path().to_owned()]);
        assert_eq!(found, ["libnccl.so.2", "libnccl.so.2.28.9"]);
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let facts = Facts::of_this_machine(None);
        assert_eq!(facts.driver.is_some(), gpu::has_driver());
        assert!(facts.checkpoint.is_none());
    }
}
