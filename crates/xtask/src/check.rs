//! `cargo xtask check`: exactly what CI runs, every step even after a failure.
//!
//! The last line is always `N passed, M failed`: tests of all kinds added up, a step without
//! tests of its own (format, clippy, tidy) counting as one failure if it fails.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::workspace::{SEED, Workspace, succeeds, watched};
use crate::{e2e, kernels, tidy};

/// How many tests ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TestCounts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

impl TestCounts {
    /// Adds the counts of a closing line of nextest, `cargo test` or one of our scripts.
    ///
    /// What a failed test printed, its own closing line too, nextest shows indented: not counted.
    pub(crate) fn note(&mut self, line: &str) {
        let line = without_colours(line);
        let line = line.trim_end();
        let closing = line.trim_start().starts_with("Summary [")
            || line.starts_with("test result: ")
            || (line.ends_with(" failed") && !line.starts_with(' '));
        let Some(counts) = closing.then(|| counts_in(line)).flatten() else { return };
        self.passed += counts.passed;
        self.failed += counts.failed;
    }

    /// These counts, with at least one failure unless the step succeeded.
    pub(crate) const fn or_failed(mut self, success: bool) -> Self {
        if !success && self.failed == 0 {
            self.failed = 1;
        }
        self
    }
}

/// `12 passed` and `3 failed` in a closing line; a test that timed out failed.
fn counts_in(line: &str) -> Option<TestCounts> {
    let words: Vec<&str> =
        line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let number_before = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
    };
    let passed = number_before("passed")?;
    let timed_out = words.windows(3).find(|w| w[1] == "timed" && w[2] == "out");
    let timed_out = timed_out.and_then(|w| w[0].parse().ok()).unwrap_or(0);
    Some(TestCounts { passed, failed: number_before("failed").unwrap_or(0) + timed_out })
}

/// `line` without terminal colour sequences.
fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            chars.by_ref().find(char::is_ascii_alphabetic);
        } else {
            plain.push(c);
        }
    }
    plain
}

/// Counts of a step, or `None` if it could not run on this machine.
type Ran = Option<TestCounts>;

/// NVIDIA publishes it for Linux.
const HAS_KERNEL_COMPILER: bool = cfg!(target_os = "linux");

struct Outcome {
    name: &'static str,
    ran: Ran,
    took: Duration,
}

/// Runs every step; `true` if all succeeded.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let mut outcomes = Vec::new();
    let mut step = |name: &'static str, run: &mut dyn FnMut() -> Result<Ran>| {
        println!("\n==== {name}");
        let start = Instant::now();
        let ran = run().unwrap_or_else(|error| {
            println!("error: {error:#}");
            Some(TestCounts { passed: 0, failed: 1 })
        });
        outcomes.push(Outcome { name, ran, took: start.elapsed() });
    };
    let cargo = |args: &[&str]| -> Result<Ran> {
        Ok(Some(TestCounts::default().or_failed(succeeds(workspace.cargo().args(args))?)))
    };
    let counted = |args: &[&str]| -> Result<Ran> {
        let mut counts = TestCounts::default();
        let seed = workspace.seed();
        println!("random cases of {SEED}={seed}");
        let mut command = workspace.cargo();
        let success = watched(command.args(args).env(SEED, seed), |line| counts.note(line))?;
        Ok(Some(counts.or_failed(success)))
    };

    step("tidy", &mut || Ok(Some(TestCounts::default().or_failed(tidy::run(workspace)?))));
    step("format", &mut || cargo(&["fmt", "--all", "--check"]));
    step("clippy", &mut || {
        cargo(&["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])
    });
    // Before the tests: those on the emulated driver hold every launch against this machine code.
    step("kernels", &mut || {
        if !HAS_KERNEL_COMPILER {
            println!("there is no kernel compiler for this platform: skipped");
            return Ok(None);
        }
        ensure!(
            succeeds(workspace.command("bash").arg("scripts/setup-cuda.sh"))?,
            "the kernel compiler cannot be installed: `scripts/setup-cuda.sh` says why above"
        );
        let checks = kernels::run(workspace, &["--check".to_owned()])?;
        Ok(Some(TestCounts::default().or_failed(checks)))
    });
    step("tests", &mut || {
        if workspace.has_cargo_command("nextest") {
            counted(&["nextest", "run", "--locked", "--workspace"])
        } else {
            let targets = ["--lib", "--bins", "--tests"];
            counted(
                &[&["test", "--locked", "--workspace", "--no-fail-fast"], &targets[..]].concat(),
            )
        }
    });
    step("doctests", &mut || counted(&["test", "--locked", "--workspace", "--doc"]));
    step("licences and sources", &mut || {
        if workspace.has_cargo_command("deny") {
            cargo(&["deny", "--locked", "check", "bans", "licenses", "sources"])
        } else {
            println!("cargo-deny is not installed: skipped");
            Ok(None)
        }
    });
    step("end to end", &mut || e2e::run(workspace, &workspace.tested_fathom()?, None).map(Some));
    step("soak", &mut || e2e::soak(workspace, &workspace.tested_fathom()?).map(Some));
    step("peer scripts", &mut || e2e::peers(workspace, &workspace.tested_fathom()?).map(Some));

    Ok(report(&outcomes))
}

const fn verdict(ran: Ran) -> &'static str {
    match ran {
        None => "SKIPPED",
        Some(TestCounts { failed: 0, .. }) => "ok",
        Some(_) => "FAILED",
    }
}

