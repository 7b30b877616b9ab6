//! `cargo xtask device-check [--bundle DIR] [ARGS]`: a GPU against the CPU operators.
//!
//! Compiles the kernels where there is a compiler, builds the `fathom` binary for release with them
//! inside, and runs `fathom device-check ARGS` here; or, with `--bundle`, leaves in DIR what a GPU
//! machine without Rust needs: the binary, the golden files, the command as a script, and the script
//! that also measures everything (`scripts/gpu/first_run.sh`).
//!
//! Not here: what is checked (`fathom device-check`).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, succeeds};

/// The script of a bundle. `$1`: folder for the results, by default that of the script.
const SCRIPT: &str = "\
#!/bin/sh
# Checks the GPU of this machine; needs only its driver. Usage: check.sh [ARGS of fathom device-check]
here=$(cd \"$(dirname \"$0\")\" && pwd)
export LD_LIBRARY_PATH=/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
\"$here/fathom\" doctor --device cuda
exec \"$here/fathom\" device-check --goldens \"$here/goldens\" --out \"$here/device-check.json\" \"$@\"
";

/// Runs the task; `true` if the device passes, or the bundle is there.
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let (bundle, rest) = match args {
        [flag, directory, rest @ ..] if flag == "--bundle" => (Some(directory), rest),
        rest => (None, rest),
    };
    // Without a compiler this prints so, and the binary compiles kernels where it runs.
    ensure!(crate::kernels::run(workspace, &[])?, "the kernels do not compile");
    let pack = workspace.target.join("kernels").join("pack");
    let fathom = build(workspace, pack.exists().then_some(pack))?;
    let goldens = workspace.root.join("models/nano/goldens");
    match bundle {
        Some(directory) => {
            let directory = Path::new(directory);
            write_bundle(directory, &fathom, &goldens)?;
            add_first_run(directory, &workspace.root, &crate::bench::commit(workspace)?)
        }
        None => {
            let mut command = workspace.command(&fathom);
            succeeds(command.arg("device-check").arg("--goldens").arg(goldens).args(rest))
        }
    }
}

fn build(workspace: &Workspace, pack: Option<PathBuf>) -> Result<PathBuf> {
    let mut command = workspace.cargo();
    command.args(["build", "--locked", "--profile", "dist", "--package", "fathom-cli"]);
    if let Some(pack) = pack {
        command.env("FATHOM_KERNEL_PACK", pack);
    }
    ensure!(succeeds(&mut command)?, "the fathom binary does not build");
    Ok(workspace.target.join("dist").join("fathom"))
}

fn write_bundle(directory: &Path, fathom: &Path, goldens: &Path) -> Result<bool> {
    let copy = |from: &Path, to: PathBuf| {
        fs::copy(from, &to)
            .map(drop)
            .with_context(|| format!("copying {} to {}", from.display(), to.display()))
    };
    let folder = directory.join("goldens");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    copy(fathom, directory.join("fathom"))?;
    for name in ["nano_manifest.json", "nano_bf16.safetensors"] {
        copy(&goldens.join(name), folder.join(name))?;
    }
    let script = directory.join("check.sh");
    fs::write(&script, SCRIPT).with_context(|| format!("writing {}", script.display()))?;
    println!("copy {} to the GPU machine and run `sh check.sh` there", directory.display());
    Ok(true)
}

/// Adds what measures: the script for a whole run, those of the peers, and the commit.
fn add_first_run(directory: &Path, root: &Path, commit: &str) -> Result<bool> {
    let scripts = directory.join("scripts");
    fs::create_dir_all(&scripts).with_context(|| format!("making {}", scripts.display()))?;
    let copy = |from: &Path, to: PathBuf| {
        fs::copy(from, &to)
            .map(drop)
            .with_context(|| format!("copying {} to {}", from.display(), to.display()))
    };
    copy(&root.join("scripts/gpu/first_run.sh"), directory.join("first_run.sh"))?;
    let peers = root.join("scripts/peers");
    let unreadable = || format!("reading {}", peers.display());
    for entry in fs::read_dir(&peers).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "py")
            && let Some(name) = path.file_name()
        {
            copy(&path, scripts.join(name))?;
        }
    }
    fs::write(directory.join("commit"), commit)
        .with_context(|| format!("writing {}", directory.join("commit").display()))?;
    println!(
        "`bash first_run.sh` there measures everything; `python3 scripts/peers/prepare.py \
         --archive --into {}` first brings peers along",
        directory.join("peers").display()
    );
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_holds_everything_its_script_names() {
        let directory = std::env::temp_dir().join(format!("fathom-bundle-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let fathom = directory.join("binary");
        fs::write(&fathom, "x").unwrap();
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano/goldens");
        let bundle = directory.join("bundle");
        assert!(write_bundle(&bundle, &fathom, &goldens).unwrap());
        for name in ["fathom", "goldens/nano_manifest.json", "goldens/nano_bf16.safetensors"] {
            assert!(bundle.join(name).exists(), "{name}");
        }
        let script = fs::read_to_string(bundle.join("check.sh")).unwrap();
        assert!(script.contains("/fathom\" device-check") && script.contains("$here/goldens"));
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        assert!(add_first_run(&bundle, &root, "abc").unwrap());
        let script = fs::read_to_string(bundle.join("first_run.sh")).unwrap();
        for name in ["commit", "scripts/run.py", "scripts/peers.py", "scripts/exact.py"] {
            assert!(bundle.join(name).exists(), "{name}");
        }
        assert!(script.contains("$here/commit") && script.contains("scripts=$here/scripts"));
        fs::remove_dir_all(directory).unwrap();
    }
}
