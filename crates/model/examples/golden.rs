//! Prints how far the model is from every golden of the official code: `cargo xtask golden`.
//!
//! Arguments choose what to run (`f32`, `f32qat`, `bf16`, `long`, `batches`, `drafts`); all of it without any. Exits
//! with 1 if a limit of `tolerances.json` is broken.
#![expect(clippy::print_stdout, reason = "the table is the purpose")]
#![expect(clippy::unwrap_used, reason = "shares the code of the tests")]

#[path = "../tests/golden/mod.rs"]
mod golden;

use std::process::ExitCode;

use fathom_core::Numerics;
use golden::compare::Checker;
use golden::{check_mode, long};

/// A part of the table: its name on the command line and what it runs.
type Part = (&'static str, fn() -> Checker);

const PARTS: [Part; 6] = [
    ("f32", || check_mode(Numerics::F32)),
    ("f32qat", || check_mode(Numerics::F32Qat)),
    ("bf16", || check_mode(Numerics::Bf16)),
    ("long", long::check_long_prompts),
    ("batches", long::check_batches),
    ("drafts", long::check_drafts),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|arg| PARTS.iter().all(|(name, _)| name != arg)) {
        let names = PARTS.map(|(name, _)| name).join(", ");
        eprintln!("unknown part `{unknown}`: expected some of {names}");
        return ExitCode::FAILURE;
    }
    println!(
        "{:<7} {:>5}  {:<22} {:>6}  {:>8} {:>8} {:>8}",
        "part", "cases", "relL2 of", "values", "worst", "median", "p95"
    );
    let mut n_findings = 0;
    for (name, check) in PARTS {
        if wanted.is_empty() || wanted.iter().any(|arg| arg == name) {
            let checker = check();
            println!("{checker}");
            for finding in &checker.findings {
                println!("  {finding}");
            }
            n_findings += checker.findings.len();
        }
    }
    if n_findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
