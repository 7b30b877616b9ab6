//! `fathom device-check`: whether a GPU computes what the CPU operators define.
//!
//! Self-contained: the binary and a driver are all it needs, so it can be copied to a GPU machine.
//! Runs every case of [`fathom_ops::cuda::check`], then the embedded model as a whole ([`model`]). A GPU with
//! kernels of its own also runs those of sm_80, as an A100 would: it may be the only GPU at hand.
//! Prints a table, writes JSON beside it, exits with 1 if anything is outside of its limit. The same
//! cases run under compute-sanitizer with `--sanitize` ([`sanitize`]).
//!
//! Not yet run on a GPU; CI runs it on the block emulator, with small sizes.

mod model;
mod sanitize;
mod sets;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fathom_ops::cuda::check::{CASES, Comparison, Size};
use fathom_ops::cuda::gpu::{archs_for, gpus};
use serde_json::{Value, json};

use crate::gpu::{self, DeviceChoice, Gpu};

/// Arguments of `fathom device-check`.
#[derive(Debug, clap::Args)]
pub(crate) struct DeviceCheckArgs {
    /// Leave out the sizes of the released models; what the block emulator can do
    #[arg(long)]
    small: bool,
    /// Run only cases whose name contains this
    #[arg(long, value_name = "NAME", default_value = "")]
    only: String,
    /// Print the names of all cases and run none
    #[arg(long)]
    list: bool,
    /// Run the cases, with small sizes, under each tool of NVIDIA's compute-sanitizer
    #[arg(long, conflicts_with_all = ["list", "goldens"])]
    sanitize: bool,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder with the golden files of the embedded model (`models/nano/goldens`), to compare with the
    /// official code too
    #[arg(long, value_name = "DIR")]
    goldens: Option<PathBuf>,
    /// Write the results as JSON to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// One line of the table.
struct Outcome {
    name: String,
    comparisons: Vec<Comparison>,
    /// Why the case did not run to its end.
    failure: Option<String>,
    seconds: f64,
}

impl Outcome {
    fn run(name: String, case: impl FnOnce() -> Result<Vec<Comparison>>) -> Self {
        let start = Instant::now();
        let (comparisons, failure) = match case() {
            Ok(comparisons) => (comparisons, None),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        Self { name, comparisons, failure, seconds: start.elapsed().as_secs_f64() }
    }

    fn passes(&self) -> bool {
        self.failure.is_none()
            && !self.comparisons.is_empty()
            && self.comparisons.iter().all(Comparison::passes)
    }

    /// The comparison that is closest to its limit, or furthest beyond it.
    fn worst(&self) -> Option<&Comparison> {
        let share = |c: &Comparison| if c.error == 0.0 { 0.0 } else { c.error / c.limit };
        self.comparisons.iter().max_by(|a, b| share(a).total_cmp(&share(b)))
    }

    fn line(&self) -> String {
        let verdict = if self.passes() { "ok" } else { "FAILED" };
        let n = self.comparisons.len();
        let mut line =
            format!("{verdict:<7}{:<44}{n:>4} values {:>7.1} s", self.name, self.seconds);
        if let Some(failure) = &self.failure {
            line += &format!("\n       {failure}");
        } else if let Some(worst) = self.worst() {
            line += &format!("  worst {:.1e} of {:.1e}: {}", worst.error, worst.limit, worst.what);
        }
        for failed in self.comparisons.iter().filter(|c| !c.passes()) {
            line += &format!(
                "\n       {}: {:.3e}, limit {:.1e}",
                failed.what, failed.error, failed.limit
            );
        }
        line
    }

    fn json(&self) -> Value {
        let comparison = |c: &Comparison| {
            json!({
                "what": c.what,
                // JSON has no infinity.
                "error": if c.error.is_finite() { json!(c.error) } else { json!("not a number") },
                "limit": c.limit,
                "passes": c.passes(),
            })
        };
        json!({
            "name": self.name,
            "passes": self.passes(),
            "failure": self.failure,
            "seconds": self.seconds,
            "comparisons": self.comparisons.iter().map(comparison).collect::<Vec<_>>(),
        })
    }
}

/// Runs everything that is asked for.
///
/// # Errors
/// If there is no device, or something is outside of its limit, after everything was printed.
pub(crate) fn run(args: &DeviceCheckArgs) -> Result<()> {
    if args.list {
        names(lists_ampere()).iter().for_each(|name| println!("{name}"));
        return Ok(());
    }
    if args.sanitize {
        return sanitize::run(args);
    }
    crate::threads::use_for_compute(None)?;
    let gpu = gpu::open(DeviceChoice::Cuda)?.context("there is no device to check")?;
    println!("{}", gpu.about);
    let sizes: &[Size] = if args.small { &[Size::Small] } else { &[Size::Small, Size::Real] };
    let mut outcomes = Vec::new();
    let mut note = |outcome: Outcome| {
        println!("{}", outcome.line());
        outcomes.push(outcome);
    };
    for &size in sizes {
        for case in CASES.iter().filter(|case| case.name.contains(&args.only)) {
            let name =
                format!("{}, {}", case.name, if size == Size::Small { "small" } else { "real" });
            note(Outcome::run(name, || {
                Ok(case.run(&gpu.device, gpu.activations, size, args.seed)?)
            }));
        }
    }
    for part in model::PARTS.iter().filter(|part| part.name.contains(&args.only)) {
        note(Outcome::run(part.name.to_owned(), || (part.run)(&gpu, args.small)));
    }
    if let Some(gpu) = gpu.as_ampere() {
        let cases = CASES.iter().filter(|case| case.uses_operators());
        for case in cases.filter(|case| of_ampere(case.name).contains(&args.only)) {
            note(Outcome::run(of_ampere(case.name), || {
                Ok(case.run(&gpu.device, gpu.activations, Size::Small, args.seed)?)
            }));
        }
        let part = &model::PARTS[0];
        if of_ampere(part.name).contains(&args.only) {
            note(Outcome::run(of_ampere(part.name), || (part.run)(&gpu, true)));
        }
    }
    if let Some(folder) = &args.goldens {
        note(Outcome::run("nano, goldens of the official code".to_owned(), || {
            model::goldens(&gpu, folder, args.small)
        }));
    }
    report(&gpu, args, &outcomes)
}

/// What a case is called that runs with the kernels of sm_80 on another GPU.
fn of_ampere(name: &str) -> String {
    format!("{name}, kernels of sm_80")
}

/// The names of all cases, with those of the kernels of sm_80 on another GPU or without.
fn names(with_ampere: bool) -> Vec<String> {
    let cases = CASES.iter().map(|case| case.name);
    let mut names: Vec<String> =
        cases.chain(model::PARTS.iter().map(|part| part.name)).map(str::to_owned).collect();
    if with_ampere {
        let cases = CASES.iter().filter(|case| case.uses_operators()).map(|case| case.name);
        names.extend(cases.chain([model::PARTS[0].name]).map(of_ampere));
    }
    names
}

/// Whether the GPU has kernels of its own; where there is none to ask, yes.
fn lists_ampere() -> bool {
    let archs = gpus().ok().and_then(|gpus| {
        let (major, minor) = gpus.first()?.capability;
        Some(archs_for(major, minor))
    });
    archs.is_none_or(|archs| archs.iter().any(|arch| gpu::has_kernels_of_its_own(arch)))
}

fn report(gpu: &Gpu, args: &DeviceCheckArgs, outcomes: &[Outcome]) -> Result<()> {
    ensure!(!outcomes.is_empty(), "no case is called `{}`", args.only);
    let n_failed = outcomes.iter().filter(|outcome| !outcome.passes()).count();
    let seconds: f64 = outcomes.iter().map(|outcome| outcome.seconds).sum();
    println!("{} passed, {n_failed} failed in {seconds:.1} s", outcomes.len() - n_failed);
    if let Some(file) = &args.out {
        let result = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": gpu.about,
            "activations": format!("{:?}", gpu.activations),
            "seed": args.seed,
            "cases": outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
        });
        write_json(file, &result)?;
    }
    ensure!(n_failed == 0, "{n_failed} of {} cases failed", outcomes.len());
    Ok(())
}

