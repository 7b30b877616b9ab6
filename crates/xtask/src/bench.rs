//! `cargo xtask bench NAME`: one benchmark, built for release.
//!
//! Most are targets of the `benches` member and report a rate. `cpu` is a comparison of whole
//! programs ([`cpu`]); `drafts` is `fathom bench drafts`, speculative decoding on and off.

mod cpu;

use std::fs;

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
        Some((name, rest)) if targets.contains(name) => {
            let mut command = workspace.cargo();
            command.args(["bench", "--locked", "--package", "fathom-benches", "--bench", name]);
            succeeds(command.arg("--").args(rest))
        }
        unknown => {
            println!("benchmarks: cpu drafts {}", targets.join(" "));
            Ok(unknown.is_none())
        }
    }
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
