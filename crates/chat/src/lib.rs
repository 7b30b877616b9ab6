//! Between text and tokens, both ways: V4 prompt encoding, tokenizer, detokeniser and output parser.
//!
//! On the way in, a [`Conversation`] becomes a [`Prompt`] ([`render`]) and the prompt token ids
//! ([`Prompt::token_ids`]). On the way out, sampled ids go through an [`OutputParser`], which
//! hands out [`Delta`]s: reasoning, answer text, tool calls.
//!
//! - [`conversation`]: what a request means; [`special`]: the control tokens;
//! - [`encode`]: the hosted API's prompts, and the release's own encoder;
//! - [`recall`]: sampled answers in later prompts;
//! - [`tokenizer`], [`detokenize`]: text to ids, ids to whole characters;
//! - [`parse`]: the streaming parser, the strict one for training data, stop strings;
//! - [`grammar`]: what an answer may consist of: JSON, calls, texts of a language.
//!
//! Not here: wire formats (`protocol`), request validation (`server`), sampling (`engine`).

pub mod conversation;
pub mod detokenize;
pub mod encode;
pub mod grammar;
pub mod parse;
pub mod recall;
pub mod special;
pub mod tokenizer;

pub use conversation::{
    Arguments, Content, Conversation, Effort, EffortProfile, Message, Part, ResponseFormat, Role,
    ThinkingMode, ToolCall,
};
pub use detokenize::Detokenizer;
pub use encode::prompt::{EncodedPrompt, Opening, Prompt, Segment, Turn};
pub use encode::turn_cache::{Scope, TurnCache, TurnCacheStats};
pub use encode::{EncodeError, render};
pub use parse::{
    AnswerEnd, Delta, End, OutputParser, ParsedCall, ParsedMessage, ParserOptions, Phase,
    StopMatcher, Summary, TextParser, ToolSet,
};
pub use recall::AnswerTurn;
pub use special::{Special, SpecialTokens, Task};
pub use tokenizer::{Tokenizer, TokenizerError};
