//! The states of an answer: reasoning, text, tool calls. What each tag means where it stands.
//!
//! Invariants, for any input:
//! - no piece of a tag is handed out as reasoning or text;
//! - reasoning comes before text, and text before calls;
//! - what is handed out does not depend on where the input was cut.
//!
//! The blank line before a tool-call block belongs to the block, so up to two newlines at the end
//! of a text are held until it is known what follows.
//!
//! Not here: recognising control tokens and tags (`lex`, `tags`), assembling arguments
//! (`tool_calls`).

use super::lex::Lexeme;
use super::stop::StopMatcher;
use super::tags::{Piece, Tag, TagKind, Tagger};
use super::tool_calls::Calls;
use super::{AnswerEnd, Delta, End, ParserOptions, Phase, Summary};
use crate::encode::prompt::Opening;
use crate::special::Special;

/// Where an answer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Prose(Channel),
    /// After an opener, which makes a block only if a tag follows it.
    Opened {
        from: Channel,
        gap: String,
        token: u32,
    },
    /// In a block between calls, or after one: text is dropped. `bare`: it was opened by a call
    /// instead of a block tag.
    Block {
        from: Channel,
        bare: bool,
    },
    /// In a call, between parameters.
    Call {
        from: Channel,
        bare: bool,
    },
    /// In a parameter's value.
    Value {
        from: Channel,
        bare: bool,
    },
    /// A stop string was found: everything is dropped.
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Reasoning,
    Content,
}

/// An answer as it unfolds.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    tagger: Tagger,
    state: State,
    /// Newlines at the end of the prose so far that were not handed out: at most two.
    n_newlines: usize,
    stop: StopMatcher,
    calls: Calls,
    /// The reasoning so far, kept only to be copied.
    copy: Option<String>,
    /// Tokens before the end of reasoning; `None` while it lasts.
    reasoning_tokens: Option<u32>,
    /// Whether the last token was the end of sentence.
    at_eos: bool,
    out: Vec<Delta>,
}

impl Answer {
    pub(super) fn new(options: ParserOptions) -> Self {
        let state = match options.opening {
            Opening::Reasoning => State::Prose(Channel::Reasoning),
            Opening::Content => State::Prose(Channel::Content),
            Opening::ToolBlock => State::Block { from: Channel::Content, bare: false },
        };
        let reasons = options.opening == Opening::Reasoning;
        Self {
            tagger: Tagger::default(),
            state,
            n_newlines: 0,
            stop: StopMatcher::new(options.stop),
            calls: Calls::new(options.tools),
            copy: (options.copy_reasoning && reasons).then(String::new),
            reasoning_tokens: if reasons { None } else { Some(0) },
            at_eos: false,
            out: Vec::new(),
        }
    }

    /// Takes a lexeme that came with the token number `token`.
    pub(super) fn push(&mut self, lexeme: Lexeme<'_>, token: u32) {
        self.at_eos = lexeme == Lexeme::Control(Special::Eos);
        let mut tagger = std::mem::take(&mut self.tagger);
        tagger.push(lexeme, token, |piece| self.piece(piece, token));
        self.tagger = tagger;
    }

    /// Takes text that could still have become a control token when the answer ended.
    pub(super) fn push_unfinished(&mut self, text: &str) {
        if !(self.is_after_opener() && self.tagger.could_begin_tag(text)) {
            self.push(Lexeme::Text(text), 0);
        }
    }

    /// Whether what ends here unfinished is not text but the beginning of a tag that was cut off.
    fn is_after_opener(&self) -> bool {
        matches!(self.state, State::Opened { .. })
    }

