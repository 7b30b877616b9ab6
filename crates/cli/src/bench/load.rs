//! `fathom bench load`: how fast a checkpoint gets onto a GPU, beside the rate at which that takes
//! copies from pinned memory: at least 0.9 of it is wanted.
//!
//! Loaded a few times: the first may read from the disk, the others find the files in the page cache.
//!
//! Not yet run on a GPU.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use fathom_core::Rank;
use fathom_model::{LoadOptions, Transformer};
use fathom_ops::cuda::rehearsal::Rehearsal;
use fathom_ops::cuda::{ArenaSizes, CudaOps, Memory, Place};
use fathom_weights::Checkpoint;
use serde_json::{Value, json};

use super::memory;
use crate::gpu::loading::Loading;
use crate::gpu::{self, DeviceChoice};

/// Arguments of `fathom bench load`.
#[derive(Debug, clap::Args)]
pub(super) struct LoadArgs {
    /// Checkpoint directory; without it and `--scratch` the embedded model, too small to say much
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder for a synthetic checkpoint of 2 GB, written if it is not there
    #[arg(long, value_name = "DIR", conflicts_with = "model")]
    scratch: Option<PathBuf>,
    /// How often it is loaded
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Write the result as JSON to this file too
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
}

const OPTIONS: LoadOptions = LoadOptions { mtp: false };

/// Loads the checkpoint onto the GPU and says how fast that was.
///
/// # Errors
/// Where there is no GPU, or the checkpoint does not fit it.
pub(super) fn run(args: &LoadArgs) -> Result<Value> {
    let gpu = gpu::open(DeviceChoice::Cuda)
        .and_then(|gpu| gpu.context("there is no GPU"))
        .context("no GPU, so nothing can be loaded onto one here")?;
    println!("{}", gpu.about);
    let checkpoint = match (&args.model, &args.scratch) {
        (Some(directory), _) => Checkpoint::open(directory)?,
        (None, Some(scratch)) => memory::synthetic(scratch)?,
        (None, None) => crate::open_checkpoint(None)?,
    };
    let host_rate = gpu.device.host_rate().context("copying to the GPU")?;
    let (arch, activations) = gpu.kernels();
    let counted = Rehearsal::memory(arch);
    load(&checkpoint, counted.clone(), activations)?;
    let reach = |place| counted.reach(place);
    let [weights, cache, workspace] = Place::ALL.map(reach);
    let sizes = ArenaSizes { weights, cache, workspace };
    let mut rounds = Vec::new();
    for _ in 0..args.rounds.max(1) {
        let memory = Memory::planned(Arc::clone(&gpu.device), sizes).context("taking memory")?;
        let bytes = weights as u64;
        let (_, loading) =
            Loading::of(&*gpu.device, bytes, host_rate, || load(&checkpoint, memory, activations))?;
        println!("{loading}");
        rounds.push(loading.json());
    }
    if gpu.is_emulator {
        println!("times are those of the block emulator and say nothing about a GPU");
    }
    Ok(json!({ "device": gpu.about, "is_emulator": gpu.is_emulator, "rounds": rounds }))
}

fn load(
    checkpoint: &Checkpoint,
    memory: Memory,
    activations: fathom_ops::Activations,
) -> Result<Transformer<CudaOps>> {
    let ops = CudaOps::over(memory, activations);
    Transformer::load(ops, checkpoint, Rank::solo(), OPTIONS, &mut |_| {}).context("loading")
}
