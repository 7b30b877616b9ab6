//! `cargo xtask fuzz`: real fuzzing of what comes from outside.
//!
//! Needs a nightly compiler and cargo-fuzz; says so if one is missing. The same targets run over
//! their corpus with the stable compiler as ordinary tests of the `fuzz` crate, which is what
//! `check` does. What fuzzing finds belongs into that corpus.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, succeeds};

/// The package with the fuzzing binaries; outside the workspace, for it needs nightly.
const RUNNER: &str = "crates/fuzz/libfuzzer";
/// Seconds for each target, unless told otherwise.
const SECONDS: u32 = 60;

/// Fuzzes the targets named in `args`, or all; `--seconds N` is how long for each.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let known = targets(&workspace.root.join(RUNNER).join("fuzz_targets"))?;
    let (seconds, named) = parse(args)?;
    for name in &named {
        ensure!(known.contains(name), "no fuzz target `{name}`; there are: {}", known.join(", "));
    }
    let instead = "without it, `FATHOM_FUZZ_MUTATIONS=100000 cargo test -p fathom-fuzz` runs the same \
                   targets over mutations that no coverage guides";
    let needs = "fuzzing needs a nightly compiler (`rustup toolchain install nightly`)";
    ensure!(nightly(workspace, &["--version"]), "{needs}; {instead}");
    let needs = "fuzzing needs cargo-fuzz (`cargo install cargo-fuzz`)";
    ensure!(nightly(workspace, &["fuzz", "--version"]), "{needs}; {instead}");
    for target in if named.is_empty() { &known } else { &named } {
        println!("\n==== {target}, {seconds} s");
        let mut fuzz = workspace.command("cargo");
        // New inputs go to the first folder, the tree's corpus is only read.
        let found = workspace.target.join("fuzz").join("corpus").join(target);
        fs::create_dir_all(&found).with_context(|| format!("making {}", found.display()))?;
        fuzz.args(["+nightly", "fuzz", "run", "--fuzz-dir", RUNNER, target]).arg(&found);
        let seeds = format!("crates/fuzz/corpus/{target}");
        if workspace.root.join(&seeds).is_dir() {
            fuzz.arg(seeds);
        }
        fuzz.args(["--", &format!("-max_total_time={seconds}"), "-timeout=10"]);
        if !succeeds(&mut fuzz)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Seconds for each target, and the targets that were named.
fn parse(args: &[String]) -> Result<(u32, Vec<String>)> {
    let (mut seconds, mut named) = (SECONDS, Vec::new());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--seconds" {
            let value = args.next().context("--seconds needs a number")?;
            seconds = value.parse().with_context(|| format!("--seconds {value}"))?;
        } else {
            named.push(arg.clone());
        }
    }
    Ok((seconds, named))
}

/// Names of all targets: those of the files in the folder.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        names.extend(path.file_stem().and_then(|name| name.to_str()).map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

/// Whether the nightly cargo understands `args`.
fn nightly(workspace: &Workspace, args: &[&str]) -> bool {
    let mut cargo = workspace.command("cargo");
    cargo.arg("+nightly").args(args).stdout(Stdio::null()).stderr(Stdio::null());
    cargo.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_targets_and_seconds() {
        let parse =
            |args: &[&str]| parse(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(parse(&[]).unwrap(), (SECONDS, Vec::new()));
        let (seconds, named) = parse(&["config_json", "--seconds", "5"]).unwrap();
        assert_eq!((seconds, named), (5, vec!["config_json".to_owned()]));
        assert!(parse(&["--seconds"]).is_err());
        assert!(parse(&["--seconds", "long"]).is_err());
    }
}