    /// What has been settled since the last call.
    pub(super) fn take_deltas(&mut self) -> Vec<Delta> {
        let mut merged: Vec<Delta> = Vec::with_capacity(self.out.len());
        for delta in self.out.drain(..) {
            match (merged.last_mut(), delta) {
                (Some(Delta::Reasoning(text)), Delta::Reasoning(more))
                | (Some(Delta::Content(text)), Delta::Content(more)) => text.push_str(&more),
                (
                    Some(Delta::ToolCallArguments { fragment, .. }),
                    Delta::ToolCallArguments { fragment: more, .. },
                ) => fragment.push_str(&more),
                (_, delta) => merged.push(delta),
            }
        }
        merged
    }

    pub(super) fn phase(&self) -> Phase {
        match &self.state {
            State::Prose(Channel::Reasoning) | State::Opened { from: Channel::Reasoning, .. } => {
                Phase::Reasoning
            }
            State::Prose(Channel::Content) | State::Opened { from: Channel::Content, .. } => {
                Phase::Content
            }
            State::Block { .. } | State::Call { .. } | State::Value { .. } => Phase::ToolCalls,
            State::Stopped => Phase::Stopped,
        }
    }

    /// Tokens before the end of reasoning; `None` while it lasts.
    pub(super) fn reasoning_tokens(&self) -> Option<u32> {
        self.reasoning_tokens
    }

    pub(super) fn stop_matched(&self) -> Option<&str> {
        self.stop.matched()
    }

    /// Ends the answer after `n_tokens` tokens.
    pub(super) fn finish(&mut self, end: End, n_tokens: u32) -> Summary {
        let mut tagger = std::mem::take(&mut self.tagger);
        tagger.finish(|piece| match piece {
            Piece::Text(_) if self.is_after_opener() => {}
            piece => self.piece(piece, n_tokens),
        });
        let mut dropped_call = false;
        match std::mem::replace(&mut self.state, State::Stopped) {
            State::Prose(channel) => self.end_prose(channel, false),
            // An opener at the end: the block is lost, and the blank line before it with it.
            State::Opened { from, .. } => self.end_prose(from, true),
            State::Call { .. } | State::Value { .. } => dropped_call = self.calls.abandon(),
            State::Block { .. } | State::Stopped => {}
        }
        if end == End::Stop
            && self.reasoning_tokens.is_none()
            && let Some(copy) = self.copy.take().filter(|copy| !copy.is_empty())
        {
            self.out.push(Delta::Content(copy));
        }
        self.release_stop();
        let n_calls = self.calls.n_complete();
        let stop = self.stop.matched().map(str::to_owned);
        Summary {
            end: match end {
                _ if stop.is_some() => AnswerEnd::Stop,
                End::Length => AnswerEnd::Length,
                End::Stop if n_calls > 0 => AnswerEnd::ToolCalls,
                End::Stop => AnswerEnd::Stop,
            },
            stop,
            n_calls,
            dropped_call,
            n_duplicate_parameters: self.calls.n_duplicates(),
            reasoning_tokens: self
                .reasoning_tokens
                .unwrap_or_else(|| n_tokens.saturating_sub(u32::from(self.at_eos))),
        }
    }

    fn piece(&mut self, piece: Piece<'_>, token: u32) {
        match piece {
            Piece::Text(text) => self.text(text),
            Piece::Control(special) => self.control(special, token),
            Piece::Tag(tag) => self.tag(tag),
        }
    }

    fn text(&mut self, text: &str) {
        match &mut self.state {
            State::Prose(channel) => {
                let channel = *channel;
                self.prose(channel, text);
            }
            State::Opened { gap, .. } => {
                if text.trim().is_empty() {
                    gap.push_str(text);
                } else {
                    self.unopen();
                    self.text(text);
                }
            }
            State::Call { .. } => self.calls.push_body(text),
            State::Value { .. } => self.calls.push_value(text, &mut self.out),
            State::Block { .. } | State::Stopped => {}
        }
    }

