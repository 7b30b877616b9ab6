//! Compiles the emulator and the kernels, each file once per content.
//!
//! Kernels are instrumented (`-fsanitize=thread` without its library, so that every access calls
//! the emulator); the emulator itself is not.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const KERNEL_FLAGS: &[&str] = &["-x", "c++", "-O1", "-fsanitize=thread", "-Wno-unknown-pragmas"];
const EMULATOR_FLAGS: &[&str] = &["-O2"];
const FLAGS: &[&str] =
    &["-std=c++20", "-g", "-c", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra"];

/// The program, or `None` without a compiler.
///
/// # Panics
/// If a file does not compile, with the compiler's message.
pub(crate) fn emulator() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM.get_or_init(build).as_deref()
}

fn build() -> Option<PathBuf> {
    if !Command::new("g++").arg("--version").output().is_ok_and(|out| out.status.success()) {
        return None;
    }
    let kernels =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels").canonicalize().unwrap();
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    fs::create_dir_all(&out).unwrap();
    // Test processes start together; one of them compiles, the others wait and find it done.
    let lock = fs::File::create(out.join("lock")).unwrap();
    lock.lock().unwrap();

    let mut files = BTreeSet::new();
    collect(&kernels, &mut files);
    let is = |path: &Path, extension: &str| path.extension().is_some_and(|e| e == extension);
    let jobs: Vec<(PathBuf, PathBuf, &[&str])> = files
        .iter()
        .filter(|path| is(path, "cu") || is(path, "cpp"))
        .map(|path| {
            let flags = if is(path, "cu") { KERNEL_FLAGS } else { EMULATOR_FLAGS };
            let mut hash = DefaultHasher::new();
            (with_headers(path), path, flags, FLAGS).hash(&mut hash);
            (path.clone(), out.join(format!("{:016x}.o", hash.finish())), flags)
        })
        .collect();
    std::thread::scope(|scope| {
        for jobs in jobs.chunks(jobs.len().div_ceil(2).max(1)) {
            scope.spawn(|| {
                jobs.iter().for_each(|(source, object, flags)| {
                    compile(source, object, flags);
                })
            });
        }
    });
    let objects: Vec<&PathBuf> = jobs.iter().map(|(_, object, _)| object).collect();
    let mut hash = DefaultHasher::new();
    objects.hash(&mut hash);
    let program = out.join(format!("emulator-{:016x}", hash.finish()));
    if !program.exists() {
        run_then_rename(Command::new("g++").args(&objects), &program);
    }
    Some(program)
}

/// The texts of a source and of all the headers of ours that it includes, however deep.
fn with_headers(path: &Path) -> Vec<String> {
    let (mut waiting, mut seen) = (vec![path.to_owned()], BTreeSet::new());
    let mut texts = Vec::new();
    while let Some(path) = waiting.pop() {
        let path = path.canonicalize().unwrap();
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let included =
            text.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
        waiting.extend(included.map(|name| path.with_file_name(name)));
        texts.push(text);
    }
    texts
}

fn collect(folder: &Path, files: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.insert(path);
        }
    }
}

fn compile(source: &Path, object: &Path, flags: &[&str]) {
    if !object.exists() {
        run_then_rename(Command::new("g++").args(FLAGS).args(flags).arg(source), object);
    }
}

/// Runs a command that writes `-o` a file; the file appears complete or not at all, so that test
/// processes running at the same time do not disturb each other.
fn run_then_rename(command: &mut Command, file: &Path) {
    let unfinished = file.with_extension(format!("{}.part", std::process::id()));
    let output = command.arg("-o").arg(&unfinished).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{message}", file.display());
    assert!(message.trim().is_empty(), "warnings:\n{message}");
    fs::rename(&unfinished, file).unwrap();
}
