//! Event streams: CPU time per token event with a thousand readers, and how long a token is on its
//! way.
//!
//! Run with `cargo xtask bench text` or `cargo bench -p fathom-benches --bench sse [-- --streams N]
//! [--out FILE]`. A scripted runner stands in for the model; the server is the real one, on a
//! reactor of one thread. The same readers are then served by the raw limit: the same HTTP stack,
//! woken the same way, writing one constant chunk per event.
//!
//! - `flood`: tokens come as fast as the engine makes them, so that several may be ready at once.
//!   Target: 10 us per event, which is 100,000 events per second on one core. How many leave in one
//!   write differs between the two sides, so their ratio says little here;
//! - `tick`: every stream gets a token each 10 ms, if the machine keeps up: about one write per event.
//!   Target: half the throughput of the raw limit;
//! - `half`: half as many streams. How long from the token to its bytes at the reader, which is
//!   after they were written: an upper limit of the gap that the target is about, 5 ms for 99 of 100.
//!   All streams get their token at once, so the last one waits for all others' writes and reads: the
//!   raw limit's gap beside it says how much of the gap that is.
//!
//! CPU time is that of the reactor's thread, system calls included.
//!
//! Not here: what an event says, and readers that are slow or leave (the server's tests).
#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]

mod sse {
    pub(crate) mod raw;
    pub(crate) mod readers;
    pub(crate) mod served;
}

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use fathom_benches::{argument, write_results};
use serde_json::{Map, Value, json};

use sse::readers::{Readings, Target, read_all};
use sse::{raw, served};

/// Most CPU time of the reactor per token event, in microseconds.
const TARGET_US: f64 = 10.0;
/// Least part of the raw limit's throughput.
const TARGET_OF_RAW: f64 = 0.5;
/// Most milliseconds between a token and its bytes, for 99 of 100.
const TARGET_GAP_MS: f64 = 5.0;

/// Name of the reactor's thread, whose CPU time is what is measured.
pub(crate) const REACTOR: &str = "bench-reactor";

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) n_streams: usize,
    /// Events of each stream.
    pub(crate) n_events: usize,
    /// Between two tokens of a stream, at least.
    pub(crate) tick: Duration,
}

fn main() -> ExitCode {
    let n_streams = argument("--streams").and_then(|n| n.parse().ok()).unwrap_or(1000);
    let tick = Duration::from_millis(10);
    let loads = [
        ("tick", Load { n_streams, n_events: 200, tick }),
        ("half", Load { n_streams: n_streams / 2, n_events: 200, tick }),
        ("flood", Load { n_streams, n_events: 1000, tick: Duration::ZERO }),
    ];
    let mut report = Map::new();
    let mut reached = true;
    for (name, load) in loads {
        let times = Arc::new(served::ReadyTimes::new(&load));
        let ours = served::run(&load, &times, |address| {
            read_all(&Target::Server { address }, &load, &times)
        });
        let times = Arc::new(served::ReadyTimes::new(&load));
        let raw = raw::run(&load, ours.bytes_per_event(), &times, |address| {
            read_all(&Target::Raw { address }, &load, &times)
        });
        let of_raw = raw.cpu_us_per_event() / ours.cpu_us_per_event();
        reached &= show(name, &load, &ours, &raw, of_raw);
        report.insert(name.into(), row(&load, &ours, &raw, of_raw));
    }
    write_results(&Value::Object(report));
    if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints a line; false if a target was missed.
fn show(name: &str, load: &Load, ours: &Readings, raw: &Readings, of_raw: f64) -> bool {
    let us = ours.cpu_us_per_event();
    println!(
        "{name:5} {:5} streams  {:7.0} events/s  {us:5.2} us CPU per event ({:7.0} per core and \
         second)  raw {:5.2} us at {:7.0} events/s: {of_raw:.2} of it",
        load.n_streams,
        ours.events_per_second(),
        1e6 / us,
        raw.cpu_us_per_event(),
        raw.events_per_second(),
    );
    println!(
        "      gap p50 {:.2} ms  p99 {:.2} ms  (raw {:.2} and {:.2})  {:.0} bytes per event  {:.1} \
         events per read",
        ours.gap_ms(50.0),
        ours.gap_ms(99.0),
        raw.gap_ms(50.0),
        raw.gap_ms(99.0),
        ours.bytes_per_event(),
        ours.events_per_read(),
    );
    match name {
        "flood" => us <= TARGET_US,
        "half" => of_raw >= TARGET_OF_RAW && ours.gap_ms(99.0) <= TARGET_GAP_MS,
        _ => of_raw >= TARGET_OF_RAW,
    }
}

fn row(load: &Load, ours: &Readings, raw: &Readings, of_raw: f64) -> Value {
    json!({
        "streams": load.n_streams, "events": ours.n_events(), "tick_ms": load.tick.as_millis(),
        "events_per_s": ours.events_per_second(), "cpu_us_per_event": ours.cpu_us_per_event(),
        "raw_events_per_s": raw.events_per_second(),
        "raw_cpu_us_per_event": raw.cpu_us_per_event(), "of_raw": of_raw,
        "gap_p50_ms": ours.gap_ms(50.0), "gap_p99_ms": ours.gap_ms(99.0),
        "raw_gap_p50_ms": raw.gap_ms(50.0), "raw_gap_p99_ms": raw.gap_ms(99.0),
        "bytes_per_event": ours.bytes_per_event(), "events_per_read": ours.events_per_read(),
    })
}