fn write_json(file: &Path, result: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(result)? + "\n";
    std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison(error: f64, limit: f64) -> Comparison {
        Comparison { what: format!("{error} of {limit}"), error, limit }
    }

    fn outcome(comparisons: Vec<Comparison>) -> Outcome {
        Outcome::run("case".to_owned(), || Ok(comparisons))
    }

    #[test]
    fn cases_with_the_kernels_of_sm_80_are_listed_where_they_run() {
        let (own, all) = (names(false), names(true));
        assert_eq!(all[..own.len()], own);
        // All but three kinds of cases, and one part of the model.
        assert_eq!(all.len(), own.len() + CASES.len() - 3 + 1);
        assert!(all.contains(&"experts, FP4, kernels of sm_80".to_owned()), "{all:?}");
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
    }

    #[test]
    fn a_case_passes_only_if_it_compared_something_and_all_of_it_is_close() {
        assert!(outcome(vec![comparison(0.0, 0.0), comparison(0.1, 0.2)]).passes());
        assert!(!outcome(vec![]).passes());
        assert!(!outcome(vec![comparison(0.3, 0.2)]).passes());
        assert!(!outcome(vec![comparison(f64::NAN, 0.2)]).passes());
        assert!(!Outcome::run("case".to_owned(), || anyhow::bail!("no memory")).passes());
    }

    #[test]
    fn the_table_names_the_worst_value_and_every_one_that_failed() {
        let outcome =
            outcome(vec![comparison(0.1, 0.2), comparison(0.3, 0.2), comparison(9.0, 10.0)]);
        let line = outcome.line();
        assert!(line.starts_with("FAILED") && line.contains("0.3 of 0.2: 3.000e-1"), "{line}");
        assert_eq!(outcome.worst().unwrap().error, 0.3);
        let broken = Outcome::run("case".to_owned(), || anyhow::bail!("no memory"));
        assert!(broken.line().contains("no memory"));
        assert_eq!(outcome.json()["comparisons"][1]["passes"], false);
    }
}
