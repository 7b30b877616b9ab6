//! Two promises that need no grammar: no tool call where none is allowed, and a bounded reasoning.
//!
//! A [`Guard`] takes single tokens away from the sampler, or leaves it only one. Not here: schemas
//! and forced calls, which need constrained decoding.

use fathom_core::{ConstraintError, TokenConstraint, TokenId};

/// Which tokens a request may not sample.
pub(crate) struct Guard {
    banned: Vec<TokenId>,
    budget: Option<Budget>,
}

struct Budget {
    tokens_left: u32,
    /// Ends the reasoning: forced when nothing is left.
    think_end: TokenId,
    /// Opens a tool call, which ends the reasoning too.
    dsml: TokenId,
}

impl Guard {
    /// A guard that takes nothing away.
    pub(crate) const fn new() -> Self {
        Self { banned: Vec::new(), budget: None }
    }

    /// Never lets `token` be sampled.
    pub(crate) fn ban(mut self, token: TokenId) -> Self {
        self.banned.push(token);
        self
    }

    /// Forces `think_end` after `tokens` tokens of reasoning.
    pub(crate) const fn limit_reasoning(
        mut self,
        tokens: u32,
        think_end: TokenId,
        dsml: TokenId,
    ) -> Self {
        self.budget = Some(Budget { tokens_left: tokens, think_end, dsml });
        self
    }

    /// The guard as the engine takes it, unless it would do nothing.
    pub(crate) fn into_constraint(self) -> Option<Box<dyn TokenConstraint>> {
        let idle = self.banned.is_empty() && self.budget.is_none();
        if idle { None } else { Some(Box::new(self)) }
    }
}

impl TokenConstraint for Guard {
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        if let Some(Budget { tokens_left: 0, think_end, .. }) = self.budget {
            mask.fill(0);
            let word = mask.get_mut(think_end as usize / 32);
            *word.ok_or_else(|| outside(think_end))? |= 1 << (think_end % 32);
            return Ok(());
        }
        for &token in &self.banned {
            let word = mask.get_mut(token as usize / 32);
            *word.ok_or_else(|| outside(token))? &= !(1 << (token % 32));
        }
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        if let Some(budget) = &mut self.budget {
            if token == budget.think_end || token == budget.dsml {
                self.budget = None;
            } else {
                budget.tokens_left = budget.tokens_left.saturating_sub(1);
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        false
    }
}

fn outside(token: TokenId) -> ConstraintError {
    ConstraintError(format!("token {token} is outside the vocabulary"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(guard: &mut Guard) -> Vec<TokenId> {
        let mut mask = [u32::MAX; 2];
        guard.fill_mask(&mut mask).unwrap();
        (0..64).filter(|&token| mask[token as usize / 32] >> (token % 32) & 1 == 1).collect()
    }

    #[test]
    fn a_banned_token_is_never_allowed() {
        let mut guard = Guard::new().ban(33);
        for token in [1, 2] {
            assert_eq!(allowed(&mut guard).len(), 63);
            assert!(!allowed(&mut guard).contains(&33));
            guard.commit(token).unwrap();
        }
    }

    #[test]
    fn reasoning_ends_when_its_budget_does() {
        let mut guard = Guard::new().limit_reasoning(2, 40, 41);
        for token in [5, 6] {
            assert_eq!(allowed(&mut guard).len(), 64);
            guard.commit(token).unwrap();
        }
        assert_eq!(allowed(&mut guard), [40]);
        guard.commit(40).unwrap();
        assert_eq!(allowed(&mut guard).len(), 64);
    }

    #[test]
    fn reasoning_that_ended_early_has_no_budget_left_to_enforce() {
        for end in [40, 41] {
            let mut guard = Guard::new().limit_reasoning(1, 40, 41);
            guard.commit(end).unwrap();
            guard.commit(7).unwrap();
            assert_eq!(allowed(&mut guard).len(), 64);
        }
    }
}
