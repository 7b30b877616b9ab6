//! Tokens to the pieces of one text completion: text as it is, without reasoning or calls.

use fathom_chat::parse::StopMatcher;
use fathom_chat::{Detokenizer, Tokenizer};
use fathom_core::{FinishReason as Reason, TokenId, TokenLogprob};
use fathom_protocol::openai::response::{FinishDetails, FinishReason, LogprobEntry, StopReason};

use super::logprobs::{Aligner, Text};
use crate::generate::{Answer, Ending};

/// More text, with the entries of its tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TextPiece {
    pub(super) text: String,
    pub(super) entries: Vec<LogprobEntry>,
}

/// One choice, read token by token.
pub(super) struct TextAnswer {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    stop_token_ids: Vec<TokenId>,
    aligner: Option<Aligner>,
    n_tokens: u32,
}

impl TextAnswer {
    pub(super) fn new(
        tokenizer: &Tokenizer,
        stop: &[String],
        stop_token_ids: &[TokenId],
        skip_special_tokens: bool,
        logprobs: bool,
    ) -> Self {
        let text = if skip_special_tokens { Text::Raw } else { Text::Everything };
        Self {
            detokenizer: Detokenizer::new(tokenizer, !skip_special_tokens),
            stop: StopMatcher::new(stop),
            stop_token_ids: stop_token_ids.to_vec(),
            aligner: logprobs.then(|| Aligner::new(tokenizer, text)),
            n_tokens: 0,
        }
    }

    fn pieces(&mut self, text: String) -> Vec<TextPiece> {
        if text.is_empty() {
            return Vec::new();
        }
        let entries = self.aligner.as_mut().map_or_else(Vec::new, |a| a.release(&text));
        vec![TextPiece { text, entries }]
    }
}

impl Answer for TextAnswer {
    type Piece = TextPiece;

    fn push(&mut self, id: TokenId, logprob: Option<&TokenLogprob>) -> Vec<TextPiece> {
        self.n_tokens += 1;
        // A stop token ends the request; its text is no part of the answer.
        if self.stop_token_ids.contains(&id) {
            return Vec::new();
        }
        if let (Some(aligner), Some(logprob)) = (&mut self.aligner, logprob) {
            aligner.push(id, logprob);
        }
        let text = self.detokenizer.push(id);
        let text = self.stop.push(&text);
        self.pieces(text)
    }

    fn is_enough(&self) -> bool {
        self.stop.matched().is_some()
    }

    fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    fn n_reasoning(&self) -> u32 {
        0
    }

    fn finish(mut self, reason: Reason) -> (Vec<TextPiece>, Ending, u32) {
        if let Some(aligner) = &mut self.aligner {
            aligner.finish();
        }
        let text = self.detokenizer.finish();
        let mut text = self.stop.push(&text);
        text.push_str(&self.stop.finish());
        let stopped = self.stop.matched().map(|text| StopReason::Text(text.to_owned()));
        let finish_reason = match reason {
            Reason::Length if stopped.is_none() => FinishReason::Length,
            Reason::Length | Reason::Eos | Reason::StopToken(_) | Reason::Cancelled => {
                FinishReason::Stop
            }
        };
        let token = match reason {
            Reason::StopToken(id) => Some(StopReason::Token(id)),
            Reason::Eos | Reason::Length | Reason::Cancelled => None,
        };
        let details = FinishDetails::default();
        let ending = Ending { finish_reason, stop_reason: stopped.or(token), details };
        (self.pieces(text), ending, 0)
    }
}
