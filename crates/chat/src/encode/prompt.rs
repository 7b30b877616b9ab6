//! A finished prompt: text in which some places are control tokens and the rest is plain.
//!
//! The two are kept apart from the moment they are written, so that a client's text cannot forge
//! a control token. Plain text between two control tokens is tokenised in one go, whatever pieces
//! it was written in: for ordinary conversations the ids equal those of the release, which
//! tokenises the whole string at once.
//!
//! A prompt also knows which stretches of it are answers of earlier turns. What the model once sampled
//! for such a turn may differ from what its text encodes to; [`Prompt::token_ids_recalling`] lets
//! whoever remembers the ids put them there.
//!
//! Not here: what a prompt says (`encode`), which ids an answer is remembered with (`recall`).

use std::ops::Range;
use std::sync::Arc;

use fathom_core::TokenId;

use super::turn_cache::TurnCache;
use crate::special::Special;
use crate::tokenizer::{EncodeScratch, Tokenizer, TokenizerError};

/// Where the model's answer begins: what the output parser has to know about the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Opening {
    /// The prompt ends with `<think>`: the answer begins with reasoning.
    Reasoning,
    /// The answer begins with its text.
    #[default]
    Content,
    /// The prompt opened a tool-call block.
    ToolBlock,
}

/// A stretch of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment<'a> {
    /// Plain text, even where it spells a control token.
    Text(&'a str),
    /// A control token.
    Control(Special),
}

/// A prompt, ready to be tokenised.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    text: String,
    /// Places in `text` that are control tokens, in order and apart from each other.
    controls: Vec<(Range<usize>, Special)>,
    /// Answers in `text`: from after the token that opens them to the end of their last token.
    answers: Vec<Range<usize>>,
    /// Where the answer that is not closed yet begins.
    open_answer: Option<usize>,
    opens_tool_block: bool,
}

/// A prompt's tokens, and where in them the coming answer begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    /// The prompt.
    pub ids: Vec<TokenId>,
    /// Tokens before the coming answer. Those after them belong to it already: the beginning of a
    /// forced call, or of a message that is continued.
    pub n_before_answer: usize,
}

impl Prompt {
    /// A prompt for plain completion: beginning of sentence, then the text.
    pub fn completion(text: &str) -> Self {
        let mut prompt = Self::default();
        prompt.push_control(Special::Bos);
        prompt.push_text(text);
        prompt
    }

    /// A prompt for filling in the text between `prefix` and `suffix`.
    pub fn fill_in_the_middle(prefix: &str, suffix: &str) -> Self {
        let mut prompt = Self::default();
        prompt.push_control(Special::Bos);
        prompt.push_control(Special::FimBegin);
        prompt.push_text(prefix);
        prompt.push_control(Special::FimHole);
        prompt.push_text(suffix);
        prompt.push_control(Special::FimEnd);
        prompt
    }

    /// Appends plain text.
    pub(crate) fn push_text(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Appends a control token.
    pub(crate) fn push_control(&mut self, special: Special) {
        let start = self.text.len();
        self.text.push_str(special.text());
        self.controls.push((start..self.text.len(), special));
    }

    /// Appends one of our own templates, in which the markers of tool calls and thinking are
    /// control tokens. Never used for text from outside.
    pub(crate) fn push_template(&mut self, template: &str) {
        const MARKERS: [Special; 3] = [Special::Dsml, Special::ThinkStart, Special::ThinkEnd];
        let mut rest = template;
        while let Some((at, marker)) = MARKERS
            .into_iter()
            .filter_map(|marker| Some((rest.find(marker.text())?, marker)))
            .min_by_key(|&(at, _)| at)
        {
            self.push_text(&rest[..at]);
            self.push_control(marker);
            rest = &rest[at + marker.text().len()..];
        }
        self.push_text(rest);
    }

    /// Says that an answer begins here.
    pub(crate) fn begin_answer(&mut self) {
        self.open_answer = Some(self.text.len());
    }

    /// Says that the answer that was begun is complete.
    pub(crate) fn end_answer(&mut self) {
        if let Some(start) = self.open_answer.take() {
            self.answers.push(start..self.text.len());
        }
    }

    /// Opens a tool-call block at the end, so that the answer can only be a call.
    pub(crate) fn open_tool_block(&mut self) {
        self.push_text(super::strings::TOOL_CALLS_BLOCK_PREFIX);
        self.push_template(super::strings::TOOL_CALLS_OPEN);
        self.opens_tool_block = true;
    }

    /// Where the answer begins.
    pub fn opening(&self) -> Opening {
        match self.controls.last() {
            _ if self.opens_tool_block => Opening::ToolBlock,
            Some((range, Special::ThinkStart)) if range.end == self.text.len() => {
                Opening::Reasoning
            }
            _ => Opening::Content,
        }
    }

    /// Whether the answer begins with reasoning.
    pub fn starts_in_reasoning(&self) -> bool {
        self.opening() == Opening::Reasoning
    }

    /// Whether reasoning ends in it.
    pub(crate) fn ends_reasoning(&self) -> bool {
        self.controls.iter().any(|&(_, special)| special == Special::ThinkEnd)
    }

    /// The whole prompt as text, control tokens spelled out.
    pub fn as_text(&self) -> &str {
        &self.text
    }

    /// The prompt in order; adjacent plain texts are one segment.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        let mut at = 0;
        let tail = self.controls.last().map_or(0, |(range, _)| range.end);
        self.controls
            .iter()
            .flat_map(move |(range, special)| {
                let text = &self.text[at..range.start];
                at = range.end;
                [Segment::Text(text), Segment::Control(*special)]
            })
            .chain([Segment::Text(&self.text[tail..])])
            .filter(|segment| !matches!(segment, Segment::Text("")))
    }