    fn control(&mut self, special: Special, token: u32) {
        match (&self.state, special) {
            (_, Special::Eos) => {}
            (State::Value { .. }, _) => self.calls.push_value(special.text(), &mut self.out),
            (State::Call { .. }, _) => self.calls.push_body(special.text()),
            (State::Prose(Channel::Reasoning), Special::ThinkEnd) => {
                self.release_newlines(Channel::Reasoning);
                self.reasoning_tokens.get_or_insert(token);
                self.state = State::Prose(Channel::Content);
            }
            (State::Opened { .. }, Special::ThinkEnd) => {
                self.unopen();
                self.control(special, token);
            }
            // Stray or repeated: absorbed.
            _ => {}
        }
    }

    fn tag(&mut self, tag: Tag) {
        match std::mem::replace(&mut self.state, State::Stopped) {
            State::Stopped => {}
            State::Prose(channel) => self.tag_in_prose(channel, tag),
            State::Opened { from, gap, token } => {
                let begins_block = match tag.kind {
                    TagKind::Block => tag.closes,
                    TagKind::Invoke { .. } | TagKind::Parameter { .. } | TagKind::Malformed => {
                        !tag.closes
                    }
                    TagKind::Cut => true,
                    TagKind::Unknown => false,
                };
                if begins_block {
                    self.begin_block(from, false, token, tag);
                } else {
                    self.state = State::Opened { from, gap, token };
                }
            }
            State::Block { from, bare } => self.tag_in_block(from, bare, tag),
            State::Call { from, bare } => self.tag_in_call(from, bare, tag),
            State::Value { from, bare } => self.tag_in_value(from, bare, tag),
        }
    }

    fn tag_in_prose(&mut self, channel: Channel, tag: Tag) {
        self.state = State::Prose(channel);
        match (tag.closes, &tag.kind) {
            (false, TagKind::Block) => {
                let (gap, token) = (String::new(), tag.token);
                self.state = State::Opened { from: channel, gap, token };
            }
            (false, TagKind::Invoke { .. }) => {
                self.begin_block(channel, true, tag.token, tag);
            }
            (_, TagKind::Cut) => self.end_prose(channel, true),
            // Markup without a meaning here: it is dropped, and the prose goes on.
            _ => {}
        }
    }

    fn tag_in_block(&mut self, from: Channel, bare: bool, tag: Tag) {
        self.state = State::Block { from, bare };
        match (tag.closes, tag.kind) {
            (true, TagKind::Block) => self.leave_block(from),
            (false, TagKind::Block) => self.state = State::Block { from, bare: false },
            (false, TagKind::Invoke { name, self_closing }) => {
                self.calls.begin(name, &mut self.out);
                if self_closing {
                    self.end_call(from, bare);
                } else {
                    self.state = State::Call { from, bare };
                }
            }
            (false, TagKind::Parameter { self_closing: false, .. }) => {
                // Without a call nobody takes its value.
                self.state = State::Value { from, bare };
            }
            _ => {}
        }
    }

    fn tag_in_call(&mut self, from: Channel, bare: bool, tag: Tag) {
        self.state = State::Call { from, bare };
        match (tag.closes, &tag.kind) {
            (true, TagKind::Invoke { .. }) => self.end_call(from, bare),
            (true, TagKind::Block) => {
                self.end_call(from, bare);
                self.leave_block(from);
            }
            (false, TagKind::Invoke { .. }) => {
                self.end_call(from, bare);
                self.tag_in_block(from, bare, tag);
            }
            (false, TagKind::Parameter { name, string, self_closing }) => {
                self.calls.begin_parameter(name, *string, &mut self.out);
                if *self_closing {
                    self.calls.end_parameter(true, &mut self.out);
                } else {
                    self.state = State::Value { from, bare };
                }
            }
            (false, TagKind::Malformed) => {
                self.calls.skip_parameter();
                self.state = State::Value { from, bare };
            }
            _ => {}
        }
    }

