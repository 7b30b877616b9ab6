//! Where the checkout and its build outputs are, and how to call cargo and other programs there.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// The variable that proptest reads a seed from.
pub(crate) const SEED: &str = "PROPTEST_RNG_SEED";

/// The checkout that this binary was built from.
pub(crate) struct Workspace {
    /// Root of the checkout.
    pub(crate) root: PathBuf,
    /// Cargo's target directory, wherever it lies.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds both from where this binary was built and where it runs.
    pub(crate) fn locate() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .context("xtask does not lie in crates/xtask")?
            .to_owned();
        let exe = std::env::current_exe().context("this program has no path")?;
        // TARGET/PROFILE/xtask
        let target = exe.ancestors().nth(2).context("xtask was not run by cargo")?.to_owned();
        Ok(Self { root, target })
    }

    /// A program that runs in the root of the checkout.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.current_dir(&self.root);
        command
    }

    /// The cargo that started this task, building into the same target directory.
    pub(crate) fn cargo(&self) -> Command {
        let program = std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from);
        let mut command = self.command(program);
        command.env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// Whether `cargo NAME` is installed.
    pub(crate) fn has_cargo_command(&self, name: &str) -> bool {
        self.cargo()
            .args([name, "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }

    /// The seed of the property tests' random cases: that of the environment, or else one that
    /// the committed tree determines.
    ///
    /// Every change draws other cases, and the same tree draws the same ones everywhere: what
    /// passed before a change was handed in passes after it.
    pub(crate) fn seed(&self) -> String {
        if let Some(seed) = std::env::var_os(SEED) {
            return seed.to_string_lossy().into_owned();
        }
        let tree = self.command("git").args(["rev-parse", "--short=15", "HEAD^{tree}"]).output();
        let tree = tree.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        // Without git, as in an unpacked archive: always the same.
        let seed = tree.ok().and_then(|tree| u64::from_str_radix(tree.trim(), 16).ok());
        seed.unwrap_or_default().to_string()
    }

    /// Builds the `fathom` binary for release and returns its path.
    pub(crate) fn release_fathom(&self) -> Result<PathBuf> {
        let mut build = self.cargo();
        build.args(["build", "--locked", "--release", "--package", "fathom-cli"]);
        anyhow::ensure!(succeeds(&mut build)?, "the fathom binary does not build");
        Ok(self.target.join("release").join("fathom"))
    }

    /// Builds the `fathom` binary as the tests of the whole workspace do, and returns its path.
    ///
    /// Building its package alone would select fewer features of shared dependencies, and so
    /// compile most of the workspace a second time.
    pub(crate) fn tested_fathom(&self) -> Result<PathBuf> {
        let mut build = self.cargo();
        build.args(["test", "--locked", "--workspace", "--no-run"]);
        anyhow::ensure!(succeeds(&mut build)?, "the tests do not build");
        Ok(self.target.join("debug").join("fathom"))
    }
}

/// Runs a command to its end, its output going to the terminal.
pub(crate) fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    Ok(status.success())
}

/// Runs a command to its end, showing its output and handing each line of it to `on_line`.
pub(crate) fn watched(command: &mut Command, mut on_line: impl FnMut(&str)) -> Result<bool> {
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
    // The command still holds the pipe's writing ends: without this the loop below never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.context("cannot read the output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        on_line(&line);
    }
    Ok(child.wait().context("cannot wait for the command")?.success())
}
