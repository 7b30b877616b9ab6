//! `cargo xtask e2e`: the real openai SDK against a freshly built and started server.

use anyhow::Result;

use crate::check::TestCounts;
use crate::python;
use crate::workspace::{Workspace, watched};

/// Builds the server, runs the script against it and counts its checks.
pub(crate) fn run(workspace: &Workspace) -> Result<TestCounts> {
    let python = python::environment(workspace, "e2e", "scripts/e2e/requirements.txt")?;
    let fathom = workspace.build_fathom(false)?;
    let mut counts = TestCounts::default();
    let mut script = workspace.command(python);
    script.args(["-u", "scripts/e2e/openai_sdk.py", "--fathom"]).arg(fathom);
    let success = watched(&mut script, |line| counts.note(line))?;
    Ok(counts.or_failed(success))
}
