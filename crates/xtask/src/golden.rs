//! `cargo xtask golden`: the model against the numbers of the official code, as a table.
//!
//! The table itself is an example of the model crate, so that it uses the crate as anyone would.

use anyhow::Result;

use crate::workspace::{Workspace, succeeds};

/// Runs the table; `args` are its own.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let mut command = workspace.cargo();
    command.args(["run", "--quiet", "--locked", "--release", "--package", "fathom-model"]);
    command.args(["--example", "golden", "--"]).args(args);
    succeeds(&mut command)
}
