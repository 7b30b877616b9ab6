//! The kernels of a device against the CPU operators: one list of cases for `fathom device-check` on a
//! GPU and, with small sizes, for the block emulator in CI.
//!
//! A case runs the same operators on both sides with random inputs and compares. Device memory is
//! poisoned when it is given out ([`Poisoned`]), so what a kernel forgets to write shows. At the real
//! sizes of Flash and Pro the device computes all rows and the CPU a few of them: a row's result does
//! not depend on the others. Beside that all rows are compared with plain kernels (`plain`), which small
//! sizes compare with the CPU, and some hundred outputs with f64 (`exact`).
//!
//! - `wrappers`: what kernels call beside plain C++, one by one;
//! - `formats`: number formats, exhaustively; `pieces`: other functions that kernels share; `copies`: tensor
//!   copies; `parts`: products; `hyper`: hyper-connections and head; `experts`; `layers`: attention over a cache;
//!   `selecting`: entries of a long context; `choosing`: sampling; `random`: inputs;
//! - [`bench`]: how long the hot operators take.
//!
//! Not here: a whole model (`fathom device-check`), the emulator's own tests.

pub mod bench;
mod choosing;
mod copies;
mod exact;
mod experts;
mod formats;
mod hyper;
mod layers;
mod parts;
mod pieces;
mod plain;
mod poison;
mod random;
mod selecting;
mod wrappers;

use std::sync::Arc;

pub use poison::Poisoned;
use random::Random;

use super::device::Device;
use super::ops::CudaOps;
use crate::{Activations, OpError};

/// How large a case is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Ragged shapes that the emulator runs in a second.
    Small,
    /// Dimensions of Flash and Pro.
    Real,
}

/// Two results that should agree.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// What was compared, with its shape.
    pub what: String,
    /// Largest difference relative to the largest expected magnitude, or the share of values that
    /// differ where single values may.
    pub error: f64,
    /// What it may be.
    pub limit: f64,
}

impl Comparison {
    /// Whether it is within the limit; NaN is not.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.error <= self.limit
    }
}

/// One group of kernels.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    run: fn(&mut Report<'_>) -> Result<(), OpError>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

/// All cases, in the order in which a failure is easiest to understand.
pub const CASES: [Case; 12] = [
    Case { name: "wrappers", run: wrappers::wrappers },
    Case { name: "number formats", run: formats::formats },
    Case { name: "shared functions", run: pieces::pieces },
    Case { name: "linear", run: parts::linear },
    Case { name: "hyper-connections and head", run: hyper::hyper_connections },
    Case { name: "experts, FP4", run: experts::experts_fp4 },
    Case { name: "experts, FP8", run: experts::experts_fp8 },
    Case { name: "attention, window", run: layers::window },
    Case { name: "attention, ratio 4", run: layers::csa },
    Case { name: "attention, ratio 128", run: layers::hca },
    Case { name: "choosing entries", run: selecting::selecting },
    Case { name: "choosing tokens", run: choosing::choosing },
];

impl Case {
    /// Whether it runs operators, of which architectures have variants.
    #[must_use]
    pub fn uses_operators(&self) -> bool {
        !matches!(self.name, "wrappers" | "number formats" | "shared functions")
    }

    /// Runs the case with inputs of `seed` on `device`.
    ///
    /// # Errors
    /// What an operator fails with.
    pub fn run(
        &self,
        device: &Arc<dyn Device>,
        activations: Activations,
        size: Size,
        seed: u64,
    ) -> Result<Vec<Comparison>, OpError> {
        let device: Arc<dyn Device> = Arc::new(Poisoned::new(Arc::clone(device)));
        let ops = CudaOps::new(device, activations);
        let mut report = Report { ops: &ops, size, random: Random::new(seed), found: Vec::new() };
        (self.run)(&mut report)?;
        Ok(report.found)
    }
}

/// A case that runs.
struct Report<'a> {
    ops: &'a CudaOps,
    size: Size,
    random: Random,
    found: Vec<Comparison>,
}

/// One rounding to bf16, of values up to the largest.
const BF16_STEP: f64 = 1.0 / 128.0;

impl Report<'_> {
    /// Compares values; `limit` is relative to the largest expected magnitude.
    fn close(&mut self, what: impl Into<String>, got: &[f32], expected: &[f32], limit: f64) {
        let error = max_error(got, expected);
        self.found.push(Comparison { what: what.into(), error, limit });
    }

    /// Compares values of which a share of `limit` may differ.
    fn mostly_equal<T: PartialEq>(
        &mut self,
        what: impl Into<String>,
        got: &[T],
        expected: &[T],
        limit: f64,
    ) {
        let n_wrong = got.iter().zip(expected).filter(|(a, b)| a != b).count();
        let error = if got.len() == expected.len() {
            n_wrong as f64 / expected.len().max(1) as f64
        } else {
            f64::INFINITY
        };
        self.found.push(Comparison { what: what.into(), error, limit });
    }
}

/// Largest difference as a share of the largest expected magnitude; infinite where NaN comes in.
fn max_error(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(expected).fold(0.0_f64, |worst, (&g, &e)| {
        let difference = if g == e { 0.0 } else { (f64::from(g) - f64::from(e)).abs() };
        if difference.is_nan() { f64::INFINITY } else { worst.max(difference) }
    });
    worst / f64::from(largest)
}

/// Rows `rows` of `[_, cols]` values.
fn pick(values: &[f32], cols: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|&row| &values[row * cols..(row + 1) * cols]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_largest_value_and_nan_never_passes() {
        assert_eq!(max_error(&[1.0, 4.0], &[1.0, 5.0]), 0.2);
        for wrong in [&[f32::NAN, 0.0][..], &[0.0][..]] {
            let error = max_error(wrong, &[0.0, 0.0]);
            assert!(!Comparison { what: String::new(), error, limit: 1e9 }.passes());
        }
        assert_eq!(pick(&[1.0, 2.0, 3.0, 4.0], 2, &[1]), [3.0, 4.0]);
    }
}
