//! Compiles kernel files for GPU architectures; `cargo xtask kernels` runs it.
//!
//! Usage: `kernel-compiler KERNELS OUT PACK`, with a line `PATH ARCH` on standard input per compilation.
//! Writes `OUT/KEY.cubin` and `OUT/KEY.log`, unless they are there, and prints `PATH ARCH KEY` or
//! `PATH ARCH failed`. At the end the file PACK holds everything that compiled. Exits with status 2
//! where NVRTC is not installed.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::fs;
use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use fathom_ops::cuda::{compile, pack, source};

fn main() -> io::Result<ExitCode> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(kernels), Some(out), Some(pack_file)) = (args.next(), args.next(), args.next())
    else {
        println!(
            "usage: kernel-compiler KERNELS OUT PACK, with lines `PATH ARCH` on standard input"
        );
        return Ok(ExitCode::FAILURE);
    };
    let Some(version) = compile::nvrtc_version() else {
        println!("NVRTC (libnvrtc) is not on the library path");
        return Ok(ExitCode::from(2));
    };
    fs::create_dir_all(&out)?;
    let lines = io::stdin().lock().lines().collect::<io::Result<Vec<_>>>()?;
    let jobs: Vec<(&str, &str)> = lines.iter().filter_map(|line| line.split_once(' ')).collect();
    let read = |path: &str| fs::read_to_string(kernels.join(path)).ok();
    let run = |&(path, arch): &(&str, &str)| -> io::Result<Option<(String, PathBuf)>> {
        let text = match source::flatten(path, &read) {
            Ok(text) => text,
            Err(missing) => {
                println!("{path} {arch} failed\nno file `{missing}`");
                return Ok(None);
            }
        };
        let key = compile::key(&text, arch, version);
        let (cubin, log) = (out.join(format!("{key}.cubin")), out.join(format!("{key}.log")));
        if !cubin.exists() || !log.exists() {
            match compile::compile(&text, path, arch) {
                Ok(compiled) => {
                    write(&log, compiled.log.as_bytes())?;
                    write(&cubin, &compiled.cubin)?;
                }
                Err(log) => {
                    println!("{path} {arch} failed\n{log}");
                    return Ok(None);
                }
            }
        }
        println!("{path} {arch} {key}");
        Ok(Some((compile::source_key(&text, arch), cubin)))
    };

    // NVRTC compiles in parallel; each thread takes the next file that nobody has.
    let next = Mutex::new(0..jobs.len());
    let results: Mutex<Vec<Option<(String, PathBuf)>>> = Mutex::new(vec![None; jobs.len()]);
    let work = || -> io::Result<()> {
        loop {
            let index = next.lock().expect("no thread panics while it holds this").next();
            let Some(index) = index else { return Ok(()) };
            let result = run(&jobs[index])?;
            results.lock().expect("no thread panics while it holds this")[index] = result;
        }
    };
    let n_threads = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("compiling never panics"))
    })?;

    let results = results.into_inner().expect("no thread panicked");
    let mut images = Vec::new();
    for (&(path, arch), compiled) in jobs.iter().zip(&results) {
        if let Some((key, cubin)) = compiled {
            images.push((path, arch, key, fs::read(cubin)?));
        }
    }
    let images: Vec<pack::Image<'_>> = images
        .iter()
        .map(|(path, arch, key, cubin)| pack::Image { path, arch, key, cubin })
        .collect();
    write(&pack_file, &pack::write(&images)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a file that is there whole or not at all: whoever ends this program in the middle must not leave
/// half an image that is taken for one.
fn write(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = file.with_extension("part");
    fs::write(&unfinished, bytes)?;
    fs::rename(unfinished, file)
}
