//! Drafts from the text itself ("prompt lookup"): what followed the last tokens before.
//!
//! Good where an answer repeats its prompt or itself: code that is edited, quotations, tables. It
//! costs next to nothing and needs no model. If the copied part reaches the end of the text it goes on
//! in the draft, so that a text of any short period is continued.
//!
//! Not here: whether drafts are worth running (`policy`).

use std::collections::HashMap;

use fathom_core::TokenId;
use fathom_ops::sample::Beside;
use fathom_scheduler::SequenceIndex;

use super::{DraftRequest, Drafter};
use crate::runner::{StepError, StepRunner};

/// Tokens that must have occurred before. Two are often a coincidence, four miss short repetitions.
const CONTEXT: usize = 3;

/// Tokens taken in per step at most: about a millisecond. A long prompt takes several steps.
const PER_STEP: usize = 16 * 1024;

type Context = [TokenId; CONTEXT];

/// Where each context of one sequence was followed by something last.
#[derive(Debug, Default)]
struct Index {
    /// Position after the context.
    follows: HashMap<Context, u32>,
    /// Contexts that end before this position are in.
    end: usize,
}

impl Index {
    /// Takes in the next contexts of `tokens`, but not the one at the end, which nothing has followed
    /// yet.
    fn extend(&mut self, tokens: &[TokenId]) {
        let until = tokens.len().min(self.end + PER_STEP);
        for end in self.end.max(CONTEXT)..until {
            if let Some(context) = tokens[..end].last_chunk::<CONTEXT>() {
                self.follows.insert(*context, end as u32);
            }
        }
        self.end = until;
    }

    /// Appends what followed the last tokens the last time, at most `most` tokens.
    fn copy(&self, tokens: &[TokenId], most: usize, draft: &mut Vec<TokenId>) {
        let Some(&start) = tokens.last_chunk().and_then(|context| self.follows.get(context)) else {
            return;
        };
        for position in (start as usize..).take(most) {
            let token = match position.checked_sub(tokens.len()) {
                None => tokens[position],
                Some(drafted) => draft[drafted],
            };
            draft.push(token);
        }
    }
}

/// Finds drafts in the sequences' own text.
#[derive(Debug, Default)]
pub struct NgramDrafter {
    /// By sequence index.
    indexes: Vec<Index>,
}

impl Drafter for NgramDrafter {
    fn draft(
        &mut self,
        requests: &[DraftRequest<'_>],
        _: &mut dyn StepRunner,
        drafts: &mut [Vec<TokenId>],
        _: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        for (request, draft) in requests.iter().zip(drafts) {
            let place = request.index as usize;
            if place >= self.indexes.len() {
                self.indexes.resize_with(place + 1, Index::default);
            }
            let index = &mut self.indexes[place];
            index.extend(request.tokens);
            index.copy(request.tokens, request.n_drafts as usize, draft);
        }
        Ok(())
    }

    fn end(&mut self, index: SequenceIndex) {
        if let Some(index) = self.indexes.get_mut(index as usize) {
            *index = Index::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The draft after `tokens`, which were taken in piece by piece of `step` tokens.
    fn draft(tokens: &[TokenId], step: usize, most: usize) -> Vec<TokenId> {
        let mut index = Index::default();
        for end in (1..=tokens.len()).filter(|end| end % step == 0 || *end == tokens.len()) {
            index.extend(&tokens[..end]);
        }
        let mut draft = Vec::new();
        index.copy(tokens, most, &mut draft);
        draft
    }

    #[test]
    fn what_followed_the_last_three_tokens_most_recently_is_copied() {
        let tokens = [1, 2, 3, 7, 8, 1, 2, 3, 9, 6, 5, 1, 2, 3];
        for step in [1, 2, 5, 100] {
            assert_eq!(draft(&tokens, step, 4), [9, 6, 5, 1]);
        }
        assert_eq!(draft(&tokens, 1, 1), [9]);
    }

    #[test]
    fn a_new_ending_has_no_draft() {
        assert!(draft(&[1, 2, 3, 4, 1, 2, 4], 1, 4).is_empty());
        assert!(draft(&[1, 2], 1, 4).is_empty());
        assert!(draft(&[1, 2, 3], 1, 4).is_empty());
    }

    #[test]
    fn a_long_prompt_is_taken_in_over_several_steps() {
        let mut tokens: Vec<TokenId> = (0..2 * PER_STEP as u32).collect();
        let newest = PER_STEP as u32 + 7;
        tokens.extend([newest, newest + 1, newest + 2]);
        let mut index = Index::default();
        for expected in [vec![], vec![newest + 3]] {
            index.extend(&tokens);
            let mut draft = Vec::new();
            index.copy(&tokens, 1, &mut draft);
            assert_eq!(draft, expected);
        }
    }

    #[test]
    fn a_short_period_is_continued_beyond_the_end_of_the_text() {
        assert_eq!(draft(&[5, 6, 5, 6, 5], 1, 6), [6, 5, 6, 5, 6, 5]);
        assert_eq!(draft(&[4; 4], 1, 3), [4; 3]);
    }
}
