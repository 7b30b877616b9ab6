//! Where the copies of a row are: in the tensor that a step has just made, or kept from before.
//!
//! An MTP block lags behind the model by the token that it needs, so some of its rows belong to the
//! current step and some to earlier ones. Which is which follows from positions alone.
//!
//! Not here: the bytes (each backend's cache).

use crate::Batch;

/// Source of one row of copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopiesAt {
    /// A row of the current step's tensor.
    Row(usize),
    /// Kept for a slot's position.
    Kept { slot: usize, position: usize },
}

/// Finds each row of `rows`.
pub(crate) fn locate(rows: &Batch, current: Option<&Batch>) -> Vec<CopiesAt> {
    let mut found = Vec::with_capacity(rows.n_tokens());
    // Both list their sequences in the same order if they come from one step: no search then.
    let mut candidates = current.map_or(&[][..], |batch| &batch.sequences).iter().cycle();
    let n_candidates = current.map_or(0, |batch| batch.sequences.len());
    for wanted in &rows.sequences {
        let now = candidates.by_ref().take(n_candidates).find(|of| of.slot == wanted.slot);
        found.extend(wanted.positions().map(|position| {
            let row = now.filter(|of| of.positions().contains(&position));
            row.map_or(CopiesAt::Kept { slot: wanted.slot as usize, position }, |of| {
                CopiesAt::Row(of.row as usize + position - of.position as usize)
            })
        }));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_in_the_current_step_if_its_slot_and_position_are() {
        let mut current = Batch::default();
        current.push(5, 100, &[1, 2, 3], &[0], false);
        current.push(2, 0, &[4], &[1], false);
        let mut rows = Batch::default();
        rows.push(2, 0, &[9], &[], false);
        rows.push(7, 101, &[9], &[], false);
        rows.push(5, 98, &[9; 4], &[], false);
        let kept = |slot, position| CopiesAt::Kept { slot, position };
        let expected = [
            CopiesAt::Row(3),
            kept(7, 101),
            kept(5, 98),
            kept(5, 99),
            CopiesAt::Row(0),
            CopiesAt::Row(1),
        ];
        assert_eq!(locate(&rows, Some(&current)), expected);
        assert_eq!(locate(&rows, None)[0], kept(2, 0));
    }
}
