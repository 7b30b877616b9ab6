//! Python programs in environments of their own, under the target directory.
//!
//! An environment is built from a requirements file in the tree with exact versions, and rebuilt
//! when that file changes. Nothing is installed anywhere else.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, succeeds};

/// The interpreter of the environment `name`, with everything in `requirements` installed.
pub(crate) fn environment(
    workspace: &Workspace,
    name: &str,
    requirements: &str,
) -> Result<PathBuf> {
    let wanted = fs::read_to_string(workspace.root.join(requirements))
        .with_context(|| format!("reading {requirements}"))?;
    let directory = workspace.target.join("venv").join(name);
    let stamp = directory.join("installed.txt");
    let python = directory.join("bin").join("python");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) && runs(&python) {
        return Ok(python);
    }
    println!("building the Python environment `{name}` from {requirements}");
    let mut create = workspace.command("python3");
    create.args(["-m", "venv", "--clear"]).arg(&directory);
    ensure!(succeeds(&mut create)?, "python3 cannot make a virtual environment");
    let mut install = workspace.command(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    install.args(["--requirement", requirements]);
    ensure!(succeeds(&mut install)?, "pip cannot install {requirements}");
    fs::write(&stamp, wanted).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(python)
}

/// Whether an interpreter is there and starts: its system Python may have gone meanwhile.
fn runs(python: &Path) -> bool {
    std::process::Command::new(python)
        .args(["-c", ""])
        .status()
        .is_ok_and(|status| status.success())
}
