//! `cargo xtask bench NAME`: one benchmark, built for release.
//!
//! Most are targets of the `benches` member and report a rate. `cpu` is a comparison of whole
//! programs ([`cpu`]); `drafts` is `fathom bench drafts`, speculative decoding on and off; `text` puts
//! several benchmarks of the text path together ([`mod@text`]).

mod cpu;
mod text;

use std::fs;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::workspace::{Workspace, succeeds};

/// Runs the benchmark `args[0]`, passing the other arguments on; lists them without a name.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let targets = targets(workspace)?;
    match args.split_first() {
        Some((name, rest)) if name == "cpu" => cpu::run(workspace, rest),
        Some((name, rest)) if name == "drafts" => {
            let mut fathom = workspace.command(workspace.release_fathom()?);
            succeeds(fathom.args(["bench", "drafts"]).args(rest))
        }
        Some((name, rest)) if name == "text" => text::run(workspace, rest),
        Some((name, rest)) if targets.contains(name) => {
            succeeds(target(workspace, name).arg("--").args(rest))
        }
        unknown => {
            println!("benchmarks: cpu drafts {}", targets.join(" "));
            Ok(unknown.is_none())
        }
    }
}

/// The command that builds and runs one target.
fn target(workspace: &Workspace, name: &str) -> Command {
    let mut command = workspace.cargo();
    command.args(["bench", "--locked", "--package", "fathom-benches", "--bench", name]);
    if name == "gemm" {
        command.args(["--features", "gemm"]);
    }
    command
}

/// Names of the `[[bench]]` targets.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let path = workspace.root.join("benches").join("Cargo.toml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let manifest: toml::Table = toml::from_str(&text).context("parsing benches/Cargo.toml")?;
    let benches = manifest.get("bench").and_then(toml::Value::as_array);
    let names = benches.into_iter().flatten().filter_map(|bench| bench.get("name")?.as_str());
    Ok(names.map(str::to_owned).collect())
}

fn unix_time_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The commit, with `+` if the working tree differs from it.
pub(crate) fn commit(workspace: &Workspace) -> Result<String> {
    let output = workspace
        .command("git")
        .args(["describe", "--always", "--abbrev=12", "--dirty=+"])
        .output()
        .context("cannot run git")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The processor's name and the number of threads this process may use.
fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, name)| name);
    let threads = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!("{model}, {threads} threads")
}
