//! One answer under its rules: free reasoning, then text, JSON or calls.
//!
//! An [`AnswerConstraint`] knows in which part of the answer the next token falls. In reasoning and
//! free text it takes single tokens away at most; where a grammar rules, the grammar says what may
//! come. Reasoning is never under a grammar: that begins after `</think>`, or at the tool-call
//! marker if the model decides to call something.
//!
//! Invariants:
//! - an answer that must follow a grammar cannot end before it does, by itself;
//! - the tool-call marker comes only where a tag can begin, if calls are constrained, and never if
//!   they are forbidden.
//!
//! Not here: the length limit and stop strings, which end an answer from outside.

use std::sync::Arc;

use fathom_core::{ConstraintError, TokenConstraint, TokenId};
use llguidance::Matcher;
use llguidance::toktrie::SimpleVob;

use super::Grammar;
use crate::encode::prompt::Opening;
use crate::special::Special;
use crate::tokenizer::Tokenizer;

/// Control tokens that have no place in an answer. A model does not say them by itself, but may
/// where what it would say is taken away.
const FOREIGN: [Special; 8] = [
    Special::Bos,
    Special::User,
    Special::Assistant,
    Special::LatestReminder,
    Special::ExtractedUrl,
    Special::FimBegin,
    Special::FimHole,
    Special::FimEnd,
];

/// What an answer must keep to.
#[derive(Debug, Clone)]
pub struct AnswerRules {
    /// Where the prompt left off.
    pub opening: Opening,
    /// Tokens of reasoning before its end is forced.
    pub reasoning_budget: Option<u32>,
    /// Whether the answer may not end in its reasoning, or directly after it.
    pub must_answer: bool,
    /// What the answer may call, unless `grammar` says so.
    pub calls: Calls,
    /// What the answer must be, from its first token after the reasoning.
    pub grammar: Option<Arc<Grammar>>,
}

/// What an answer without a grammar may call.
#[derive(Debug, Clone)]
pub enum Calls {
    /// The model may write what it likes; nobody sees calls, so they are no answer.
    Free,
    /// Nothing: the marker never comes.
    Forbidden,
    /// What this grammar allows from the marker on.
    Constrained(Arc<Grammar>),
}

/// Which part of an answer the next token falls in.
enum State {
    /// With what is left of the budget.
    Reasoning {
        left: Option<u32>,
    },
    /// `begun`: something was said, white space aside.
    Text {
        begun: bool,
    },
    Grammar(Box<Running>),
    /// The grammar is complete.
    Finished,
    Failed(ConstraintError),
}

/// A matcher on its way.
struct Running {
    matcher: Matcher,
    grammar: Arc<Grammar>,
    /// The mask of the next token, if it was computed ahead.
    ready: Option<SimpleVob>,
}

/// Follows one answer.
pub struct AnswerConstraint {
    rules: AnswerRules,
    tokenizer: Tokenizer,
    state: State,
    /// Whether the text so far ends with `<`.
    after_angle: bool,
    /// The bytes of a character that the text so far ends amid, until something was said.
    unfinished: Vec<u8>,
}

impl AnswerConstraint {
    /// The constraint on an answer; `None` if its rules take nothing away.
    pub fn new(rules: AnswerRules, tokenizer: &Tokenizer) -> Option<Self> {
        let reasons = rules.opening == Opening::Reasoning;
        let is_idle = rules.grammar.is_none()
            && matches!(rules.calls, Calls::Free)
            && !rules.must_answer
            && !(reasons && rules.reasoning_budget.is_some());
        if is_idle {
            return None;
        }
        let state = if reasons {
            State::Reasoning { left: rules.reasoning_budget }
        } else {
            State::of_answer(&rules)
        };
        let tokenizer = tokenizer.clone();
        Some(Self { rules, tokenizer, state, after_angle: false, unfinished: Vec::new() })
    }

    /// The grammar's mask, computed now or before.
    fn compute(running: &mut Running) -> Result<SimpleVob, ConstraintError> {
        match running.ready.take() {
            Some(ready) => Ok(ready),
            None => running.matcher.compute_mask_or_eos().map_err(|error| failed(&error)),
        }
    }

    /// What reasoning and free text lose.
    fn thin_out(&self, mask: &mut [u32], must_go_on: bool) {
        let special = self.tokenizer.special();
        for id in FOREIGN.iter().filter_map(|foreign| special.get(*foreign)) {
            clear(mask, id);
        }
        if must_go_on {
            clear(mask, special.eos());
        }
        let may_call = match self.rules.calls {
            // Nobody would see these calls: they are no answer.
            Calls::Free => !self.rules.must_answer,
            Calls::Forbidden => false,
            Calls::Constrained(_) => self.after_angle,
        };
        if !may_call || self.rules.grammar.is_some() {
            clear(mask, special.dsml());
        }
    }

