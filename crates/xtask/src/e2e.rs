//! `cargo xtask e2e`: the real openai SDK against a freshly started server.

use std::path::Path;

use anyhow::Result;

use crate::check::TestCounts;
use crate::python;
use crate::workspace::{Workspace, watched};

/// Runs the script against the server `fathom` and counts its checks.
pub(crate) fn run(workspace: &Workspace, fathom: &Path) -> Result<TestCounts> {
    let python = python::environment(workspace, "e2e", "scripts/e2e/requirements.txt")?;
    let mut counts = TestCounts::default();
    let mut script = workspace.command(python);
    script.args(["-u", "scripts/e2e/openai_sdk.py", "--fathom"]).arg(fathom);
    let success = watched(&mut script, |line| counts.note(line))?;
    Ok(counts.or_failed(success))
}
