//! Which tokens a constraint allows next, as one bit per token.

use fathom_core::{ConstraintError, TokenConstraint, TokenId};

/// Fills `mask` with the tokens that may come next, of `vocab_size`. A finished constraint allows
/// `eos` only.
///
/// # Errors
/// What the constraint reports.
pub fn fill_mask(
    constraint: &mut dyn TokenConstraint,
    eos: &[TokenId],
    vocab_size: usize,
    mask: &mut Vec<u32>,
) -> Result<(), ConstraintError> {
    let n_words = vocab_size.div_ceil(32);
    mask.clear();
    if constraint.is_finished() {
        mask.resize(n_words, 0);
        for &token in eos {
            if let Some(word) = mask.get_mut(token as usize / 32) {
                *word |= 1 << (token % 32);
            }
        }
        Ok(())
    } else {
        mask.resize(n_words, u32::MAX);
        constraint.fill_mask(mask)
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

    #[test]
    fn a_finished_constraint_allows_the_end_only() {
        let mut mask = Vec::new();
        fill_mask(&mut Even { finished: false }, &[35], 37, &mut mask).unwrap();
        assert_eq!(mask, [0x5555_5555; 2]);
        fill_mask(&mut Even { finished: true }, &[35], 37, &mut mask).unwrap();
        assert_eq!(mask, [0, 1 << 3]);
    }
}
