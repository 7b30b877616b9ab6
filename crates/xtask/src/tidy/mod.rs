//! `cargo xtask tidy`: the rules of this repository that no compiler knows.
//!
//! Every rule is a function from one file's path and text to what is wrong with it, so that each
//! is tested on a few lines. Only files that git tracks, or would track, are looked at.

mod code;
mod docker;
mod edges;
mod linking;
mod text;

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// One thing to mend.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    path: String,
    /// 1-based; 0 for the file as a whole.
    line: usize,
    message: String,
}

impl Finding {
    fn file(path: &str, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line: 0, message: message.into() }
    }

    fn line(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.message),
            line => write!(f, "{}:{line}: {}", self.path, self.message),
        }
    }
}

/// Prints every finding; `true` if there is none.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let mut findings = Vec::new();
    let paths = tracked(workspace)?;
    for path in &paths {
        let Ok(bytes) = fs::read(workspace.root.join(path)) else {
            // Deleted in the working tree, not yet in the index.
            continue;
        };
        let Ok(source) = String::from_utf8(bytes) else {
            if text::is_source(path) {
                findings.push(Finding::file(path, "is not UTF-8"));
            }
            continue;
        };
        text::check(path, &source, &mut findings);
        if path.ends_with(".rs") {
            code::check(path, &source, &mut findings);
        }
    }
    findings.extend(edges::check(workspace)?);
    findings.extend(dockerfiles(workspace, &paths)?);
    findings.extend(linking::check(workspace)?);
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} files, {} findings", paths.len(), findings.len());
    Ok(findings.is_empty())
}

fn dockerfiles(workspace: &Workspace, paths: &[String]) -> Result<Vec<Finding>> {
    let exists = |wanted: &str| {
        let folder = format!("{wanted}/");
        paths.iter().any(|path| path == wanted || path.starts_with(&folder))
    };
    let ignored = fs::read_to_string(workspace.root.join(".dockerignore")).unwrap_or_default();
    let is_task = |task: &str| crate::has_task(task);
    let context = docker::Context { exists: &exists, ignored: &ignored, is_task: &is_task };
    let mut findings = Vec::new();
    for path in paths.iter().filter(|path| docker::is_dockerfile(path)) {
        let source = fs::read_to_string(workspace.root.join(path))
            .with_context(|| format!("reading {path}"))?;
        docker::check(path, &source, &context, &mut findings);
    }
    Ok(findings)
}

/// Paths of all files git tracks or would track, relative to the root.
fn tracked(workspace: &Workspace) -> Result<Vec<String>> {
    let output = workspace
        .command("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("cannot run git")?;
    ensure!(output.status.success(), "git cannot list the files of this checkout");
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    Ok(names.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}
