//! `cargo xtask e2e [NAME]`: real clients against a freshly started server; the soak test; the scripts
//! that time peers; the build steps of the container image (`cargo xtask image`).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::check::TestCounts;
use crate::workspace::{Workspace, succeeds, watched};
use crate::{kernels, node, python};

/// Runs the suites of `scripts/e2e` against the server `fathom` and counts their checks. `only`
/// keeps to the checks whose name contains it.
pub(crate) fn run(workspace: &Workspace, fathom: &Path, only: Option<&str>) -> Result<TestCounts> {
    let python = python::environment(workspace, "e2e", "scripts/e2e/requirements.txt")?;
    let node = node::folder(workspace, "e2e", "scripts/e2e/node/package.json")?;
    let mut counts = TestCounts::default();
    let mut script = workspace.command(python);
    script.args(["-u", "scripts/e2e/run.py", "--fathom"]).arg(fathom);
    if let Some(folder) = node {
        script.arg("--node-folder").arg(folder);
    }
    if let Some(only) = only {
        script.args(["--only", only]);
    }
    let success = watched(&mut script, |line| counts.note(line))?;
    Ok(counts.or_failed(success))
}

/// The short form of the soak test: fewer requests, seconds of random traffic.
const SHORT_SOAK: [&str; 4] = ["--requests", "80", "--seconds", "10"];

/// Runs the soak test in its short form and counts its checks. Its script needs nothing installed.
pub(crate) fn soak(workspace: &Workspace, fathom: &Path) -> Result<TestCounts> {
    let mut counts = TestCounts::default();
    let mut script = workspace.command("python3");
    script.args(["-u", "scripts/soak/soak.py", "--fathom"]).arg(fathom).args(SHORT_SOAK);
    let success = watched(&mut script, |line| counts.note(line))?;
    Ok(counts.or_failed(success))
}

/// Runs the build steps of the container image in a folder of the target directory; `true` if they
/// leave what the image starts.
pub(crate) fn image(workspace: &Workspace) -> Result<bool> {
    let compiler = kernels::compiler(workspace)
        .context("there is no kernel compiler; `scripts/setup-cuda.sh` installs it")?;
    let mut script = workspace.command("python3");
    script.args(["-u", "scripts/e2e/dockerfile.py", "--compiler"]).arg(compiler);
    succeeds(script.arg("--into").arg(workspace.target.join("image")))
}

/// Runs the checks of the scripts that time other implementations on a GPU machine; none is needed.
/// Those of what peers compute need PyTorch, which is too large to install for them: they run where
/// `cargo xtask bench cpu` has brought it.
pub(crate) fn peers(workspace: &Workspace, fathom: &Path) -> Result<TestCounts> {
    let mut counts = TestCounts::default();
    let requirements = "scripts/bench/requirements.txt";
    let wanted = fs::read_to_string(workspace.root.join(requirements))
        .with_context(|| format!("reading {requirements}"))?;
    let python = python::built(workspace, "hf", &wanted).unwrap_or_else(|| "python3".into());
    let mut script = workspace.command(python);
    script.args(["-u", "scripts/peers/check.py", "--fathom"]).arg(fathom);
    let success = watched(&mut script, |line| counts.note(line))?;
    Ok(counts.or_failed(success))
}
