//! Which turns show reasoning, and which `<think>` or `</think>` opens an answer.
//!
//! The model was trained with the reasoning of finished turns removed, unless tools are in play:
//! then it is kept everywhere. "Finished" is decided by one position, the pivot: reasoning after
//! it is shown.
//!
//! Not here: effort prompts (`EffortProfile::prompt`).

use super::history::Turn;
use crate::conversation::{Role, ThinkingMode};
use crate::special::Special;

/// The rules of one rendering.
#[derive(Debug, Clone, Copy)]
pub(super) struct ThinkingRules {
    mode: ThinkingMode,
    /// Index of the last turn that counts as asked; `None` keeps all reasoning.
    pivot: Option<isize>,
}

impl ThinkingRules {
    /// Reasoning is shown after turn `pivot` (-1 if there is no such turn), or everywhere if
    /// `drop` is off.
    pub(super) fn new(mode: ThinkingMode, drop: bool, pivot: isize) -> Self {
        Self { mode, pivot: drop.then_some(pivot) }
    }

    /// Whether the assistant turn at `index` shows its reasoning, so far as its place decides.
    pub(super) fn shows_reasoning(&self, index: usize) -> bool {
        self.mode == ThinkingMode::Thinking
            && self.pivot.is_none_or(|pivot| index.cast_signed() > pivot)
    }

    /// The token that opens the answer that is, or will be, the turn at `answer`.
    pub(super) fn opener(&self, answer: usize) -> Special {
        if self.shows_reasoning(answer) { Special::ThinkStart } else { Special::ThinkEnd }
    }

    /// The token that opens a task's answer, wherever it stands.
    pub(super) fn task_opener(&self) -> Special {
        match self.mode {
            ThinkingMode::Thinking => Special::ThinkStart,
            ThinkingMode::Chat => Special::ThinkEnd,
        }
    }
}

/// Index of the last user or developer turn, -1 if there is none.
pub(super) fn last_asked(turns: &[Turn]) -> isize {
    let last = turns.iter().rposition(|turn| matches!(turn.role(), Role::User | Role::Developer));
    last.map_or(-1, usize::cast_signed)
}

/// Removes what the release removes before rendering in thinking mode: developer turns that are
/// over. (Reasoning of earlier turns is left out by [`ThinkingRules::shows_reasoning`].)
pub(super) fn drop_finished(turns: Vec<Turn>) -> Vec<Turn> {
    let pivot = last_asked(&turns);
    turns
        .into_iter()
        .enumerate()
        .filter(|(index, turn)| index.cast_signed() >= pivot || turn.role() != Role::Developer)
        .map(|(_, turn)| turn)
        .collect()
}
