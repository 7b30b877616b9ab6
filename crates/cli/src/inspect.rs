//! `fathom inspect DIR`: what a checkpoint is, how big its parts are, whether it would load.
//!
//! Works from `config.json` alone. Not here: what is told (`weights::report`).

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use fathom_weights::report::{InspectReport, tensor_list};
use fathom_weights::{Variant, parse_config};

/// Arguments of `fathom inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// Directory of the checkpoint; config.json alone is enough
    pub(crate) dir: PathBuf,
    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Read every tensor and check its values (scales, expert ids, NaN)
    #[arg(long)]
    pub(crate) verify: bool,
    /// List all tensors that config.json implies, layers with equal ones on one line
    #[arg(long, conflicts_with_all = ["json", "verify"])]
    pub(crate) tensors: bool,
}

/// Prints the report.
///
/// # Errors
/// Where there is nothing to report on, and, after the report, where the checkpoint would be
/// refused, so that scripts can tell by the exit status.
pub(crate) fn run(args: InspectArgs) -> anyhow::Result<()> {
    if args.tensors {
        let path = args.dir.join("config.json");
        let json = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let config = parse_config(&json).with_context(|| path.display().to_string())?.config;
        return print(&tensor_list(&config, Variant::of(&config)));
    }
    let report = InspectReport::of_dir(&args.dir, args.verify)
        .with_context(|| format!("inspecting {}", args.dir.display()))?;
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        print(&report.to_string())?;
    }
    anyhow::ensure!(report.accepted, "{} would be refused", args.dir.display());
    Ok(())
}

/// Writes to stdout; a reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("writing to stdout"),
    }
}
