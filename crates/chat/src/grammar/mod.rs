//! Grammars: what an answer may consist of, as masks over the vocabulary.
//!
//! A [`GrammarSpec`] says what is wanted: JSON that follows a schema, a regular expression, one of
//! some texts, a grammar of the client's own, tool calls with valid arguments. A [`GrammarCompiler`]
//! turns it into a [`Grammar`], which is shared by all requests that want the same, and an
//! [`AnswerConstraint`] follows one answer: free reasoning first, then what the grammar allows.
//!
//! - `vocabulary`: the tokens as the mask engine sees them; `compile`: grammars and their cache;
//! - `schema`, `text`, `formats`: JSON Schemas as JSON and as plain text;
//! - `dsml`: the grammar of a tool-call block; `constraint`: one answer.
//!
//! Masks are computed by `llguidance`. Text never contains control tokens, whatever the grammar: a
//! control token is not a spelling there but a symbol of its own.
//!
//! Not here: what a request may ask for (`protocol`), and how masks reach the logits (`engine`).

mod compile;
mod constraint;
mod dsml;
mod formats;
mod gbnf;
mod schema;
mod text;
mod vocabulary;

use serde_json::Value;

pub use compile::{Grammar, GrammarCompiler};
pub use constraint::{AnswerConstraint, AnswerRules, Calls};

/// What an answer must look like from the place where its grammar begins.
#[derive(Debug, Clone, PartialEq)]
pub struct GrammarSpec {
    /// What the text must be; `None` if it may only be calls.
    pub format: Option<Format>,
    /// What may be called; `None` if nothing may.
    pub calls: Option<CallRules>,
    /// Where the grammar begins.
    pub start: Start,
}

/// Where a grammar begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Start {
    /// At the first token of the answer: its text, or the blank line before a block of calls.
    Answer,
    /// Inside a block that the prompt opened.
    ToolBlock,
    /// At the tool-call marker, after the `<` before it.
    Marker,
}

/// What the text of an answer must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// Some JSON object.
    JsonObject,
    /// JSON that follows a schema. If `strict`, a keyword that cannot be enforced is an error.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// Whether keywords that cannot be enforced are refused instead of ignored.
        strict: bool,
    },
    /// A text that matches all of a regular expression.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of a language, in the Lark or GBNF notation.
    Grammar(String),
}

/// Which calls a block may hold.
#[derive(Debug, Clone, PartialEq)]
pub struct CallRules {
    /// The tools that may be called; at least one.
    pub tools: Vec<ToolRule>,
    /// Whether the block holds exactly one call.
    pub single: bool,
}

/// A tool that may be called.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolRule {
    /// Its name.
    pub name: String,
    /// The JSON Schema of its arguments, if there is one.
    pub parameters: Option<Value>,
    /// How much of the schema arguments must follow.
    pub enforcement: Enforcement,
}

/// How much of a schema a call's arguments must follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Enforcement {
    /// All of it; what cannot be enforced is an error.
    Strict,
    /// What can be enforced. A schema that cannot be used at all is an error.
    Lenient,
    /// What can be enforced, and nothing of a schema that cannot be used at all.
    BestEffort,
    /// Nothing: any parameters.
    Off,
}

/// A specification that has no grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fault}: {reason}")]
pub struct GrammarError {
    /// What is wrong with it.
    pub fault: Fault,
    /// Which part of it.
    pub part: Part,
    /// Why, in words for whoever wrote it.
    pub reason: String,
}

/// What is wrong with a specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Fault {
    /// It is not well formed.
    #[error("not well formed")]
    Malformed,
    /// It is well formed, but cannot be enforced.
    #[error("cannot be enforced")]
    Unsupported,
    /// It takes too long, or too much memory, to compile.
    #[error("too complex")]
    TooComplex,
    /// Others are being compiled; later it may work.
    #[error("too many at once")]
    Busy,
}

/// A part of a specification.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Part {
    /// The format of the text.
    Format,
    /// The arguments of the tool with this name.
    Tool(String),
    /// All of it together.
    Whole,
}
