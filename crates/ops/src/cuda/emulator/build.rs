//! Compiles the emulator and the kernels, each file once per content.
//!
//! There are two builds. Of [`build`] the kernels are instrumented (`-fsanitize=thread` without its library, so that
//! every access calls the emulator); the emulator itself is not. Of [`build_sanitized`] both are, with
//! AddressSanitizer and UBSan, which cannot be joined with the first: they see undefined behaviour and what lies outside
//! of an array, and nothing that a barrier would have ordered.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a build adds to [`FLAGS`].
#[derive(Debug, Clone, Copy)]
struct Build {
    kernels: &'static [&'static str],
    emulator: &'static [&'static str],
    link: &'static [&'static str],
}

const HOOKED: Build = Build {
    kernels: &["-x", "c++", "-O1", "-fsanitize=thread", "-Wno-unknown-pragmas", "-Wno-psabi"],
    emulator: &["-O2"],
    link: &[],
};
/// Without warnings: the other build has them, and sanitizers cause wrong ones.
const SANITIZED: Build = Build {
    kernels: &["-x", "c++", "-O1", "-w", "-Wno-psabi", SANITIZERS, "-fno-sanitize-recover=all"],
    emulator: &["-O2", "-w", SANITIZERS, "-fno-sanitize-recover=all"],
    link: &[SANITIZERS],
};
const SANITIZERS: &str = "-fsanitize=address,undefined";
const FLAGS: &[&str] = &[
    "-std=c++20",
    "-g",
    "-c",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
];
/// Where the emulated driver is, in the folder of kernels.
const DRIVER: &str = "emulator/driver";

/// The program made of `kernels` (the folder of that name), with its parts in `out`; `None` without a
/// C++ compiler.
///
/// # Errors
/// What the file system or the compiler says; a warning counts.
pub fn build(kernels: &Path, out: &Path) -> io::Result<Option<PathBuf>> {
    program(kernels, out, HOOKED)
}

/// The same program with sanitizers in place of the checks of every access.
///
/// # Errors
/// As for [`build`].
pub fn build_sanitized(kernels: &Path, out: &Path) -> io::Result<Option<PathBuf>> {
    program(kernels, out, SANITIZED)
}

fn program(kernels: &Path, out: &Path, build: Build) -> io::Result<Option<PathBuf>> {
    let is_wanted = |path: &Path| !path.starts_with(kernels.join(DRIVER));
    let Some(objects) = objects(kernels, out, build, &is_wanted)? else { return Ok(None) };
    let program = out.join(format!("emulator-{}", objects.key));
    if !program.exists() {
        run_then_rename(Command::new("g++").args(build.link).args(&objects.files), &program)?;
    }
    Ok(Some(program))
}

/// A folder with a `libcuda.so.1` that runs kernels in the emulator: the emulated driver
/// (`kernels/emulator/driver`). On the library path it takes the place of NVIDIA's.
///
/// # Errors
/// As for [`build`].
pub fn build_driver(kernels: &Path, out: &Path) -> io::Result<Option<PathBuf>> {
    let program = kernels.join("emulator/serve.cpp");
    let Some(objects) = objects(kernels, out, HOOKED, &|path| path != program)? else {
        return Ok(None);
    };
    let folder = out.join(format!("driver-{}", objects.key));
    fs::create_dir_all(&folder)?;
    let library = folder.join("libcuda.so.1");
    if !library.exists() {
        let flags = ["-shared", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic", "-Wl,-z,defs"];
        run_then_rename(Command::new("g++").args(flags).args(&objects.files), &library)?;
    }
    Ok(Some(folder))
}

/// Compiled files, and a name for all of them.
struct Objects {
    files: Vec<PathBuf>,
    key: String,
}

fn objects(
    kernels: &Path,
    out: &Path,
    build: Build,
    is_wanted: &dyn Fn(&Path) -> bool,
) -> io::Result<Option<Objects>> {
    if !Command::new("g++").arg("--version").output().is_ok_and(|out| out.status.success()) {
        return Ok(None);
    }
    fs::create_dir_all(out)?;
    // Processes start together; one of them compiles, the others wait and find it done.
    let lock = fs::File::create(out.join("lock"))?;
    lock.lock()?;
    let mut files = BTreeSet::new();
    collect(kernels, &mut files)?;
    let is = |path: &Path, extension: &str| path.extension().is_some_and(|e| e == extension);
    let jobs = files
        .iter()
        .filter(|path| (is(path, "cu") || is(path, "cpp")) && is_wanted(path))
        .map(|path| {
            let flags = if is(path, "cu") { build.kernels } else { build.emulator };
            let mut hash = DefaultHasher::new();
            (with_headers(path)?, path, flags, FLAGS).hash(&mut hash);
            Ok((path.clone(), out.join(format!("{:016x}.o", hash.finish())), flags))
        })
        .collect::<io::Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let halves: Vec<_> = jobs
            .chunks(jobs.len().div_ceil(2).max(1))
            .map(|jobs| {
                scope.spawn(|| {
                    jobs.iter()
                        .try_for_each(|(source, object, flags)| compile(source, object, flags))
                })
            })
            .collect();
        halves.into_iter().try_for_each(|half| half.join().expect("compiling does not panic"))
    })?;
    let files: Vec<PathBuf> = jobs.into_iter().map(|(_, object, _)| object).collect();
    let mut hash = DefaultHasher::new();
    files.hash(&mut hash);
    Ok(Some(Objects { files, key: format!("{:016x}", hash.finish()) }))
}

/// The texts of a source and of all the headers of ours that it includes, however deep.
fn with_headers(path: &Path) -> io::Result<Vec<String>> {
    let (mut waiting, mut seen) = (vec![path.to_owned()], BTreeSet::new());
    let mut texts = Vec::new();
    while let Some(path) = waiting.pop() {
        let path = path.canonicalize()?;
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let included =
            text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
        waiting.extend(included.map(|name| path.with_file_name(name)));
        texts.push(text);
    }
    Ok(texts)
}

fn collect(folder: &Path, files: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.insert(path);
        }
    }
    Ok(())
}

fn compile(source: &Path, object: &Path, flags: &[&str]) -> io::Result<()> {
    if object.exists() {
        return Ok(());
    }
    run_then_rename(Command::new("g++").args(FLAGS).args(flags).arg(source), object)
}

/// Runs a command that writes `-o` a file; the file appears complete or not at all, so that test
/// processes running at the same time do not disturb each other.
fn run_then_rename(command: &mut Command, file: &Path) -> io::Result<()> {
    let unfinished = file.with_extension(format!("{}.part", std::process::id()));
    let output = command.arg("-o").arg(&unfinished).output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || !message.trim().is_empty() {
        return Err(io::Error::other(format!("{}:\n{message}", file.display())));
    }
    fs::rename(&unfinished, file)
}
