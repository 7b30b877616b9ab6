//! `device-check --sanitize`: the same cases under NVIDIA's compute-sanitizer, tool by tool.
//!
//! What the block emulator looks for in CI (accesses out of bounds, races in shared memory, barriers
//! that not all threads reach) is looked for on the device here. A tool makes kernels some ten to a
//! hundred times slower, so the cases run with small sizes.
//!
//! Not yet run on a GPU.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::DeviceCheckArgs;

/// What each tool looks for.
const TOOLS: [(&str, &str); 3] = [
    ("memcheck", "accesses out of bounds or misaligned"),
    ("racecheck", "races in shared memory"),
    ("synccheck", "barriers that not all threads reach"),
];

/// Exit status of a run with findings; that of a failed check is 1.
const FOUND: i32 = 86;

/// Lines of a report that are shown.
const SHOWN: usize = 12;

/// Where the toolkit's installers put it.
const USUAL: &str = "/usr/local/cuda/bin/compute-sanitizer";

/// What a tool said.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Clean,
    Found,
    /// It found nothing, but the check did not pass or did not run.
    Failed,
}

struct Report {
    tool: &'static str,
    verdict: Verdict,
    status: Option<i32>,
    seconds: f64,
    /// The tool's report without its frame.
    text: String,
}

/// Runs every tool over the cases that `args` name.
///
/// # Errors
/// If compute-sanitizer is not there, or a tool found something or could not run.
pub(super) fn run(args: &DeviceCheckArgs) -> Result<()> {
    let sanitizer = find().with_context(|| {
        format!(
            "compute-sanitizer is neither on PATH nor at {USUAL}: it comes with the CUDA toolkit; \
             add its folder to PATH"
        )
    })?;
    let this = std::env::current_exe().context("finding this program")?;
    let logs = tempfile::tempdir().context("making a folder for reports")?;
    let mut reports = Vec::new();
    for (tool, about) in TOOLS {
        println!("{tool}: {about}");
        let report = run_tool(&sanitizer, &this, tool, &logs.path().join(tool), args)?;
        println!("{}", report.line());
        reports.push(report);
    }
    if let Some(file) = &args.out {
        let result = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "tools": reports.iter().map(Report::json).collect::<Vec<_>>(),
        });
        super::write_json(file, &result)?;
    }
    let bad = reports.iter().filter(|report| report.verdict != Verdict::Clean).count();
    ensure!(bad == 0, "{bad} of {} tools are not content", reports.len());
    Ok(())
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("compute-sanitizer"));
    on_path.chain([PathBuf::from(USUAL)]).find(|program| program.is_file())
}

fn run_tool(
    sanitizer: &Path,
    this: &Path,
    tool: &'static str,
    log: &Path,
    args: &DeviceCheckArgs,
) -> Result<Report> {
    let mut command = Command::new(sanitizer);
    command.args(["--tool", tool, "--error-exitcode", &FOUND.to_string(), "--log-file"]);
    command.arg(log).arg(this).args(["device-check", "--small", "--only", &args.only]);
    command.args(["--seed", &args.seed.to_string()]).stdin(Stdio::null());
    // It would run in a GPU's place, and nothing would be looked at.
    command.env_remove("FATHOM_EMULATOR");
    let start = Instant::now();
    let status =
        command.status().with_context(|| format!("starting {}", sanitizer.display()))?.code();
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let text: Vec<&str> = text.lines().map(|line| line.trim_start_matches('=').trim()).collect();
    let verdict = match status {
        // A tool that left no report has not looked.
        Some(0) if !text.is_empty() => Verdict::Clean,
        Some(FOUND) => Verdict::Found,
        _ => Verdict::Failed,
    };
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report { tool, verdict, status, seconds, text: text.join("\n").trim().to_owned() })
}

impl Report {
    fn line(&self) -> String {
        let verdict = if self.verdict == Verdict::Clean { "ok" } else { "FAILED" };
        let mut line = format!("{verdict:<7}{:<44}{:>7.1} s", self.tool, self.seconds);
        if self.verdict == Verdict::Failed {
            let status = self.status.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
            line += &format!("\n       no finding, but it ended with {status}");
            if self.text.is_empty() {
                line += " and left no report";
            }
        }
        if self.verdict != Verdict::Clean {
            for text in self.text.lines().filter(|text| !text.is_empty()).take(SHOWN) {
                line += &format!("\n       {text}");
            }
        }
        line
    }

    fn json(&self) -> Value {
        json!({
            "tool": self.tool,
            "passes": self.verdict == Verdict::Clean,
            "status": self.status,
            "seconds": self.seconds,
            "report": self.text,
        })
    }
}
