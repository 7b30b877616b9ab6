//! A folder with Node packages for the end-to-end test, under the target directory.
//!
//! Made from a `package.json` in the tree with exact versions, and again when that file changes.
//! Without node or npm there is none, and what needs it is skipped.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, succeeds};

/// The folder whose `node_modules` holds the packages of `manifest`; `None` without node or npm.
pub(crate) fn folder(workspace: &Workspace, name: &str, manifest: &str) -> Result<Option<PathBuf>> {
    if let Some(missing) = ["node", "npm"].into_iter().find(|tool| !runs(workspace, tool)) {
        println!("{missing} is not installed: checks that need it are skipped");
        return Ok(None);
    }
    let wanted = fs::read_to_string(workspace.root.join(manifest))
        .with_context(|| format!("reading {manifest}"))?;
    let folder = workspace.target.join("node").join(name);
    let stamp = folder.join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(Some(folder));
    }
    println!("installing the Node packages `{name}` of {manifest}");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    fs::write(folder.join("package.json"), &wanted)
        .with_context(|| format!("writing into {}", folder.display()))?;
    let mut install = workspace.command("npm");
    install.args(["install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]);
    install.current_dir(&folder);
    ensure!(succeeds(&mut install)?, "npm cannot install {manifest}");
    fs::write(&stamp, wanted).with_context(|| format!("writing {}", stamp.display()))?;
    Ok(Some(folder))
}

/// Whether a program is there and starts.
fn runs(workspace: &Workspace, program: &str) -> bool {
    let mut command = workspace.command(program);
    command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
