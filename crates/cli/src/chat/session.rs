//! A conversation in the terminal: what the user typed, and the request it leads to.
//!
//! Not here: sending it (`client`), showing the answer (`super`).

use serde_json::{Value, json};

/// One line of input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input<'a> {
    /// Nothing but space.
    Empty,
    /// Something to say to the model.
    Message(&'a str),
    /// `/help`
    Help,
    /// `/reset`: forget the conversation.
    Reset,
    /// `/think on` or `/think off`.
    Think(bool),
    /// `/quit`
    Quit,
    /// Anything else that begins with a slash.
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    /// Reads a line.
    pub(super) fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [] => Self::Empty,
            ["/help"] => Self::Help,
            ["/reset"] => Self::Reset,
            ["/think", "on"] => Self::Think(true),
            ["/think", "off"] => Self::Think(false),
            ["/quit" | "/exit"] => Self::Quit,
            [command, ..] if command.starts_with('/') => Self::Unknown(line),
            _ => Self::Message(line),
        }
    }
}

/// The conversation so far.
#[derive(Debug)]
pub(super) struct Session {
    model: String,
    thinking: bool,
    max_tokens: Option<u32>,
    messages: Vec<Value>,
}

impl Session {
    /// An empty conversation with `model`.
    pub(super) const fn new(model: String, thinking: bool, max_tokens: Option<u32>) -> Self {
        Self { model, thinking, max_tokens, messages: Vec::new() }
    }

    /// The model's name.
    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// Switches thinking on or off for the following answers.
    pub(super) const fn set_thinking(&mut self, on: bool) {
        self.thinking = on;
    }

    /// Forgets the conversation.
    pub(super) fn reset(&mut self) {
        self.messages.clear();
    }

    /// The request that asks for the answer to `text`; call [`Session::answered`] when it is there.
    pub(super) fn request(&self, text: &str) -> Value {
        let mut messages = self.messages.clone();
        messages.push(json!({"role": "user", "content": text}));
        let thinking = if self.thinking { "enabled" } else { "disabled" };
        let mut request = json!({
            "model": self.model,
            "messages": messages,
            "stream": true,
            "stream_options": {"include_usage": true},
            "thinking": {"type": thinking},
        });
        if let Some(max_tokens) = self.max_tokens {
            request["max_tokens"] = max_tokens.into();
        }
        request
    }

    /// Adds a question and its answer. Reasoning is not sent back: the next turn does not need it.
    pub(super) fn answered(&mut self, question: &str, answer: String) {
        self.messages.push(json!({"role": "user", "content": question}));
        self.messages.push(json!({"role": "assistant", "content": answer}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_begins_with_a_slash_is_a_command() {
        assert_eq!(Input::parse("  /think   off "), Input::Think(false));
        assert_eq!(Input::parse("/quit"), Input::Quit);
        assert_eq!(Input::parse("/think maybe"), Input::Unknown("/think maybe"));
        assert_eq!(Input::parse(" what is /quit? "), Input::Message("what is /quit?"));
        assert_eq!(Input::parse("\n"), Input::Empty);
    }

    #[test]
    fn the_next_request_carries_what_was_said_until_it_is_reset() {
        let mut session = Session::new("m".to_owned(), true, Some(9));
        session.answered("one", "two".to_owned());
        let request = session.request("three");
        let texts: Vec<_> = request["messages"].as_array().unwrap().iter().collect();
        let texts: Vec<_> =
            texts.iter().map(|message| message["content"].as_str().unwrap()).collect();
        assert_eq!(texts, ["one", "two", "three"]);
        assert_eq!(request["thinking"]["type"], "enabled");
        assert_eq!(request["max_tokens"], 9);

        session.reset();
        session.set_thinking(false);
        let request = session.request("four");
        assert_eq!(request["messages"].as_array().unwrap().len(), 1);
        assert_eq!(request["thinking"]["type"], "disabled");
    }
}
