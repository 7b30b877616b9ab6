//! Shared pieces of the benchmarks: CPU time, results, texts.

pub mod text;

use std::path::PathBuf;

use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

/// CPU milliseconds of this thread so far.
#[must_use]
pub fn cpu_ms() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

/// The value in the middle; `values` is not empty.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What follows `name` on the command line.
#[must_use]
pub fn argument(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

/// Writes results to the file that `--out FILE` names, if it is given.
///
/// # Panics
/// If the file cannot be written.
pub fn write_results(value: &Value) {
    if let Some(path) = argument("--out").map(PathBuf::from) {
        let text = serde_json::to_string_pretty(value).expect("a value serialises");
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
