//! The release's own parser: whole text, strict, for training data.
//!
//! Accepts exactly what the release's `parse_message_from_completion_text` accepts, quirks
//! included: a completion may end inside a tool block wherever the release does not look, and a
//! call without arguments may have an empty line or none.
//!
//! Not here: reading what a model really writes (`answer`).

use super::message::ParsedCall;
use crate::conversation::ThinkingMode;
use crate::encode::json::to_python_json_string;
use crate::special::Special;

/// A completion is not what the release's parser accepts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum CompletionError {
    #[error("the reasoning has no end: `</think>` is missing before the answer")]
    MissingThinkEnd,
    #[error("the end-of-sentence token is missing")]
    MissingEos,
    #[error("text follows the tool calls: `{text}`")]
    TextAfterToolCalls { text: String },
    #[error("text follows the end of sentence")]
    TextAfterEnd,
    #[error("the control token `{token}` stands in the reasoning or the answer text")]
    ControlToken { token: &'static str },
    #[error("between tool calls stands `{text}`, expected `>` and a newline")]
    BetweenCalls { text: String },
    #[error("the tool-call block has no end")]
    MissingBlockEnd,
    #[error("a tool call's name cannot be read from `{text}`")]
    ToolName { text: String },
    #[error("a parameter cannot be read from `{text}`")]
    Parameter { text: String },
    #[error("the parameter `{name}` is given twice")]
    DuplicateParameter { name: String },
}

/// A completion, taken apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Completion {
    /// The reasoning; empty in chat mode.
    pub reasoning: String,
    /// The answer text.
    pub content: String,
    /// The calls. Values that are not strings stand in the arguments as the model wrote them.
    pub tool_calls: Vec<ParsedCall>,
}

const BLOCK_START: &str = "\n\n<｜DSML｜tool_calls";
const BLOCK_CLOSE: &str = "</｜DSML｜tool_calls>";
const INVOKE_OPEN: &str = "<｜DSML｜invoke";
const INVOKE_CLOSE: &str = "</｜DSML｜invoke";
const PARAMETER_OPEN: &str = "<｜DSML｜parameter";
const PARAMETER_CLOSE: &str = "/｜DSML｜parameter";

/// Reads a completion, control tokens spelled out and the end of sentence included.
///
/// # Errors
/// [`CompletionError`] where the release's parser raises.
pub fn parse_completion(text: &str, mode: ThinkingMode) -> Result<Completion, CompletionError> {
    let eos = Special::Eos.text();
    let mut cursor = Cursor { rest: text };
    let mut completion = Completion::default();
    if mode == ThinkingMode::Thinking {
        let (reasoning, stop) = cursor.until(&[Special::ThinkEnd.text(), BLOCK_START]);
        if stop != Some(Special::ThinkEnd.text()) {
            return Err(CompletionError::MissingThinkEnd);
        }
        completion.reasoning = reasoning.to_owned();
    }
    let (content, stop) = cursor.until(&[eos, BLOCK_START]);
    completion.content = content.to_owned();
    match stop {
        Some(BLOCK_START) => {
            completion.tool_calls = tool_calls(&mut cursor)?;
            let (after, _) = cursor.until(&[eos]);
            if !after.is_empty() {
                return Err(CompletionError::TextAfterToolCalls { text: after.to_owned() });
            }
        }
        Some(_) => {}
        None => return Err(CompletionError::MissingEos),
    }
    if !cursor.rest.is_empty() {
        return Err(CompletionError::TextAfterEnd);
    }
    for special in
        [Special::Bos, Special::Eos, Special::ThinkStart, Special::ThinkEnd, Special::Dsml]
    {
        let token = special.text();
        if completion.content.contains(token) || completion.reasoning.contains(token) {
            return Err(CompletionError::ControlToken { token });
        }
    }
    Ok(completion)
}

struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    /// Takes the text before the first of `stops` and that stop, or everything.
    fn until(&mut self, stops: &[&'static str]) -> (&'a str, Option<&'static str>) {
        let found = stops
            .iter()
            .filter_map(|stop| Some((self.rest.find(stop)?, *stop)))
            .min_by_key(|&(at, _)| at);
        let (before, stop) = match found {
            Some((at, stop)) => (&self.rest[..at], Some(stop)),
            None => (self.rest, None),
        };
        self.rest = &self.rest[before.len() + stop.map_or(0, str::len)..];
        (before, stop)
    }
}

fn tool_calls(cursor: &mut Cursor<'_>) -> Result<Vec<ParsedCall>, CompletionError> {
    let mut calls = Vec::new();
    while !cursor.rest.is_empty() {
        let (before, stop) = cursor.until(&[INVOKE_OPEN, BLOCK_CLOSE]);
        if before != ">\n" {
            return Err(CompletionError::BetweenCalls { text: before.to_owned() });
        }
        match stop {
            Some(BLOCK_CLOSE) => break,
            Some(_) => calls.push(tool_call(cursor)?),
            None => return Err(CompletionError::MissingBlockEnd),
        }
    }
    Ok(calls)
}

fn tool_call(cursor: &mut Cursor<'_>) -> Result<ParsedCall, CompletionError> {
    let (header, mut stop) = cursor.until(&[PARAMETER_OPEN, INVOKE_CLOSE]);
    let name = tool_name(header)
        .ok_or_else(|| CompletionError::ToolName { text: header.to_owned() })?
        .to_owned();
    let mut keys: Vec<&str> = Vec::new();
    let mut members: Vec<String> = Vec::new();
    while stop == Some(PARAMETER_OPEN) {
        let (text, _) = cursor.until(&[PARAMETER_CLOSE]);
        let malformed = |text: &str| CompletionError::Parameter { text: text.to_owned() };
        let (key, string, value) = parameter(text).ok_or_else(|| malformed(text))?;
        if keys.contains(&key) {
            return Err(CompletionError::DuplicateParameter { name: key.to_owned() });
        }
        keys.push(key);
        let value = if string { to_python_json_string(value) } else { value.to_owned() };
        members.push(format!("{}: {value}", to_python_json_string(key)));
        let between;
        (between, stop) = cursor.until(&[PARAMETER_OPEN, INVOKE_CLOSE]);
        if between != ">\n" {
            return Err(malformed(between));
        }
    }
    Ok(ParsedCall { name, arguments: format!("{{{}}}", members.join(", ")) })
}

/// `name="NAME">` and a newline or two: the release's pattern allows one more at the end.
fn tool_name(header: &str) -> Option<&str> {
    let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    let named = header.trim_start_matches(is_space).strip_prefix("name=\"")?;
    const END: &str = "\">\n";
    // The earliest place after which nothing but that one newline follows.
    named.strip_suffix("\n").and_then(|named| named.strip_suffix(END)).or(named.strip_suffix(END))
}

/// ` name="KEY" string="true|false">VALUE<`, with at most a newline after it.
fn parameter(text: &str) -> Option<(&str, bool, &str)> {
    let text = text.strip_prefix(" name=\"")?;
    let (at, open, string) = [("\" string=\"true\">", true), ("\" string=\"false\">", false)]
        .into_iter()
        .filter_map(|(open, string)| Some((text.find(open)?, open, string)))
        .min_by_key(|&(at, ..)| at)?;
    let value = &text[at + open.len()..];
    let value = value.strip_suffix('\n').unwrap_or(value).strip_suffix('<')?;
    Some((&text[..at], string, value))
}
