//! Which tokens may not come next: grammar, and no early end.
//!
//! A forbidden token's logit becomes negative infinity.

use fathom_core::{ConstraintError, TokenConstraint, TokenId};

/// Forbids what the constraint does not allow. `logits` is `[vocab_size]`; `mask` is memory to
/// reuse. A finished constraint allows `eos` only.
///
/// # Errors
/// What the constraint reports.
pub fn apply_constraint(
    constraint: &mut dyn TokenConstraint,
    eos: &[TokenId],
    mask: &mut Vec<u32>,
    logits: &mut [f32],
) -> Result<(), ConstraintError> {
    mask.clear();
    if constraint.is_finished() {
        mask.resize(logits.len().div_ceil(32), 0);
        for &token in eos {
            if let Some(word) = mask.get_mut(token as usize / 32) {
                *word |= 1 << (token % 32);
            }
        }
    } else {
        mask.resize(logits.len().div_ceil(32), u32::MAX);
        constraint.fill_mask(mask)?;
    }
    for (logits, &word) in logits.chunks_mut(32).zip(mask.iter()) {
        if word == 0 {
            logits.fill(f32::NEG_INFINITY);
        } else if word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
    Ok(())
}

/// Forbids single tokens.
pub fn forbid(tokens: &[TokenId], logits: &mut [f32]) {
    for &token in tokens {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Even {
        finished: bool,
    }

    impl TokenConstraint for Even {
        fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
            for word in mask {
                *word &= 0x5555_5555;
            }
            Ok(())
        }

        fn commit(&mut self, _: TokenId) -> Result<(), ConstraintError> {
            Ok(())
        }

        fn is_finished(&self) -> bool {
            self.finished
        }
    }

    fn allowed(finished: bool) -> Vec<usize> {
        let mut logits = vec![0.0; 37];
        apply_constraint(&mut Even { finished }, &[35], &mut Vec::new(), &mut logits).unwrap();
        (0..logits.len()).filter(|&token| logits[token] == 0.0).collect()
    }

    #[test]
    fn a_constraint_decides_every_token_of_an_odd_sized_vocabulary() {
        assert_eq!(allowed(false), (0..37).step_by(2).collect::<Vec<_>>());
    }

    #[test]
    fn a_finished_constraint_allows_the_end_only() {
        assert_eq!(allowed(true), [35]);
    }
}
