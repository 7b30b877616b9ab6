//! `cargo xtask kernels [--check] [--arch ARCH]...`: every kernel for every GPU architecture.
//!
//! Compiles the files of `kernels/MANIFEST.toml` (through `kernel-compiler` of the ops crate, which
//! keeps what has not changed), prints registers, spills and shared memory of each kernel, holds the
//! machine code against the manifest, and leaves a pack for `FATHOM_KERNEL_PACK`. With `--check` a
//! shortfall fails the task; without, it is only shown. The last line sums up.
//!
//! Not here: running kernels (the tests of the ops crate do, in the block emulator).

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::Workspace;

mod dependency;
mod log;
mod manifest;

use log::KernelReport;
use manifest::{File, Manifest};

/// Where the compiler's packages lie.
struct Toolchain {
    lib: PathBuf,
    bin: PathBuf,
}

impl Toolchain {
    /// `$FATHOM_CUDA_HOME`, else `target/cuda`, else an installed toolkit.
    #[expect(clippy::disallowed_methods, reason = "a developer task has no other configuration")]
    fn find(workspace: &Workspace) -> Option<Self> {
        let ours = std::env::var("FATHOM_CUDA_HOME")
            .map_or_else(|_| workspace.root.join("target/cuda"), PathBuf::from);
        let homes = [ours.join("nvidia/cu13"), ours, PathBuf::from("/usr/local/cuda")];
        homes.into_iter().find_map(|home| {
            let lib = [home.join("lib"), home.join("lib64")]
                .into_iter()
                .find(|lib| lib.join("libnvrtc.so").exists())?;
            Some(Self { lib, bin: home.join("bin") })
        })
    }
}

/// The folder with `lib` and `bin` of the kernel compiler.
pub(crate) fn compiler(workspace: &Workspace) -> Option<PathBuf> {
    Toolchain::find(workspace).and_then(|found| found.lib.parent().map(Path::to_path_buf))
}

/// Runs the task; `true` if nothing fell short (or it is not asked).
pub(crate) fn run(workspace: &Workspace, args: &[String]) -> Result<bool> {
    let mut check = false;
    let mut only = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--check" => check = true,
            "--arch" => only.push(args.next().context("--arch needs an architecture")?.clone()),
            other => bail!("unknown argument `{other}`; usage: kernels [--check] [--arch ARCH]..."),
        }
    }
    let manifest = Manifest::read(&workspace.root.join("kernels"))?;
    let Some(toolchain) = Toolchain::find(workspace) else {
        println!("GPU support is absent: there is no kernel compiler (NVRTC).");
        println!("`scripts/setup-cuda.sh` installs one into target/cuda; it needs no GPU.");
        println!("kernels: nothing compiled");
        return Ok(!check);
    };
    let out = workspace.target.join("kernels");
    // What is not for every architecture must not be taken for what is.
    let pack = out.join(match &only[..] {
        [] => "pack".to_owned(),
        some => format!("pack-{}", some.join("-")),
    });
    let compiled = compile(workspace, &toolchain, &manifest, &only, (&out, &pack))?;

    let (mut faults, mut images) = (Vec::new(), Vec::new());
    let mut n_kernels = 0;
    for ((path, arch), key) in &compiled {
        let file = manifest.file(path).context("the compiler named a file it was not given")?;
        let Some(key) = key else {
            faults.push(format!("{path} {arch}: does not compile"));
            continue;
        };
        let log = std::fs::read_to_string(out.join(format!("{key}.log")))?;
        let reports = log::reports(&log);
        n_kernels += reports.len();
        for report in &reports {
            println!("{path:<24} {arch:<8} {report}");
        }
        faults.extend(shortfalls(file, arch, &log, &reports));
        images.push((file, arch.as_str(), out.join(format!("{key}.cubin"))));
    }
    faults.extend(machine_code_faults(&toolchain, &images)?);
    println!();
    faults.iter().for_each(|fault| println!("{fault}"));
    println!("pack: {}", pack.display());
    let (n_files, n_faults) = (compiled.len(), faults.len());
    println!("kernels: {n_kernels} kernels in {n_files} images, {n_faults} shortfalls");
    Ok(n_faults == 0 || !check)
}

/// What the machine code of `images` falls short of, in their order; on all processors, as the
/// disassembler takes longest.
fn machine_code_faults(
    toolchain: &Toolchain,
    images: &[(&File, &str, PathBuf)],
) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let take = || {
        let mut found = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some((file, arch, cubin)) = images.get(index) else { return Ok(found) };
            let sass = disassemble(toolchain, cubin)?;
            let mut faults = instruction_faults(file, arch, &sass);
            faults.extend(dependency::faults(file, arch, &sass));
            found.push((index, faults));
        }
    };
    let n_threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut found = Vec::new();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(take)).collect();
        for thread in threads {
            let part: Result<Vec<_>> = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            found.extend(part?);
        }
        Ok::<_, anyhow::Error>(())
    })?;
    found.sort_unstable_by_key(|(index, _)| *index);
    Ok(found.into_iter().flat_map(|(_, faults)| faults).collect())
}

/// Key of each (file, architecture), or `None` where it does not compile.
type Compiled = BTreeMap<(String, String), Option<String>>;

