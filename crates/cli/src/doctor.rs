//! `fathom doctor`: what this machine has for serving, what is missing, and what to do about it.
//!
//! Works with and without a GPU. Exits with 1 if something keeps the server from running as asked.
//!
//! - `facts`: looking; `findings`: judging, without looking.

mod facts;
mod findings;

use std::path::PathBuf;

use anyhow::{Result, ensure};

use facts::Facts;
use findings::{Finding, Level};

use crate::gpu::DeviceChoice;

/// Arguments of `fathom doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Checkpoint that should be served: is there memory for it?
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// What should compute; with `cuda`, a missing GPU is a problem and not just a note
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// Looks, judges, prints.
///
/// # Errors
/// If there are problems, after they were printed.
pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let findings = findings::judge(&Facts::of_this_machine(args.model.as_deref()), args.device);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print!("{}", text(&findings));
    }
    let n = findings.iter().filter(|finding| finding.level == Level::Problem).count();
    ensure!(n == 0, "{n} problem{} found", if n == 1 { "" } else { "s" });
    Ok(())
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let sign = match finding.level {
            Level::Ok => "ok     ",
            Level::Note => "note   ",
            Level::Problem => "PROBLEM",
        };
        text += &format!("{sign}  {:<12} {}\n", finding.about, finding.text);
        if let Some(advice) = &finding.advice {
            text += &format!("{:9}{:<12} -> {advice}\n", "", "");
        }
    }
    text
}
