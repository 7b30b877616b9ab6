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

    /// Runs the script with a program in place of `fathom` that notes what it is asked for; its arguments, line by
    /// line, and the exit status.
    #[cfg(unix)]
    fn first_run(directory: &Path, args: &[&str]) -> (String, Option<i32>) {
        use std::os::unix::fs::PermissionsExt;

        fs::create_dir_all(directory).unwrap();
        let stub = directory.join("fathom");
        let asked = directory.join("asked");
        let text = format!(
            "#!/bin/sh\necho \"$*\" >> {}\nif [ \"$2\" = --list ]; then echo 'one, kernels of sm_80'; fi\n",
            asked.display()
        );
        fs::write(&stub, text).unwrap();
        fs::set_permissions(&stub, fs::Permissions::from_mode(0o755)).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/gpu/first_run.sh");
        // Without a Python or a sanitizer of this machine.
        let path = directory.join("path");
        fs::create_dir_all(&path).unwrap();
        for (name, status) in [("python3", 1), ("compute-sanitizer", 0)] {
            fs::write(path.join(name), format!("#!/bin/sh\nexit {status}\n")).unwrap();
            fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let paths = [path, PathBuf::from("/usr/bin"), PathBuf::from("/bin")];
        let output = std::process::Command::new("bash")
            .arg(script)
            .arg("--fathom")
            .arg(&stub)
            .arg("--out")
            .arg(directory.join("results"))
            .args(args)
            .env("PATH", std::env::join_paths(paths).unwrap())
            .output()
            .unwrap();
        (fs::read_to_string(asked).unwrap(), output.status.code())
    }

    #[cfg(unix)]
    #[test]
    fn the_check_comes_before_all_timings_and_a_run_can_go_on_from_a_step() {
        let root = std::env::temp_dir().join(format!("fathom-first-run-{}", std::process::id()));
        let (asked, status) = first_run(&root.join("whole"), &[]);
        assert_eq!(status, Some(0), "{asked}");
        let wanted = [
            "doctor",
            "device-check --small",
            "bench slice --quick --only decode --batch 1,64",
            "bench slice --quick --only decode --batch 1 --context 4K,128K",
            "bench kernels",
            "bench load",
            "bench slice --quick --deterministic",
            "bench slice --budget-s",
            "device-check --goldens",
            "device-check --sanitize --only one, kernels of sm_80",
        ];
        // Goldens lie beside a bundle's script alone.
        let wanted =
            wanted.map(|line| line.replace("device-check --goldens", "device-check --out"));
        let mut lines = asked.lines();
        for line in wanted {
            assert!(
                lines.any(|asked| asked.starts_with(&line)),
                "`{line}` is not in turn: {asked}"
            );
        }
        assert!(root.join("whole/results/run.json").exists());

        let (asked, status) = first_run(&root.join("later"), &["--from", "slice"]);
        assert_eq!(status, Some(0), "{asked}");
        assert!(
            asked.starts_with("bench slice --budget-s") && !asked.contains("kernels --"),
            "{asked}"
        );
        assert!(root.join("later/results/run-from-slice.json").exists());
        let (_, status) = first_run(&root.join("later"), &["--from", "nowhere"]);
        assert_eq!(status, Some(2));
        fs::remove_dir_all(root).unwrap();
    }
}
