//! `cargo xtask bench cpu`: this program against Hugging Face transformers, and against memory.
//!
//! `scripts/bench/hf_cpu.py` holds both sides of the first comparison in one run and alternates
//! between them, so that a busy machine slows both. The second comparison is `fathom bench memory`:
//! decoding a synthetic checkpoint against reading memory.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::{commit, machine, unix_time_s};
use crate::python;
use crate::workspace::{Workspace, succeeds};

/// Runs both comparisons and writes `benches/results/cpu.json`; `args` go to the script.
pub(super) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let python = python::environment(workspace, "hf", "scripts/bench/requirements.txt")?;
    let fathom = workspace.release_fathom()?;
    let scratch = workspace.target.join("bench-cpu");
    fs::create_dir_all(&scratch).context("making the scratch folder")?;

    let against_transformers = scratch.join("transformers.json");
    let mut script = workspace.command(python);
    script.args(["-u", "scripts/bench/hf_cpu.py", "--model", "models/nano", "--fathom"]);
    script.arg(&fathom).arg("--out").arg(&against_transformers).args(args);
    ensure!(succeeds(&mut script)?, "the comparison with transformers failed");

    let against_memory = scratch.join("memory.json");
    let mut memory = workspace.command(&fathom);
    memory.args(["bench", "memory", "--scratch"]).arg(scratch.join("synthetic"));
    ensure!(succeeds(memory.arg("--out").arg(&against_memory))?, "`fathom bench memory` failed");

    let mut report = Map::new();
    report.insert("commit".into(), commit(workspace)?.into());
    report.insert("command".into(), "cargo xtask bench cpu".into());
    report.insert("unix_time_s".into(), json!(unix_time_s()));
    report.insert("machine".into(), machine().into());
    for (name, path) in [("transformers", against_transformers), ("memory", against_memory)] {
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        report.insert(name.into(), serde_json::from_slice(&text).context(name)?);
    }
    let path = workspace.root.join("benches/results/cpu.json");
    fs::write(&path, serde_json::to_string_pretty(&Value::Object(report))? + "\n")
        .with_context(|| format!("writing {}", path.display()))?;
    println!("written to benches/results/cpu.json");
    Ok(true)
}