fn report(outcomes: &[Outcome]) -> bool {
    println!();
    let mut total = TestCounts::default();
    for Outcome { name, ran, took } in outcomes {
        println!("{name:<22}{:<8}{:>7.1} s", verdict(*ran), took.as_secs_f64());
        let counts = ran.unwrap_or_default();
        total.passed += counts.passed;
        total.failed += counts.failed;
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    total.failed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(lines: &[&str]) -> (usize, usize) {
        let mut counts = TestCounts::default();
        lines.iter().for_each(|line| counts.note(line));
        (counts.passed, counts.failed)
    }

    #[test]
    fn closing_lines_of_every_runner_are_understood() {
        let nextest =
            "     Summary [   1.513s] 38 tests run: 35 passed, 2 failed, 1 timed out, 4 skipped";
        assert_eq!(counts(&[nextest]), (35, 3));
        let libtest = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out";
        assert_eq!(counts(&[libtest, libtest]), (6, 0));
        assert_eq!(counts(&["9 passed, 0 failed"]), (9, 0));
        let coloured = "\u{1b}[32;1m     Summary\u{1b}[0m [   0.1s] \u{1b}[1m2\u{1b}[0m tests run: \u{1b}[1m2\u{1b}[0m passed";
        assert_eq!(counts(&[coloured]), (2, 0));
    }

    #[test]
    fn a_failed_tests_own_closing_line_is_not_counted_beside_nextests() {
        let own =
            "    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 9 filtered out";
        let summary = "     Summary [   0.1s] 4 tests run: 3 passed, 1 failed, 0 skipped";
        assert_eq!(counts(&[own, own, "    2 passed, 1 failed", summary]), (3, 1));
    }

    #[test]
    fn other_lines_are_not_counted() {
        assert_eq!(counts(&["PASS [0.1s] 3 passed", "the step failed", "1 passed"]), (0, 0));
    }

    #[test]
    fn a_step_that_did_not_run_is_no_success() {
        assert_eq!(verdict(None), "SKIPPED");
        assert_eq!(verdict(Some(TestCounts::default())), "ok");
        assert_eq!(verdict(Some(TestCounts { passed: 3, failed: 1 })), "FAILED");
    }

    #[test]
    fn a_step_that_failed_without_counting_tests_is_one_failure() {
        assert_eq!(TestCounts::default().or_failed(false).failed, 1);
        assert_eq!(TestCounts { passed: 1, failed: 4 }.or_failed(false).failed, 4);
        assert_eq!(TestCounts { passed: 1, failed: 0 }.or_failed(true).failed, 0);
    }
}
