//! Answers: what the model wrote, taken apart as it comes.
//!
//! [`OutputParser`] takes sampled token ids, [`TextParser`] the same answer as text; both hand out
//! [`Delta`]s. Whatever the cuts, the deltas concatenate to the same message, and a
//! [`ParsedMessage`] collects them. Control tokens are recognised by id where there are ids, so a
//! spelled-out `</think>` is text there.
//!
//! - `lex`, `tags`: control tokens and tool-call tags in the stream;
//! - `answer`: reasoning, text and blocks; `tool_calls`, `schema`: arguments;
//! - [`stop`]: stop strings; [`strict`]: the release's whole-text parser for training data.
//!
//! Not here: ids of calls and wire formats (the server's), grammars that prevent malformed calls.

mod answer;
mod lex;
pub mod message;
mod schema;
pub mod stop;
pub mod strict;
mod tags;
mod tool_calls;

use fathom_core::TokenId;

use crate::detokenize::Detokenizer;
use crate::encode::prompt::Opening;
use crate::tokenizer::Tokenizer;
use answer::Answer;
use lex::{Lexeme, Lexer};

pub use message::{ParsedCall, ParsedMessage};
pub use schema::ToolSet;
pub use stop::StopMatcher;

/// Something the answer says, in order. Reasoning comes before content, content before calls, and
/// a call ends before the next one starts. Texts are never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// More reasoning.
    Reasoning(String),
    /// More answer text.
    Content(String),
    /// A call begins. Calls are numbered from 0.
    ToolCallStart {
        /// Which call.
        index: u32,
        /// The function's name, complete.
        name: String,
    },
    /// More of a call's arguments: the fragments of a call that ends concatenate to one JSON
    /// object.
    ToolCallArguments {
        /// Which call.
        index: u32,
        /// More JSON text.
        fragment: String,
    },
    /// A call is complete. A call that never ends was cut off or malformed: it is not part of the
    /// message.
    ToolCallEnd {
        /// Which call.
        index: u32,
    },
}

/// How to read an answer.
#[derive(Debug, Clone, Default)]
pub struct ParserOptions {
    /// Where the prompt left off ([`crate::Prompt::opening`]).
    pub opening: Opening,
    /// The tools on offer; `None` if the model may not call: then blocks are removed and no call
    /// is handed out.
    pub tools: Option<ToolSet>,
    /// Strings that end the answer text. They do not apply to reasoning or calls.
    pub stop: Vec<String>,
    /// If the answer ends (not by length) before its reasoning does, hand the reasoning out as
    /// content too.
    pub copy_reasoning: bool,
}

/// Why no more tokens come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended the answer, or one of the request's stop tokens did.
    Stop,
    /// It was cut off.
    Length,
}

/// How an answer ended, in the API's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerEnd {
    /// By itself, or at a stop string.
    Stop,
    /// By length.
    Length,
    /// With at least one complete call.
    ToolCalls,
}

/// What part of the answer comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reasoning.
    Reasoning,
    /// Answer text.
    Content,
    /// Tool calls; text is dropped.
    ToolCalls,
    /// Nothing: a stop string was found.
    Stopped,
}

/// What is known at the end of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// How it ended.
    pub end: AnswerEnd,
    /// The stop string that was found.
    pub stop: Option<String>,
    /// Complete calls.
    pub n_calls: u32,
    /// Whether a last call was begun and dropped because it was not complete.
    pub dropped_call: bool,
    /// Parameters dropped because their call had that key already: worth a log line.
    pub n_duplicate_parameters: u32,
    /// Tokens before the end of reasoning, its delimiter not counted. Zero without ids.
    pub reasoning_tokens: u32,
}

/// Reads an answer from token ids.
#[derive(Debug, Clone)]
pub struct OutputParser {
    detokenizer: Detokenizer,
    answer: Answer,
    n_tokens: u32,
}

impl OutputParser {
    /// A parser for one answer.
    pub fn new(tokenizer: &Tokenizer, options: ParserOptions) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer, false),
            answer: Answer::new(options),
            n_tokens: 0,
        }
    }

    /// Takes the next token and returns what it settles.
    pub fn push(&mut self, id: TokenId) -> Vec<Delta> {
        let token = self.n_tokens;
        self.n_tokens += 1;
        match self.detokenizer.tokenizer().special().of(id) {
            Some(special) => {
                let unfinished = self.detokenizer.finish();
                self.push_text(&unfinished, token);
                self.answer.push(Lexeme::Control(special), token);
            }
            None => {
                let text = self.detokenizer.push(id);
                self.push_text(&text, token);
            }
        }
        self.answer.take_deltas()
    }

    /// Ends the answer.
    pub fn finish(mut self, end: End) -> (Vec<Delta>, Summary) {
        let unfinished = self.detokenizer.finish();
        self.push_text(&unfinished, self.n_tokens);
        let summary = self.answer.finish(end, self.n_tokens);
        (self.answer.take_deltas(), summary)
    }

    /// What comes next, as far as it is settled.
    pub fn phase(&self) -> Phase {
        self.answer.phase()
    }

    /// The stop string that ended the answer: no further token is needed.
    pub fn stop_matched(&self) -> Option<&str> {
        self.answer.stop_matched()
    }

    /// Tokens so far.
    pub fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Tokens of reasoning so far, its delimiter not counted.
    pub fn reasoning_tokens(&self) -> u32 {
        self.answer.reasoning_tokens().unwrap_or(self.n_tokens)
    }

    fn push_text(&mut self, text: &str, token: u32) {
        if !text.is_empty() {
            self.answer.push(Lexeme::Text(text), token);
        }
    }
}

/// Reads an answer from text in which control tokens are spelled out.
#[derive(Debug, Clone)]
pub struct TextParser {
    lexer: Lexer,
    answer: Answer,
}

impl TextParser {
    /// A parser for one answer.
    pub fn new(options: ParserOptions) -> Self {
        Self { lexer: Lexer::default(), answer: Answer::new(options) }
    }

    /// Takes more text, cut anywhere, and returns what it settles.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        self.lexer.push(text, |lexeme| self.answer.push(lexeme, 0));
        self.answer.take_deltas()
    }

    /// Ends the answer.
    pub fn finish(mut self, end: End) -> (Vec<Delta>, Summary) {
        let held = self.lexer.finish();
        if !held.is_empty() {
            self.answer.push_unfinished(&held);
        }
        let mut summary = self.answer.finish(end, 0);
        summary.reasoning_tokens = 0;
        (self.answer.take_deltas(), summary)
    }

    /// Reads a whole answer.
    pub fn parse(options: ParserOptions, text: &str, end: End) -> (ParsedMessage, Summary) {
        let mut message = ParsedMessage::default();
        let mut parser = Self::new(options);
        message.extend(parser.push(text));
        let (deltas, summary) = parser.finish(end);
        message.extend(deltas);
        (message, summary)
    }
}
