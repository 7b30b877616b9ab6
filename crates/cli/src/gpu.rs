//! The GPU of a command: which device, where its kernels come from, what is told about it.
//!
//! `auto` asks whether there is a driver before anything else, so the same binary runs everywhere.
//! In place of a GPU the block emulator can be named by an environment variable: that is how the GPU
//! path is tested without one.
//!
//! Not here: how much memory a model takes (`plan`), how fast it is loaded (`loading`), what runs on the device (`fathom-ops`).

pub(crate) mod loading;
pub(crate) mod plan;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use fathom_ops::Activations;
use fathom_ops::cuda::check::Poisoned;
use fathom_ops::cuda::emulator::{Emulator, MODES};
use fathom_ops::cuda::{Device, DriverDevice, KernelSources, Origin, gpu};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Path of a block emulator that stands in for a GPU.
const EMULATOR: &str = "FATHOM_EMULATOR";
/// Folder for kernels that had to be compiled on this machine.
const KERNEL_CACHE: &str = "FATHOM_KERNEL_CACHE";

/// What computes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DeviceChoice {
    /// A GPU if there is a driver, else the CPU
    Auto,
    /// A GPU
    Cuda,
    /// The CPU: what was checked to the end. `auto` becomes the default once the kernels have run on
    /// a card.
    #[default]
    Cpu,
}

/// A device, and what to tell about it.
#[derive(Debug, Clone)]
pub(crate) struct Gpu {
    pub(crate) device: Arc<dyn Device>,
    /// What inputs of FP8 and FP4 layers look like there.
    pub(crate) activations: Activations,
    /// Name, memory, driver, kernels.
    pub(crate) about: String,
    /// Whether a process on the CPU stands in for it.
    pub(crate) is_emulator: bool,
}

impl Gpu {
    /// This GPU as one that runs the kernels of sm_80, with its activations; `None` where those are its own.
    pub(crate) fn as_ampere(&self) -> Option<Self> {
        has_kernels_of_its_own(self.device.arch()).then(|| Self {
            device: Arc::new(Poisoned::new(Arc::clone(&self.device)).with_arch("sm_80")),
            activations: Activations::Bf16,
            ..self.clone()
        })
    }

    /// What decides which kernels run: the architecture and the form of activations.
    pub(crate) fn kernels(&self) -> (&'static str, Activations) {
        (self.device.arch(), self.activations)
    }
}

/// Whether operators on `arch` have forms of their own beside those of sm_80, which run there too.
pub(crate) fn has_kernels_of_its_own(arch: &str) -> bool {
    matches!(arch, "sm_90a" | "sm_100f")
}

/// The GPU that `choice` means; `None` for the CPU.
///
/// # Errors
/// Where a GPU is wanted and cannot be used, saying why: no driver, a driver too old, a GPU that no
/// kernels are made for, kernels that are missing.
pub(crate) fn open(choice: DeviceChoice) -> Result<Option<Gpu>> {
    match choice {
        DeviceChoice::Cpu => Ok(None),
        DeviceChoice::Auto if !gpu::has_driver() => Ok(None),
        DeviceChoice::Auto | DeviceChoice::Cuda => {
            let emulator = (choice == DeviceChoice::Cuda).then(|| path_from(EMULATOR)).flatten();
            match emulator {
                Some(program) => emulated(&program).map(Some),
                None => opened().map(Some),
            }
        }
    }
}

fn emulated(program: &std::path::Path) -> Result<Gpu> {
    let device = Emulator::start(program, MODES[0])?;
    let about = "the block emulator (no GPU): a process on the CPU".to_owned();
    let (device, activations) = (Arc::new(device), Activations::Fp8Grid);
    Ok(Gpu { device, activations, about, is_emulator: true })
}

fn opened() -> Result<Gpu> {
    let sources = KernelSources { pack: None, cache: kernel_cache() };
    let device = DriverDevice::open(0, sources).context("opening the GPU")?;
    let facts = device.facts().clone();
    tracing::info!(gpu = facts.name, "loading kernels");
    device
        .load_all(&mut |done| {
            tracing::debug!("kernels: {} of {} files", done.n_files, done.of);
        })
        .with_context(|| format!("loading kernels onto {}", facts.name))?;
    let about = format!(
        "{} ({}, {} SMs, compute capability {}.{}), driver {}for CUDA {}.{}, kernels {}{}",
        facts.name,
        crate::bytes::readable(facts.total_bytes),
        facts.n_sms,
        facts.capability.0,
        facts.capability.1,
        gpu::driver_release().map(|release| format!("{release} ")).unwrap_or_default(),
        facts.driver_cuda / 1000,
        facts.driver_cuda % 1000 / 10,
        origins(&device.origins()),
        device.overlap().remark(),
    );
    // Without FP8 arithmetic the grid would cost time and precision and save nothing.
    let activations = if facts.has_fp8() { Activations::Fp8Grid } else { Activations::Bf16 };
    Ok(Gpu { device: Arc::new(device), activations, about, is_emulator: false })
}

/// Where kernels came from, in words.
fn origins(origins: &[(&str, Origin)]) -> String {
    let mut parts: Vec<String> = origins
        .iter()
        .map(|(arch, origin)| match origin {
            Origin::Pack => format!("for {arch} from the pack"),
            Origin::Cache => format!("for {arch} compiled earlier"),
            Origin::Compiled => format!("for {arch} compiled just now"),
        })
        .collect();
    parts.sort();
    parts.join(", ")
}

#[expect(clippy::disallowed_methods, reason = "the command line program reads the environment")]
fn path_from(variable: &str) -> Option<PathBuf> {
    std::env::var(variable).ok().filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// `$FATHOM_KERNEL_CACHE`, else a folder of the user's cache.
pub(crate) fn kernel_cache() -> Option<PathBuf> {
    let home = || path_from("HOME").map(|home| home.join(".cache"));
    path_from(KERNEL_CACHE).or_else(|| {
        path_from("XDG_CACHE_HOME").or_else(home).map(|cache| cache.join("fathom/kernels"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_needs_no_driver_and_auto_falls_back_to_it() {
        assert!(open(DeviceChoice::Cpu).unwrap().is_none());
        if !gpu::has_driver() {
            assert!(open(DeviceChoice::Auto).unwrap().is_none());
            let error = format!("{:#}", open(DeviceChoice::Cuda).unwrap_err());
            assert!(error.contains("no CUDA driver"), "{error}");
        }
    }

    #[test]
    fn where_kernels_come_from_is_told_per_architecture() {
        let text = origins(&[("sm_90a", Origin::Compiled), ("sm_80", Origin::Pack)]);
        assert_eq!(text, "for sm_80 from the pack, for sm_90a compiled just now");
    }
}
