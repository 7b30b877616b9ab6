//! Which experts and entries a model chose, row by row, against the sets of another run.
//!
//! The limits are those of `models/nano/goldens/tolerances.json` for the bf16 mode. Single sets cannot be asked
//! for: inputs that differ by one rounding change places in near-ties, and what was chosen once
//! changes every later layer's input. The cases of single operators compare sets of the same inputs.

use std::collections::{BTreeMap, BTreeSet};

use fathom_model::{Probe, Seen};
use fathom_ops::cuda::check::Comparison;
use fathom_ops::{OpError, Ops};

/// Share of rows whose experts may differ, and the mean share of entries that may.
const EXPERTS: f64 = 0.09;
const ENTRIES: f64 = 0.15;

/// Sets of each layer's rows, in the order of positions.
#[derive(Debug, Default)]
pub(super) struct Sets {
    pub(super) experts: BTreeMap<usize, Vec<BTreeSet<u32>>>,
    pub(super) entries: BTreeMap<usize, Vec<BTreeSet<u32>>>,
    n_rows: usize,
}

impl<O: Ops> Probe<O> for Sets {
    fn see(&mut self, ops: &O, layer: usize, seen: Seen<'_, O>) -> Result<(), OpError> {
        match seen {
            // Experts of these rows are seen next.
            Seen::FfnIn(x) => self.n_rows = ops.shape(x).0.max(1),
            Seen::Routing(routing) => {
                let (ids, _) = ops.read_routing(routing)?;
                let rows = ids.chunks((ids.len() / self.n_rows).max(1));
                let rows = rows.map(|ids| ids.iter().copied().collect());
                self.experts.entry(layer).or_default().extend(rows);
            }
            Seen::Selection(selection) => {
                let rows = ops.read_selection(selection)?;
                let rows = rows.into_iter().map(BTreeSet::from_iter);
                self.entries.entry(layer).or_default().extend(rows);
            }
            _ => {}
        }
        Ok(())
    }
}

/// How many sets agree.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    n_rows: usize,
    n_other: usize,
    /// Of each row with entries, the share that was chosen too.
    overlaps: Vec<f64>,
}

impl Agreement {
    /// Experts of some rows of a layer.
    pub(super) fn experts(&mut self, got: Option<&Vec<BTreeSet<u32>>>, expected: &[BTreeSet<u32>]) {
        self.n_rows += expected.len();
        let is_other = |(row, expected): &(usize, &BTreeSet<u32>)| {
            got.and_then(|got| got.get(*row)) != Some(expected)
        };
        self.n_other += expected.iter().enumerate().filter(is_other).count();
    }

    /// Entries of some rows of a layer.
    pub(super) fn entries(&mut self, got: Option<&Vec<BTreeSet<u32>>>, expected: &[BTreeSet<u32>]) {
        for (row, expected) in expected.iter().enumerate().filter(|(_, set)| !set.is_empty()) {
            let shared = got
                .and_then(|got| got.get(row))
                .map_or(0, |got| expected.intersection(got).count());
            self.overlaps.push(shared as f64 / expected.len() as f64);
        }
    }

    /// Everything of two runs.
    pub(super) fn runs(&mut self, got: &Sets, expected: &Sets) {
        for (layer, rows) in &expected.experts {
            self.experts(got.experts.get(layer), rows);
        }
        for (layer, rows) in &expected.entries {
            self.entries(got.entries.get(layer), rows);
        }
    }

    /// What may be said of all of them; sets of experts there must have been.
    pub(super) fn comparisons(&self, what: &str) -> Vec<Comparison> {
        let n_sets = self.overlaps.len();
        let missed = 1.0 - self.overlaps.iter().sum::<f64>() / n_sets.max(1) as f64;
        let mut found = vec![Comparison {
            what: format!("{what}: other experts in {} rows", self.n_rows),
            error: self.n_other as f64 / self.n_rows as f64,
            limit: EXPERTS,
        }];
        if n_sets > 0 {
            let what = format!("{what}: entries missed in {n_sets} rows");
            found.push(Comparison { what, error: missed, limit: ENTRIES });
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows<const N: usize>(sets: [&[u32]; N]) -> Vec<BTreeSet<u32>> {
        sets.into_iter().map(|set| set.iter().copied().collect()).collect()
    }

    #[test]
    fn shares_are_of_rows_for_experts_and_of_entries_for_selections() {
        let mut agreement = Agreement::default();
        let expected = rows([&[1, 2], &[3, 4], &[5, 6], &[7, 8]]);
        agreement.experts(Some(&rows([&[2, 1], &[3, 9], &[5, 6]])), &expected);
        // Rows that see no entry do not count.
        agreement.entries(Some(&rows([&[], &[0, 9]])), &rows([&[], &[0, 1]]));
        let errors: Vec<f64> = agreement.comparisons("").into_iter().map(|c| c.error).collect();
        assert_eq!(errors, [0.5, 0.5]);
        assert!(!Agreement::default().comparisons("")[0].passes());
    }
}