    fn follow(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        let special = self.tokenizer.special();
        let text = self.tokenizer.token_bytes(token).unwrap_or_default();
        self.after_angle = special.of(token).is_none() && text.ends_with(b"<");
        match &mut self.state {
            State::Reasoning { .. } if token == special.think_end() => {
                self.state = State::of_answer(&self.rules);
            }
            State::Reasoning { .. } | State::Text { .. } if token == special.dsml() => {
                self.state = match &self.rules.calls {
                    Calls::Constrained(grammar) => {
                        let mut running = Running::new(grammar);
                        running.matcher.consume_token(token).map_err(|error| failed(&error))?;
                        State::Grammar(running)
                    }
                    Calls::Free | Calls::Forbidden => State::Text { begun: true },
                };
            }
            State::Reasoning { left } => *left = left.map(|left| left.saturating_sub(1)),
            State::Text { begun } => {
                if !*begun && special.of(token).is_none() {
                    self.unfinished.extend_from_slice(text);
                    *begun = says_something(&mut self.unfinished);
                }
            }
            State::Grammar(running) => {
                running.ready = None;
                running.matcher.consume_token(token).map_err(|error| failed(&error))?;
                if running.matcher.is_stopped() {
                    self.finish_grammar();
                }
            }
            State::Finished => {}
            State::Failed(error) => return Err(error.clone()),
        }
        Ok(())
    }

    /// Returns the matcher to where the next answer finds it.
    fn finish_grammar(&mut self) {
        if let State::Grammar(running) = std::mem::replace(&mut self.state, State::Finished) {
            let Running { matcher, grammar, .. } = *running;
            grammar.give_back(matcher);
        }
    }
}

impl State {
    /// Where an answer begins after its reasoning.
    fn of_answer(rules: &AnswerRules) -> Self {
        match &rules.grammar {
            Some(grammar) => Self::Grammar(Running::new(grammar)),
            None => Self::Text { begun: false },
        }
    }
}

impl Running {
    fn new(grammar: &Arc<Grammar>) -> Box<Self> {
        let (matcher, grammar) = (grammar.matcher(), Arc::clone(grammar));
        Box::new(Self { matcher, grammar, ready: None })
    }
}

impl TokenConstraint for AnswerConstraint {
    fn prepare(&mut self) {
        let State::Grammar(running) = &mut self.state else { return };
        match Self::compute(running) {
            Ok(mask) => running.ready = Some(mask),
            Err(error) => self.state = State::Failed(error),
        }
    }

    fn needs_preparation(&self) -> bool {
        matches!(&self.state, State::Grammar(running) if running.ready.is_none())
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        match &mut self.state {
            State::Reasoning { left: Some(0) } => {
                mask.fill(0);
                set(mask, self.tokenizer.special().think_end());
            }
            State::Reasoning { .. } => {
                let must_go_on = self.rules.must_answer || self.rules.grammar.is_some();
                self.thin_out(mask, must_go_on);
            }
            State::Text { begun } => {
                let must_go_on = self.rules.must_answer && !*begun;
                self.thin_out(mask, must_go_on);
            }
            State::Grammar(running) => {
                let allowed = Self::compute(running)?;
                let hidden = running.grammar.hidden();
                // The model's vocabulary may be longer than the tokenizer's, and never allowed.
                let n_words = hidden.len().min(mask.len());
                let (known, unknown) = mask.split_at_mut(n_words);
                let words = allowed.as_slice().iter().zip(hidden);
                known.iter_mut().zip(words).for_each(|(word, (allowed, hidden))| {
                    *word &= allowed & !hidden;
                });
                unknown.fill(0);
            }
            State::Finished => {
                mask.fill(0);
                set(mask, self.tokenizer.special().eos());
            }
            State::Failed(error) => return Err(error.clone()),
        }
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.follow(token).inspect_err(|error| self.state = State::Failed(error.clone()))
    }

    fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished)
    }
}

impl Drop for AnswerConstraint {
    fn drop(&mut self) {
        self.finish_grammar();
    }
}

/// Whether there is more than white space in `text`. Leaves of it what begins a character.
fn says_something(text: &mut Vec<u8>) -> bool {
    let n_known = match std::str::from_utf8(text) {
        Ok(text) => text.len(),
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Shown as a replacement character.
        Err(_) => return true,
    };
    let known = text.drain(..n_known).collect();
    String::from_utf8(known).is_ok_and(|known| !known.trim().is_empty())
}

fn clear(mask: &mut [u32], token: TokenId) {
    if let Some(word) = mask.get_mut(token as usize / 32) {
        *word &= !(1 << (token % 32));
    }
}

fn set(mask: &mut [u32], token: TokenId) {
    if let Some(word) = mask.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

fn failed(error: &impl std::fmt::Display) -> ConstraintError {
    let text = error.to_string();
    ConstraintError(text.lines().next().unwrap_or_default().to_owned())
}
