//! Which token's log-probability belongs to which piece of text.
//!
//! The parser hands out text some tokens after they came, and drops some of it (markup, stop
//! strings). [`Aligner`] keeps the tokens whose text is not settled and releases an entry with the
//! piece that releases its text. The entries' bytes, decoded, are the text; tokens whose text was
//! dropped are never reported.

use std::collections::VecDeque;

use fathom_chat::{Detokenizer, Tokenizer};
use fathom_core::{TokenId, TokenLogprob};
use fathom_protocol::openai::response::{LogprobEntry, TopLogprob};

/// Which tokens are text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Text {
    /// All but control tokens: what the answer parser hands out.
    Parsed,
    /// All but those that the tokenizer skips.
    Raw,
    /// All.
    Everything,
}

/// Pairs tokens with the text they became.
pub(super) struct Aligner {
    detokenizer: Detokenizer,
    text: Text,
    /// Tokens whose bytes do not yet make a character.
    partial: Vec<LogprobEntry>,
    waiting: VecDeque<Group>,
}

/// Tokens and the text they make together: usually one token.
struct Group {
    entries: Vec<LogprobEntry>,
    /// What of the text is not released yet.
    text: String,
}

impl Aligner {
    pub(super) fn new(tokenizer: &Tokenizer, text: Text) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer, text == Text::Everything),
            text,
            partial: Vec::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Takes the next token.
    pub(super) fn push(&mut self, id: TokenId, logprob: &TokenLogprob) {
        let tokenizer = self.detokenizer.tokenizer();
        let is_text = match self.text {
            Text::Parsed => tokenizer.special().of(id).is_none(),
            Text::Raw => !tokenizer.is_skipped(id),
            Text::Everything => true,
        };
        if !is_text {
            // A control token is no text; it ends whatever character was unfinished.
            let text = self.detokenizer.finish();
            self.settle(text);
            return;
        }
        let entry = entry(tokenizer, id, logprob);
        self.partial.push(entry);
        let text = self.detokenizer.push(id);
        self.settle(text);
    }

    /// No more tokens come.
    pub(super) fn finish(&mut self) {
        let text = self.detokenizer.finish();
        self.settle(text);
    }

    fn settle(&mut self, text: String) {
        if !text.is_empty() {
            self.waiting.push_back(Group { entries: std::mem::take(&mut self.partial), text });
        }
    }

    /// The entries of the tokens that released `text`. Tokens before them were dropped.
    pub(super) fn release(&mut self, mut text: &str) -> Vec<LogprobEntry> {
        let mut released = Vec::new();
        while !text.is_empty() {
            let Some(group) = self.waiting.front_mut() else { break };
            if let Some(rest) = text.strip_prefix(group.text.as_str()) {
                released.append(&mut group.entries);
                text = rest;
            } else if let Some(held) = group.text.strip_prefix(text) {
                // The end of the token is held back; its entry goes with its beginning.
                released.append(&mut group.entries);
                group.text = held.to_owned();
                break;
            } else if let Some(at) = shared_tail(&group.text, text) {
                // The beginning of the token was dropped.
                group.text.drain(..at);
                continue;
            }
            self.waiting.pop_front();
        }
        released
    }
}

/// Where in `token` a tail begins with which `text` begins.
fn shared_tail(token: &str, text: &str) -> Option<usize> {
    let mut starts = token.char_indices().map(|(at, _)| at).skip(1);
    starts.find(|&at| text.starts_with(&token[at..]) || token[at..].starts_with(text))
}

fn entry(tokenizer: &Tokenizer, id: TokenId, logprob: &TokenLogprob) -> LogprobEntry {
    let bytes = |id| tokenizer.token_bytes(id).unwrap_or_default().to_vec();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let own = bytes(id);
    LogprobEntry {
        token: text(&own),
        logprob: logprob.logprob,
        bytes: own,
        top_logprobs: logprob
            .top
            .iter()
            .map(|&(id, logprob)| {
                let bytes = bytes(id);
                TopLogprob { token: text(&bytes), logprob, bytes }
            })
            .collect(),
    }
}
