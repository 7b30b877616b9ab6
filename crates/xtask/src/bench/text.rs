//! `cargo xtask bench text`: the text path, with a vocabulary of V4's size.
//!
//! Makes the vocabulary (`scripts/bench/make_tokenizer.py`), runs the benchmarks `text` and `sse`,
//! and compares rendering and tokenising over HTTP with vLLM's Rust front end if that is there.
//! `--with-vllm` installs it first, under the target directory: the wheel has 320 MB.
//!
//! Not here: what is measured (`benches`, `scripts/bench/render_http.py`).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::{commit, machine, target, unix_time_s};
use crate::python;
use crate::workspace::{Workspace, succeeds};

/// The wheel with the program that we are compared with.
const VLLM: &str = "vllm==0.33.0";

/// Runs all of it and writes `benches/results/text.json`.
pub(super) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let scratch = workspace.target.join("bench-text");
    fs::create_dir_all(&scratch).context("making the scratch folder")?;
    let tokenizer = scratch.join("tokenizer.json");
    let python = python::environment(workspace, "text", "scripts/bench/text-requirements.txt")?;
    if !tokenizer.exists() {
        println!("making a tokenizer of V4's size, which takes some minutes");
        let mut script = workspace.command(&python);
        script.args(["scripts/bench/make_tokenizer.py", "--out"]).arg(&tokenizer);
        ensure!(succeeds(&mut script)?, "make_tokenizer.py failed");
    }

    let mut report = Map::new();
    report.insert("commit".into(), commit(workspace)?.into());
    report.insert("command".into(), "cargo xtask bench text".into());
    report.insert("unix_time_s".into(), json!(unix_time_s()));
    report.insert("machine".into(), machine().into());
    let mut reached = true;
    for name in ["text", "sse"] {
        let out = scratch.join(name).with_extension("json");
        let mut bench = target(workspace, name);
        bench.arg("--").arg("--tokenizer").arg(&tokenizer).arg("--out").arg(&out);
        reached &= succeeds(&mut bench)?;
        report.insert(name.into(), read(&out)?);
    }
    let asked = args.iter().any(|arg| arg == "--with-vllm");
    report.insert("render_over_http".into(), render(workspace, &python, &scratch, asked)?);

    let path = workspace.root.join("benches/results/text.json");
    fs::create_dir_all(workspace.root.join("benches/results")).context("making benches/results")?;
    fs::write(&path, serde_json::to_string_pretty(&Value::Object(report))? + "\n")
        .with_context(|| format!("writing {}", path.display()))?;
    println!("written to benches/results/text.json");
    Ok(reached)
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// Our server and vLLM's on the same chats, in turns; nothing if vLLM's is not there.
fn render(workspace: &Workspace, python: &Path, scratch: &Path, install: bool) -> Result<Value> {
    let wheel = scratch.join("vllm");
    let program = wheel.join("vllm").join("vllm-rs");
    if install && !program.exists() {
        // The program needs nothing of what the wheel depends on.
        let mut pip = workspace.command(python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        pip.arg("--target").arg(&wheel).arg(VLLM);
        ensure!(succeeds(&mut pip)?, "pip cannot install {VLLM}");
    }
    if !program.exists() {
        println!("skipped: no vllm-rs; `cargo xtask bench text --with-vllm` installs {VLLM}");
        return Ok(Value::Null);
    }
    let fathom = workspace.release_fathom()?;
    let out = scratch.join("render.json");
    let mut script = workspace.command(python);
    script.args(["-u", "scripts/bench/render_http.py", "--nano", "models/nano", "--tokenizer"]);
    script.arg(scratch.join("tokenizer.json")).arg("--fathom").arg(fathom);
    script.arg("--vllm").arg(program).arg("--out").arg(&out);
    ensure!(succeeds(&mut script)?, "the comparison with vLLM failed");
    let mut report = read(&out)?;
    report["wheel"] = VLLM.into();
    Ok(report)
}
