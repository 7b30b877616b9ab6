//! Developer tasks, run as `cargo xtask TASK`.
//!
//! - `check`: exactly what CI runs;
//! - `tidy`: the rules of this repository that no compiler knows;
//! - `golden`: the model against the official numbers;
//! - `bench NAME`: one benchmark;
//! - `fuzz`: real fuzzing, which needs nightly;
//! - `image`: the build steps of the container image;
//! - `kernels`: every CUDA kernel for every architecture;
//! - `device-check`: a GPU against the CPU operators.
//!
//! Not here: anything a user of the server needs; that is the `fathom` binary.
#![expect(clippy::print_stdout, reason = "printing is what a developer task does")]

mod bench;
mod check;
mod device_check;
mod e2e;
mod fuzz;
mod golden;
mod kernels;
mod node;
mod python;
mod tidy;
mod workspace;

use std::process::ExitCode;

use workspace::Workspace;

const USAGE: &str = "\
usage: cargo xtask TASK

  check          what CI runs: tidy, format, clippy, tests, doctests, cargo deny, end to end
  tidy           file length, headers, names, crate edges, unsafe, unwrap
  e2e [NAME]     SDKs and agents' sessions against a freshly built server; NAME keeps to some
  golden [ARGS]  the model against the official numbers, as a table
  bench NAME     one benchmark; `cargo xtask bench` lists them
  image          the build steps of Dockerfile.cuda, without Docker
  fuzz [TARGET]... [--seconds N]
                 fuzz what comes from outside; needs nightly and cargo-fuzz
  kernels [--check] [--arch ARCH]
                 compile the CUDA kernels, report and check their machine code
  device-check [--bundle DIR] [ARGS]
                 a GPU against the CPU operators; with --bundle, what to copy to a GPU machine";

/// Whether there is a task of this name: one whose line the usage has.
fn has_task(task: &str) -> bool {
    USAGE
        .lines()
        .filter_map(|line| line.strip_prefix("  "))
        .any(|line| !line.starts_with(' ') && line.split_whitespace().next() == Some(task))
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let task = args.next();
    let rest: Vec<String> = args.collect();
    let result = Workspace::locate().and_then(|workspace| match task.as_deref() {
        Some("check") => check::run(&workspace),
        Some("tidy") => tidy::run(&workspace),
        Some("e2e") => {
            let only = rest.first().map(String::as_str);
            let tests =
                workspace.tested_fathom().and_then(|path| e2e::run(&workspace, &path, only));
            tests.map(|tests| tests.failed == 0)
        }
        Some("fuzz") => fuzz::run(&workspace, &rest),
        Some("golden") => golden::run(&workspace, &rest),
        Some("image") => e2e::image(&workspace),
        Some("bench") => bench::run(&workspace, &rest),
        Some("kernels") => kernels::run(&workspace, &rest),
        Some("device-check") => device_check::run(&workspace, &rest),
        _ => {
            println!("{USAGE}");
            Ok(matches!(task.as_deref(), Some("help" | "--help" | "-h")))
        }
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
