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
    if let Some(python) = built(workspace, name, &wanted) {
        return Ok(python);
    }
    let directory = workspace.target.join("venv").join(name);
    let stamp = directory.join("installed.txt");
    let python = directory.join("bin").join("python");
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

/// The interpreter of the environment `name`, if it has been built from `requirements`, the content of
/// that file.
pub(crate) fn built(workspace: &Workspace, name: &str, requirements: &str) -> Option<PathBuf> {
    let directory = workspace.target.join("venv").join(name);
    let installed = fs::read_to_string(directory.join("installed.txt")).ok()?;
    let python = directory.join("bin").join("python");
    (installed == requirements && runs(&python)).then_some(python)
}

/// Whether an interpreter is there and starts: its system Python may have gone meanwhile.
fn runs(python: &Path) -> bool {
    std::process::Command::new(python)
        .args(["-c", ""])
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_built_once_it_has_these_requirements_and_its_python_starts() {
        let target = std::env::temp_dir().join(format!("fathom-python-{}", std::process::id()));
        let workspace = Workspace { root: PathBuf::from("."), target: target.clone() };
        let folder = target.join("venv/some");
        fs::create_dir_all(folder.join("bin")).unwrap();
        fs::write(folder.join("installed.txt"), "numpy==2.4.6\n").unwrap();
        let python = folder.join("bin/python");
        assert_eq!(built(&workspace, "some", "numpy==2.4.6\n"), None);
        std::os::unix::fs::symlink("/bin/true", &python).unwrap();
        assert_eq!(built(&workspace, "some", "numpy==2.4.6\n"), Some(python));
        assert_eq!(built(&workspace, "some", "numpy==2.4.7\n"), None);
        assert_eq!(built(&workspace, "other", "numpy==2.4.6\n"), None);
        fs::remove_dir_all(target).unwrap();
    }
}
