//! Opening a checkpoint of the published sizes: CPU time, and how much of it is not reading.
//!
//! The checkpoint is sparse: real headers and index (69,187 tensors in 46 files for Flash), holes
//! for tensors. Compared with reading the same index and header bytes and doing nothing with them.
//!
//! Run: `cargo bench -p fathom-benches --bench loader`. Limit for Flash: 1,000 ms of CPU beyond
//! reading; the process fails above it.
#![expect(clippy::print_stdout, reason = "a bench prints its result")]

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use fathom_core::ModelConfig;
use fathom_weights::synthetic::write_sparse;
use fathom_weights::{Checkpoint, parse_config};

/// CPU beyond reading that opening Flash may take.
const LIMIT_MS: f64 = 1000.0;
const REPEATS: usize = 7;

fn main() -> ExitCode {
    let config = |json: &[u8]| parse_config(json).expect("a published config").config;
    let flash = config(include_bytes!("../../models/flash/config.json"));
    let pro = config(include_bytes!("../../models/pro/config.json"));
    let flash_ms = measure("Flash", &flash, 3_500_000_000);
    measure("Pro", &pro, 13_650_000_000);
    if flash_ms > LIMIT_MS {
        println!("Flash exceeds the limit of {LIMIT_MS} ms");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Prints one line, returns the CPU milliseconds beyond reading.
fn measure(name: &str, config: &ModelConfig, shard_bytes: u64) -> f64 {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_sparse(dir.path(), config, shard_bytes).expect("written");
    let mut open_ms = Vec::new();
    let mut read_ms = Vec::new();
    let mut read_bytes = 0;
    let (mut n_tensors, mut n_shards) = (0, 0);
    for _ in 0..REPEATS {
        let start = cpu_ms();
        read_bytes = read_only(dir.path());
        read_ms.push(cpu_ms() - start);
        let start = cpu_ms();
        let checkpoint = Checkpoint::open(dir.path()).expect("sound");
        open_ms.push(cpu_ms() - start);
        (n_tensors, n_shards) = (checkpoint.n_tensors(), checkpoint.n_shards());
    }
    let (open, read) = (median(open_ms), median(read_ms));
    println!(
        "{name}: {n_tensors} tensors in {n_shards} files, {:.1} MB of index and headers: \
         open {open:.1} ms CPU, reading alone {read:.1} ms, beyond reading {:.1} ms \
         (open / read {:.1}x, {:.2} us per tensor)",
        read_bytes as f64 / 1e6,
        open - read,
        open / read,
        1e3 * (open - read) / n_tensors as f64
    );
    open - read
}

/// Reads the files and header bytes that opening reads, and drops them.
fn read_only(dir: &Path) -> usize {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).expect("listable").flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "json") {
            bytes += std::fs::read(entry.path()).expect("readable").len();
            continue;
        }
        let mut file = File::open(entry.path()).expect("readable");
        let mut length = [0; 8];
        file.read_exact(&mut length).expect("a header");
        let mut header = Vec::new();
        file.take(u64::from_le_bytes(length)).read_to_end(&mut header).expect("a header");
        bytes += header.len();
    }
    bytes
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// CPU milliseconds of this thread so far; opening uses no other.
fn cpu_ms() -> f64 {
    let text =
        std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux with schedstat");
    let ns: f64 = text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number");
    ns / 1e6
}