    /// The prompt's token ids.
    ///
    /// # Errors
    /// [`TokenizerError`] if the tokenizer lacks a control token of this prompt (only those of
    /// fill-in-the-middle may be missing) or fails on a text.
    pub fn token_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
        // Prompts average a little over three bytes per token.
        let mut ids = Vec::with_capacity(self.text.len() / 3);
        let mut scratch = EncodeScratch::default();
        for turn in self.turns() {
            turn.encode(tokenizer, &mut scratch, &mut ids)?;
        }
        Ok(ids)
    }

    /// The prompt's token ids, earlier answers as `recall` has them: it gets all tokens before an
    /// answer and the answer, and returns the answer's tokens, or `None` to have it encoded.
    ///
    /// # Errors
    /// As [`Prompt::token_ids`].
    pub fn token_ids_recalling(
        &self,
        tokenizer: &Tokenizer,
        recall: impl FnMut(&[TokenId], Turn<'_>) -> Option<Arc<[TokenId]>>,
    ) -> Result<EncodedPrompt, TokenizerError> {
        let nothing = TurnCache::new(0);
        nothing.token_ids_recalling(self, tokenizer, nothing.scope(&[]), recall)
    }

    /// The closed answers of earlier turns, in order.
    pub fn answers(&self) -> impl Iterator<Item = Turn<'_>> {
        self.answers.iter().map(|range| self.part(range.clone()))
    }

    /// The first answer that begins in `range`, if it also ends there.
    pub(super) fn answer_in(&self, range: Range<usize>) -> Option<Range<usize>> {
        let first = self.answers.partition_point(|answer| answer.start < range.start);
        self.answers.get(first).filter(|answer| answer.end <= range.end).cloned()
    }

    /// Where the coming answer begins.
    pub(super) fn answer_start(&self) -> usize {
        self.open_answer.unwrap_or(self.text.len())
    }

    /// A part of the prompt that cuts no control token.
    pub(super) fn part(&self, range: Range<usize>) -> Turn<'_> {
        let first = self.controls.partition_point(|(control, _)| control.start < range.start);
        let last = self.controls.partition_point(|(control, _)| control.start < range.end);
        let start = range.start;
        Turn { text: &self.text[range], controls: &self.controls[first..last], start }
    }

    /// The prompt in order, cut before every control token that begins a turn.
    pub(super) fn turns(&self) -> impl Iterator<Item = Turn<'_>> {
        let mut first = 0;
        std::iter::from_fn(move || {
            let start = match first {
                0 => 0,
                _ => self.controls.get(first)?.0.start,
            };
            if start == self.text.len() {
                return None;
            }
            let begins =
                |(_, special): &(_, Special)| matches!(special, Special::User | Special::Assistant);
            let rest = self.controls.get(first + 1..).unwrap_or_default();
            let n_controls = 1 + rest.iter().position(begins).unwrap_or(rest.len());
            let last = (first + n_controls).min(self.controls.len());
            let end = self.controls.get(last).map_or(self.text.len(), |(range, _)| range.start);
            let controls = &self.controls[first..last];
            // A prompt without control tokens is one turn, and this is past it.
            first = last.max(1);
            Some(Turn { text: &self.text[start..end], controls, start })
        })
    }

    /// Token ids as the release's raw pipeline gives them: control tokens spelled by a client
    /// become control tokens. For comparisons with the release only.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the pipeline fails on the text.
    pub fn raw_token_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
        tokenizer.encode_with_special(&self.text)
    }
}

/// A stretch of a prompt that begins and ends where control tokens do.
#[derive(Debug, Clone, Copy)]
pub struct Turn<'a> {
    pub(super) text: &'a str,
    /// The control tokens in it; their places are those in the whole prompt.
    pub(super) controls: &'a [(Range<usize>, Special)],
    /// Where in the prompt the turn begins.
    pub(super) start: usize,
}

impl Turn<'_> {
    /// Hands the stretch to `absorb` piece by piece. Two give the same bytes only if they have the
    /// same text and the same control tokens at the same places.
    pub fn bytes(&self, mut absorb: impl FnMut(&[u8])) {
        let mut piece = |kind: u64, text: &str| {
            absorb(&(kind << 63 | text.len() as u64).to_le_bytes());
            absorb(text.as_bytes());
        };
        let mut at = 0;
        for (range, special) in self.controls {
            piece(0, &self.text[at..range.start - self.start]);
            piece(1, special.text());
            at = range.end - self.start;
        }
        piece(0, &self.text[at..]);
    }

    /// Where in the prompt it lies.
    pub(super) fn range(&self) -> Range<usize> {
        self.start..self.start + self.text.len()
    }

    /// Appends the turn's ids.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        scratch: &mut EncodeScratch,
        ids: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let mut at = 0;
        for (range, special) in self.controls {
            let (start, end) = (range.start - self.start, range.end - self.start);
            tokenizer.encode_into(&self.text[at..start], scratch, ids)?;
            let token = special.text();
            let id = tokenizer.special().get(*special);
            ids.push(id.ok_or(TokenizerError::MissingToken { token })?);
            at = end;
        }
        tokenizer.encode_into(&self.text[at..], scratch, ids)
    }
}