fn compile(
    workspace: &Workspace,
    toolchain: &Toolchain,
    manifest: &Manifest,
    only: &[String],
    (out, pack): (&Path, &Path),
) -> Result<Compiled> {
    let mut command = workspace.cargo();
    command.args(["run", "--quiet", "--locked", "--package", "fathom-ops"]);
    command.args(["--bin", "kernel-compiler", "--"]).arg(workspace.root.join("kernels"));
    command.args([out, pack]);
    // NVRTC opens a second library of its own by name.
    command.env("LD_LIBRARY_PATH", &toolchain.lib);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot run cargo")?;
    let mut jobs = String::new();
    for file in &manifest.files {
        for arch in file.archs.iter().filter(|arch| only.is_empty() || only.contains(arch)) {
            jobs += &format!("{} {arch}\n", file.path);
        }
    }
    child.stdin.take().context("no pipe to the compiler")?.write_all(jobs.as_bytes())?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "the kernel compiler failed:\n{text}");
    let mut compiled = Compiled::new();
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            [path, arch, key] if manifest.file(path).is_some() => {
                let key = (key != "failed").then(|| key.to_owned());
                compiled.insert((path.to_owned(), arch.to_owned()), key);
            }
            // What the compiler says about a file that failed.
            _ => println!("{line}"),
        }
    }
    ensure!(compiled.len() == jobs.lines().count(), "the kernel compiler lost a file");
    Ok(compiled)
}

/// What the compiler's log says against the manifest.
fn shortfalls(file: &File, arch: &str, log: &str, reports: &[KernelReport]) -> Vec<String> {
    let mut faults = Vec::new();
    for entry in &file.entries {
        if !reports.iter().any(|report| report.name == *entry) {
            faults.push(format!("{} {arch}: no kernel `{entry}`", file.path));
        }
    }
    for report in reports {
        if !file.entries.contains(&report.name) {
            let name = &report.name;
            faults.push(format!("{} {arch}: `{name}` is not in the manifest", file.path));
        }
        if file.hot && report.spilled_bytes > 0 {
            let (name, bytes) = (&report.name, report.spilled_bytes);
            faults.push(format!("{} {arch}: `{name}` spills {bytes} bytes", file.path));
        }
    }
    for line in log.lines().filter(|line| line.contains("warning")) {
        faults.push(format!("{} {arch}: {}", file.path, line.trim()));
    }
    faults
}

fn instruction_faults(file: &File, arch: &str, sass: &str) -> Vec<String> {
    let has = |instruction: &str| sass.contains(instruction);
    let missing = file.expect(arch).filter(|i| !has(i)).map(|i| ("lacks", i));
    let unwanted = file.forbid(arch).filter(|i| has(i)).map(|i| ("has", i));
    missing
        .chain(unwanted)
        .map(|(verb, instruction)| {
            format!("{} {arch}: the machine code {verb} {instruction}", file.path)
        })
        .collect()
}

fn disassemble(toolchain: &Toolchain, cubin: &Path) -> Result<String> {
    let output = Command::new(toolchain.bin.join("cuobjdump"))
        .arg("-sass")
        .arg(cubin)
        // It calls nvdisasm by name.
        .env("PATH", &toolchain.bin)
        .output()
        .context("cannot run cuobjdump; `scripts/setup-cuda.sh` installs it")?;
    ensure!(
        output.status.success(),
        "cuobjdump refuses {}: {}",
        cubin.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        Manifest::parse(
            "[defaults]\narchs = [\"sm_80\", \"sm_90a\"]\n[[file]]\npath = \"a.cu\"\n\
             entries = [\"a\", \"b\"]\nhot = true\nexpect = { all = [\"HMMA\"], sm_90a = [\"QGMMA\"] }\n\
             forbid = { sm_90a = [\"F2FP\"] }\n",
        )
        .unwrap()
        .files
        .remove(0)
    }

    fn report(name: &str, spilled_bytes: u32) -> KernelReport {
        let name = name.to_owned();
        KernelReport { name, registers: 32, spilled_bytes, ..KernelReport::default() }
    }

    #[test]
    fn a_missing_kernel_an_unknown_one_a_spill_and_a_warning_are_shortfalls() {
        let sound = [report("a", 0), report("b", 0)];
        assert_eq!(shortfalls(&file(), "sm_80", "ptxas info", &sound), [""; 0]);
        assert_eq!(shortfalls(&file(), "sm_80", "", &[report("a", 0)]).len(), 1);
        assert_eq!(shortfalls(&file(), "sm_80", "", &[report("a", 8), report("b", 0)]).len(), 1);
        let extra = [report("a", 0), report("b", 0), report("c", 0)];
        assert_eq!(shortfalls(&file(), "sm_80", "", &extra).len(), 1);
        let warned = "ptxas warning : (C7510) Potential Performance Loss";
        assert_eq!(shortfalls(&file(), "sm_80", warned, &sound).len(), 1);
    }

    #[test]
    fn instructions_are_looked_for_per_architecture() {
        assert_eq!(instruction_faults(&file(), "sm_80", "HMMA.16816").len(), 0);
        assert_eq!(instruction_faults(&file(), "sm_80", "FFMA").len(), 1);
        assert_eq!(instruction_faults(&file(), "sm_90a", "HMMA F2FP").len(), 2);
    }
}