    fn tag_in_value(&mut self, from: Channel, bare: bool, tag: Tag) {
        let in_call = self.calls.is_open();
        let back = if in_call { State::Call { from, bare } } else { State::Block { from, bare } };
        match (tag.closes, &tag.kind) {
            (true, TagKind::Parameter { .. }) => {
                self.calls.end_parameter(true, &mut self.out);
                self.state = back;
            }
            // The closing tag is missing: the tag that can only come after it ends the value.
            (true, TagKind::Invoke { .. } | TagKind::Block)
            | (false, TagKind::Invoke { .. } | TagKind::Parameter { .. }) => {
                self.calls.end_parameter(false, &mut self.out);
                if in_call {
                    self.tag_in_call(from, bare, tag);
                } else {
                    self.tag_in_block(from, bare, tag);
                }
            }
            (_, TagKind::Cut) => self.state = State::Value { from, bare },
            _ => {
                self.state = State::Value { from, bare };
                self.calls.push_value(&tag.raw, &mut self.out);
            }
        }
    }

    fn end_call(&mut self, from: Channel, bare: bool) {
        self.calls.end(&mut self.out);
        self.state = State::Block { from, bare };
        if bare && self.calls.is_muted() {
            self.leave_block(from);
        }
    }

    /// A block begins with token number `token`, and its first tag is `first`. The blank line
    /// before it is part of it, and reasoning is over.
    fn begin_block(&mut self, from: Channel, bare: bool, token: u32, first: Tag) {
        self.end_prose(from, true);
        if self.stop.matched().is_some() {
            // The text before it turned out to end with a stop string.
            return;
        }
        if !self.calls.is_muted() {
            self.reasoning_tokens.get_or_insert(token);
            self.release_stop();
        }
        self.tag_in_block(from, bare, first);
    }

    /// A block ends. If calls were on offer, nothing but calls may follow; otherwise it never
    /// was one, and the prose goes on.
    fn leave_block(&mut self, from: Channel) {
        self.state = if self.calls.is_muted() {
            State::Prose(from)
        } else {
            State::Block { from, bare: false }
        };
    }

    /// The opener was no opener: the text around it is prose.
    fn unopen(&mut self) {
        if let State::Opened { from, gap, .. } = std::mem::replace(&mut self.state, State::Stopped)
        {
            self.state = State::Prose(from);
            self.prose(from, &gap);
        }
    }

    fn prose(&mut self, channel: Channel, text: &str) {
        let body = text.trim_end_matches('\n');
        if body.is_empty() {
            let n_newlines = self.n_newlines + text.len();
            self.n_newlines = n_newlines.min(2);
            self.hand_out(channel, &"\n".repeat(n_newlines - self.n_newlines));
            return;
        }
        self.release_newlines(channel);
        let n_held = (text.len() - body.len()).min(2);
        self.hand_out(channel, &text[..text.len() - n_held]);
        self.n_newlines = n_held;
    }

    /// Ends a stretch of prose; `before_block` drops the blank line at its end, if there is one.
    fn end_prose(&mut self, channel: Channel, before_block: bool) {
        if before_block && self.n_newlines == 2 {
            self.n_newlines = 0;
        }
        self.release_newlines(channel);
    }

    fn release_newlines(&mut self, channel: Channel) {
        let newlines = "\n".repeat(std::mem::take(&mut self.n_newlines));
        self.hand_out(channel, &newlines);
    }

    fn release_stop(&mut self) {
        let text = self.stop.finish();
        if !text.is_empty() {
            self.out.push(Delta::Content(text));
        }
    }

    fn hand_out(&mut self, channel: Channel, text: &str) {
        if text.is_empty() {
            return;
        }
        match channel {
            Channel::Reasoning => {
                if let Some(copy) = &mut self.copy {
                    copy.push_str(text);
                }
                self.out.push(Delta::Reasoning(text.to_owned()));
            }
            Channel::Content => {
                let text = self.stop.push(text);
                if self.stop.matched().is_some() {
                    self.state = State::Stopped;
                }
                if !text.is_empty() {
                    self.out.push(Delta::Content(text));
                }
            }
        }
    }
}
