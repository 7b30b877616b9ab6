//! Tokens to the pieces of one chat answer.
//!
//! A [`ChatAnswer`] reads one choice's tokens and says what is new. Streams and whole responses are
//! made from the same pieces, so they cannot differ.
//!
//! Not here: the engine's events ([`crate::generate`]) and JSON ([`super::chat`]).

use std::sync::Arc;

use fathom_chat::Tokenizer;
use fathom_chat::parse::{AnswerEnd, Delta, End, OutputParser, ParserOptions, Summary};
use fathom_core::{FinishReason as Reason, TokenId, TokenLogprob};
use fathom_protocol::openai::response::{
    FinishDetails, FinishReason, LogprobEntry, StopReason, TokenLoop,
};

use super::logprobs::{Aligner, Text};
use super::loops::LoopDetector;
use crate::app::App;
use crate::config::LoopAction;
use crate::generate::{Answer, Ending};
use crate::recall::Listener;
use crate::registry::ModelEntry;

/// Something new in an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    /// More reasoning, with the entries of its tokens.
    Reasoning(String, Vec<LogprobEntry>),
    /// More of the answer, with the entries of its tokens.
    Content(String, Vec<LogprobEntry>),
    /// A call begins.
    Call { index: u32, id: String, name: String },
    /// More of a call's arguments.
    Arguments { index: u32, text: String },
    /// A call is complete.
    CallEnd { index: u32 },
}

/// What shapes an answer besides its tokens.
#[derive(Debug, Clone)]
pub(crate) struct AnswerOptions {
    pub(crate) parser: ParserOptions,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) logprobs: bool,
    /// Leave reasoning out.
    pub(crate) hide_reasoning: bool,
    /// Stop after the first complete call.
    pub(crate) single_call: bool,
    /// What the ids of calls begin with.
    pub(crate) call_prefix: &'static str,
}

/// One choice, read token by token.
pub(crate) struct ChatAnswer {
    parser: OutputParser,
    writer: Writer,
    n_tokens: u32,
    memory: Option<Memory>,
    loops: Option<LoopDetector>,
}

/// What it takes to remember an answer when it is complete.
struct Memory {
    listener: Listener,
    tokenizer: Tokenizer,
    /// Its tokens so far.
    ids: Vec<TokenId>,
}

/// Turns the parser's deltas into pieces.
struct Writer {
    app: Arc<App>,
    aligner: Option<Aligner>,
    options: AnswerOptions,
    enough: bool,
    /// Whether a text that is not blank, or a call, was handed out.
    said: bool,
}

impl ChatAnswer {
    /// An answer that `listener`, if there is one, remembers.
    pub(crate) fn new(
        app: Arc<App>,
        model: &ModelEntry,
        options: AnswerOptions,
        listener: Option<Listener>,
    ) -> Self {
        let parser = OutputParser::new(&model.tokenizer, options.parser.clone());
        let aligner = options.logprobs.then(|| Aligner::new(&model.tokenizer, Text::Parsed));
        let loops = LoopDetector::new(&app.config.loop_detection);
        let writer = Writer { app, aligner, options, enough: false, said: false };
        let memory = listener.map(|listener| Memory {
            listener,
            tokenizer: model.tokenizer.clone(),
            ids: Vec::new(),
        });
        Self { parser, writer, n_tokens: 0, memory, loops }
    }
}

impl Answer for ChatAnswer {
    type Piece = Piece;

    fn push(&mut self, id: TokenId, logprob: Option<&TokenLogprob>) -> Vec<Piece> {
        self.n_tokens += 1;
        // A stop token ends the request; its text is no part of the answer.
        if self.writer.options.stop_token_ids.contains(&id) {
            return Vec::new();
        }
        if let (Some(aligner), Some(logprob)) = (&mut self.writer.aligner, logprob) {
            aligner.push(id, logprob);
        }
        if let Some(memory) = &mut self.memory {
            memory.ids.push(id);
        }
        let pieces = self.writer.pieces(self.parser.push(id));
        self.writer.enough |= self.parser.stop_matched().is_some();
        if let Some(loops) = &mut self.loops {
            loops.push(id);
            let stops = self.writer.app.config.loop_detection.action == LoopAction::Stop;
            self.writer.enough |= stops && loops.found().is_some();
        }
        pieces
    }

    fn is_enough(&self) -> bool {
        self.writer.enough
    }

    fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    fn n_reasoning(&self) -> u32 {
        self.parser.reasoning_tokens()
    }

    fn finish(self, reason: Reason) -> (Vec<Piece>, Ending, u32) {
        let Self { parser, mut writer, memory, loops, .. } = self;
        if let Some(Memory { listener, tokenizer, ids }) = memory {
            listener.remember(&tokenizer, &writer.options.parser, &ids);
        }
        let end = match reason {
            Reason::Length if !writer.enough => End::Length,
            Reason::Length | Reason::Eos | Reason::StopToken(_) | Reason::Cancelled => End::Stop,
        };
        if let Some(aligner) = &mut writer.aligner {
            aligner.finish();
        }
        let (deltas, summary) = parser.finish(end);
        if summary.n_duplicate_parameters > 0 {
            let n_dropped = summary.n_duplicate_parameters;
            tracing::debug!(n_dropped, "a tool call repeated parameters");
        }
        let pieces = writer.pieces(deltas);
        let reasoning_tokens = summary.reasoning_tokens;
        let token_loop = loops.and_then(|loops| loops.found());
        let ending = ending(summary, reason, writer.said, token_loop);
        (pieces, ending, reasoning_tokens)
    }
}

impl Writer {
    fn pieces(&mut self, deltas: Vec<Delta>) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(deltas.len());
        for delta in deltas {
            if self.enough {
                break;
            }
            match delta {
                Delta::Reasoning(text) => {
                    let entries = self.release(&text);
                    if !self.options.hide_reasoning {
                        pieces.push(Piece::Reasoning(text, entries));
                    }
                }
                Delta::Content(text) => {
                    let entries = self.release(&text);
                    self.said |= !text.trim().is_empty();
                    pieces.push(Piece::Content(text, entries));
                }
                Delta::ToolCallStart { index, name } => {
                    self.said = true;
                    let id = format!("{}{}", self.options.call_prefix, self.app.random.id());
                    pieces.push(Piece::Call { index, id, name });
                }
                Delta::ToolCallArguments { index, fragment } => {
                    pieces.push(Piece::Arguments { index, text: fragment });
                }
                Delta::ToolCallEnd { index } => {
                    pieces.push(Piece::CallEnd { index });
                    self.enough |= self.options.single_call;
                }
            }
        }
        pieces
    }

    fn release(&mut self, text: &str) -> Vec<LogprobEntry> {
        self.aligner.as_mut().map_or_else(Vec::new, |aligner| aligner.release(text))
    }
}

fn ending(summary: Summary, reason: Reason, said: bool, token_loop: Option<TokenLoop>) -> Ending {
    let finish_reason = match summary.end {
        AnswerEnd::Stop => FinishReason::Stop,
        AnswerEnd::Length => FinishReason::Length,
        AnswerEnd::ToolCalls => FinishReason::ToolCalls,
    };
    let token = match reason {
        Reason::StopToken(id) => Some(StopReason::Token(id)),
        Reason::Eos | Reason::Length | Reason::Cancelled => None,
    };
    let thought_only = finish_reason == FinishReason::Stop && summary.reasoning_tokens > 0 && !said;
    Ending {
        finish_reason,
        stop_reason: summary.stop.map(StopReason::Text).or(token),
        details: FinishDetails { thought_only, token_loop, cut_call: summary.dropped_call },
    }
}
