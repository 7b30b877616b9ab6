//! CUDA is opened at run time and never linked: one binary runs with and without a driver.
//!
//! cudarc must be built with `dynamic-loading`; `dynamic-linking`, which any crate of the build could
//! switch on for all (candle's `cuda` feature does), would make the binary refuse to start where a
//! library is missing. A test of the cli looks at the binary itself.

use anyhow::{Context, Result, ensure};

use super::Finding;
use crate::workspace::Workspace;

/// What is wrong with the features that the workspace selects for cudarc.
pub(super) fn check(workspace: &Workspace) -> Result<Vec<Finding>> {
    let args = ["tree", "--locked", "--workspace", "--edges", "features", "--invert", "cudarc"];
    let output = workspace.cargo().args(args).output().context("cannot run cargo tree")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo tree failed: {error}");
    Ok(faults(&text))
}

fn faults(tree: &str) -> Vec<Finding> {
    let fault = |message: &str| Finding::file("Cargo.toml", message);
    let mut found = Vec::new();
    if tree.contains("dynamic-linking") {
        found.push(fault("something selects cudarc's dynamic-linking: CUDA would be linked"));
    }
    if !tree.contains("cudarc feature \"dynamic-loading\"") {
        found.push(fault("nothing selects cudarc's dynamic-loading"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linking_is_found_wherever_it_comes_from_and_loading_must_be_there() {
        let sound = "cudarc v0.19.10\n├── cudarc feature \"dynamic-loading\"\n│   └── fathom-ops\n";
        assert_eq!(faults(sound), []);
        let linked = format!("{sound}├── cudarc feature \"dynamic-linking\"\n");
        assert_eq!(faults(&linked).len(), 1);
        assert_eq!(faults("cudarc v0.19.10\n").len(), 1);
    }
}
