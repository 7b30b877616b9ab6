//! `fathom bench`: how fast this machine computes, measured in this process. For `cargo xtask bench`.
//!
//! - `cpu`: prefill and decode of one sequence;
//! - `drafts`: tokens per second with and without speculation, and how many guesses are accepted;
//! - `memory`: decode of a synthetic checkpoint of Flash-like proportions against the speed at
//!   which memory can be read ([`memory`]);
//! - `sim`: traffic through the scheduler in virtual time; nothing is computed ([`sim`]);
//! - `kernels`: the operators of a GPU against its limits ([`kernels`]);
//! - `load`: a checkpoint onto a GPU against the rate at which that takes copies ([`load`]);
//! - `slice`: as many layers of a model as fit one GPU, whole steps ([`slice`]); `plot`: as a picture.
//!
//! Not here: a running server's throughput.

mod ceilings;
mod drafts;
mod kernels;
mod load;
mod memory;
mod sim;
mod slice;
mod speed;

use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fathom_core::Numerics;
use serde_json::Value;

/// Arguments of `fathom bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Prefill and decode of one sequence, greedy
    Cpu(CpuArgs),
    /// Speculative decoding against plain decoding, in the same run
    Drafts(DraftsArgs),
    /// Decode of a synthetic 2 GB checkpoint against reading memory
    Memory(MemoryArgs),
    /// Traffic on GPUs, simulated at their roofline with the real scheduler
    Sim(sim::SimArgs),
    /// Every operator on a GPU against what its bytes and operations allow
    Kernels(KernelsArgs),
    /// Bringing a checkpoint onto a GPU, against the rate at which that takes copies
    Load(load::LoadArgs),
    /// Steps of as many layers of a model as fit one GPU, against what they must read and multiply
    Slice(slice::SliceArgs),
    /// The result of `slice` as an SVG picture
    Plot(PlotArgs),
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Threads that compute; all processors by default
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Numeric mode
    #[arg(long, default_value_t = Numerics::default())]
    numerics: Numerics,
    /// Write the result as JSON to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct CpuArgs {
    #[command(flatten)]
    common: Common,
    /// Checkpoint directory; the embedded model by default
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// JSON file with the prompt's token ids
    #[arg(long, value_name = "FILE")]
    prompt: PathBuf,
    /// Prompt tokens before the decode that is measured
    #[arg(long, default_value_t = 128)]
    decode_after: usize,
    /// Tokens to decode
    #[arg(long, default_value_t = 128)]
    decode_tokens: usize,
    /// Rounds after an untimed one; the best counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

#[derive(Debug, clap::Args)]
struct DraftsArgs {
    #[command(flatten)]
    common: Common,
    /// Checkpoint directory; the embedded model by default
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Tokens to generate per sequence
    #[arg(long, default_value_t = 256)]
    tokens: u32,
    /// Sequences at once
    #[arg(long, default_value_t = 1)]
    sequences: u32,
    /// Guesses per step at most
    #[arg(long, default_value_t = 3)]
    num_speculative_tokens: u32,
}

#[derive(Debug, clap::Args)]
struct KernelsArgs {
    /// Print what is timed as JSON, and stop: needs no GPU
    #[arg(long)]
    shapes: bool,
    /// Time only operators whose name contains this; `launch`: launches that do nothing
    #[arg(long, value_name = "NAME", default_value = "")]
    only: String,
    /// Small sizes, each once: to see that everything runs
    #[arg(long)]
    small: bool,
    /// Write the result as JSON to this file too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct PlotArgs {
    /// What `fathom bench slice --out FILE` wrote
    #[arg(value_name = "FILE")]
    result: PathBuf,
    /// Write the picture to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct MemoryArgs {
    #[command(flatten)]
    common: Common,
    /// Folder for the synthetic checkpoint, written if it is not there
    #[arg(long, value_name = "DIR")]
    scratch: PathBuf,
    /// Tokens to decode
    #[arg(long, default_value_t = 32)]
    decode_tokens: usize,
}

/// Measures and writes the result.
pub(crate) fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Cpu(args) => {
            crate::threads::use_for_compute(args.common.threads)?;
            let checkpoint = crate::open_checkpoint(args.model.as_deref())?;
            let ids = read_ids(&args.prompt)?;
            let numerics = args.common.numerics;
            let model = speed::load(&checkpoint, numerics)?;
            let (after, n_decode) = (args.decode_after, args.decode_tokens);
            let result = speed::prefill_and_decode(&model, &ids, after, n_decode, args.rounds)?;
            write(args.common.out.as_deref(), &result)
        }
        What::Drafts(args) => {
            crate::threads::use_for_compute(args.common.threads)?;
            let checkpoint = crate::open_checkpoint(args.model.as_deref())?;
            let load = drafts::Load {
                n_tokens: args.tokens,
                n_sequences: args.sequences,
                max_drafts: args.num_speculative_tokens,
            };
            let result = drafts::run(&checkpoint, args.common.numerics, &load)?;
            write(args.common.out.as_deref(), &result)
        }
        What::Memory(args) => {
            let threads = crate::threads::use_for_compute(args.common.threads)?;
            let numerics = args.common.numerics;
            let result = memory::run(&args.scratch, numerics, threads, args.decode_tokens)?;
            write(args.common.out.as_deref(), &result)
        }
        What::Sim(args) => write_text(args.out.as_deref(), &sim::run(&args)?),
        What::Kernels(args) if args.shapes => write(args.out.as_deref(), &kernels::shapes()),
        What::Kernels(args) => kernels::run(&args.only, args.small, &mut |result| {
            args.out.as_deref().map_or(Ok(()), |file| write(Some(file), result))
        }),
        What::Load(args) => {
            crate::threads::use_for_compute(None)?;
            let result = load::run(&args)?;
            args.out.as_deref().map_or(Ok(()), |file| write(Some(file), &result))
        }
        What::Slice(args) => slice::run(&args, &mut |result| {
            args.out.as_deref().map_or(Ok(()), |file| write(Some(file), result))
        }),
        What::Plot(args) => {
            let name = args.result.display();
            let text = fs::read(&args.result).with_context(|| format!("reading {name}"))?;
            let result =
                serde_json::from_slice(&text).with_context(|| format!("{name}: no JSON"))?;
            write_text(
                args.out.as_deref(),
                &slice::plot::svg(&result).with_context(|| name.to_string())?,
            )
        }
    }
}

fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("no list of ids in {}", path.display()))
}

fn write(path: Option<&Path>, result: &Value) -> Result<()> {
    write_text(path, &(serde_json::to_string_pretty(result)? + "\n"))
}

fn write_text(path: Option<&Path>, text: &str) -> Result<()> {
    match path {
        Some(path) => fs::write(path, text).with_context(|| format!("writing {}", path.display())),
        None => Ok(std::io::stdout().write_all(text.as_bytes())?),
    }
}
