//! Pieces of an answer to content blocks.
//!
//! [`Blocks`] keeps the order of events: blocks are numbered from 0, never overlap, and end before
//! the message does. Whole answers are built from the same events as streams, so they cannot
//! differ, but for a call that was cut: a stream has shown part of it, a whole answer has none.
//!
//! Not here: reading tokens (the chat surface's `raise`).

use axum::response::Response;
use fathom_protocol::anthropic::response::{Block, Message, StopReason};
use fathom_protocol::anthropic::stream::{Delta, End, Event};
use fathom_protocol::openai::response::{self as chat, FinishReason, Usage};
use fathom_protocol::{ApiError, Object, Surface, sse};
use sha2::{Digest, Sha256};

use crate::error;
use crate::generate::{Ending, Generation, Update};
use crate::openai::deliver::{self, Frames};
use crate::openai::raise::{ChatAnswer, Piece};
use crate::record::Record;

/// What a request's answer and events have in common.
pub(super) struct Form {
    pub(super) id: String,
    pub(super) request_id: String,
    pub(super) model: String,
    /// Show that there was reasoning, but not its text.
    pub(super) omit_thinking: bool,
    /// Whether the context ends before `max_tokens` are said.
    pub(super) context_cuts: bool,
}

impl Form {
    fn end(&self, ending: Ending) -> End {
        let Ending { finish_reason, stop_reason, details } = ending;
        let stop_sequence = match stop_reason {
            Some(chat::StopReason::Text(text)) => Some(text),
            Some(chat::StopReason::Token(_)) | None => None,
        };
        let stop_reason = match finish_reason {
            FinishReason::Stop if stop_sequence.is_some() => StopReason::StopSequence,
            FinishReason::Stop => StopReason::EndTurn,
            FinishReason::ToolCalls => StopReason::ToolUse,
            FinishReason::Length if self.context_cuts => StopReason::ModelContextWindowExceeded,
            // Answers that the server cuts fail on this surface instead of ending.
            FinishReason::Length | FinishReason::InsufficientSystemResource => {
                StopReason::MaxTokens
            }
        };
        End { stop_reason, stop_sequence, finish_details: details.unless_plain() }
    }
}

/// What is being said.
enum Open {
    Nothing,
    /// With the digest of its text so far.
    Thinking(Sha256),
    Text,
    Call,
}

/// The blocks of one answer, opened and closed as its pieces come.
struct Blocks {
    omit_thinking: bool,
    open: Open,
    /// Index of the open block, or of the next one.
    index: u32,
}

impl Blocks {
    const fn new(omit_thinking: bool) -> Self {
        Self { omit_thinking, open: Open::Nothing, index: 0 }
    }

    fn push(&mut self, piece: Piece, events: &mut Vec<Event<'static>>) {
        match piece {
            Piece::Reasoning(text, _) if text.is_empty() => {}
            Piece::Reasoning(thinking, _) => {
                if !matches!(self.open, Open::Thinking(_)) {
                    let (thinking, signature) = (String::new(), String::new());
                    let block = Block::Thinking { thinking, signature };
                    self.begin(Open::Thinking(Sha256::new()), block, events);
                }
                if let Open::Thinking(digest) = &mut self.open {
                    digest.update(&thinking);
                }
                if !self.omit_thinking {
                    self.say(Delta::ThinkingDelta { thinking }, events);
                }
            }
            Piece::Content(text, _) if text.is_empty() => {}
            Piece::Content(text, _) => {
                if !matches!(self.open, Open::Text) {
                    self.begin(Open::Text, Block::Text { text: String::new() }, events);
                }
                self.say(Delta::TextDelta { text }, events);
            }
            Piece::Call { id, name, .. } => {
                let block = Block::ToolUse { id, name, input: Object::new() };
                self.begin(Open::Call, block, events);
            }
            Piece::Arguments { text, .. } => {
                self.say(Delta::InputJsonDelta { partial_json: text }, events);
            }
            Piece::CallEnd { .. } => self.end(events),
        }
    }

    fn begin(&mut self, open: Open, content_block: Block, events: &mut Vec<Event<'static>>) {
        self.end(events);
        self.open = open;
        events.push(Event::ContentBlockStart { index: self.index, content_block });
    }

    fn say(&self, delta: Delta, events: &mut Vec<Event<'static>>) {
        events.push(Event::ContentBlockDelta { index: self.index, delta });
    }

    fn end(&mut self, events: &mut Vec<Event<'static>>) {
        match std::mem::replace(&mut self.open, Open::Nothing) {
            Open::Nothing => return,
            Open::Thinking(digest) => {
                // Nobody checks it: a client that sends thinking back is taken at its word.
                let digest = digest.finalize();
                let signature = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                self.say(Delta::SignatureDelta { signature }, events);
            }
            Open::Text | Open::Call => {}
        }
        events.push(Event::ContentBlockStop { index: self.index });
        self.index += 1;
    }
}

/// Writes the events of a stream.
pub(super) struct Events {
    blocks: Blocks,
    form: Form,
}

impl Events {
    pub(super) const fn new(form: Form) -> Self {
        Self { blocks: Blocks::new(form.omit_thinking), form }
    }
}

impl Frames for Events {
    type Piece = Piece;

    /// The whole prompt counts as input here: what came from the cache is known at the end only.
    fn begin(&self, usage: Usage) -> Option<Vec<u8>> {
        let message = Message::begun(&self.form.id, &self.form.model, usage.into());
        Some(Event::MessageStart { message }.to_frame())
    }

    fn update(&mut self, update: Update<Piece>, usage: Usage, events: &mut Vec<u8>) {
        let mut said = Vec::with_capacity(update.pieces.len() + 2);
        for piece in update.pieces {
            self.blocks.push(piece, &mut said);
        }
        if let Some(ending) = update.ending {
            self.blocks.end(&mut said);
            let delta = self.form.end(ending);
            said.push(Event::MessageDelta { delta, usage: usage.into() });
        }
        for event in &said {
            events.append(&mut event.to_frame());
        }
    }

    fn usage(&self, _usage: Usage) -> Option<Vec<u8>> {
        None
    }

    fn keep_alive(&self) -> Vec<u8> {
        Event::Ping.to_frame()
    }

    fn failure(&self, error: &ApiError) -> Vec<u8> {
        let mut frame = b"event: error\n".to_vec();
        let json = error.to_json(Surface::Anthropic, &self.form.request_id);
        frame.append(&mut sse::raw_event(&json));
        frame
    }

    fn last(&self) -> Vec<u8> {
        Event::MessageStop.to_frame()
    }

    fn shows_cuts(&self) -> bool {
        false
    }
}

/// Waits for the whole answer.
///
/// # Errors
/// What the client is told if the generation fails.
pub(super) async fn collect(
    record: &Record,
    mut generation: Generation<ChatAnswer>,
    form: &Form,
) -> Result<Response, ApiError> {
    let mut blocks = Blocks::new(form.omit_thinking);
    let mut draft = Draft::default();
    let mut end = None;
    let mut events = Vec::new();
    while let Some(update) =
        generation.next().await.map_err(|failure| error::from_generate(&failure))?
    {
        for piece in update.pieces {
            let completes = matches!(piece, Piece::CallEnd { .. });
            blocks.push(piece, &mut events);
            draft.complete |= completes;
            events.drain(..).try_for_each(|event| draft.add(event))?;
        }
        end = update.ending.or(end);
    }
    blocks.end(&mut events);
    events.drain(..).try_for_each(|event| draft.add(event))?;
    let usage = generation.usage();
    let end = end.ok_or_else(|| error::internal(&"an answer ended without a reason"))?;
    let End { stop_reason, stop_sequence, finish_details } = form.end(end);
    let message = Message {
        content: draft.blocks,
        stop_reason: Some(stop_reason),
        stop_sequence,
        finish_details,
        ..Message::begun(&form.id, &form.model, usage.into())
    };
    deliver::whole(record, &message)
}

/// A whole answer while its events come in.
#[derive(Default)]
struct Draft {
    blocks: Vec<Block>,
    open: Option<Block>,
    /// The open call's arguments.
    arguments: String,
    /// Whether the open call is complete.
    complete: bool,
}

impl Draft {
    fn add(&mut self, event: Event<'_>) -> Result<(), ApiError> {
        match event {
            Event::ContentBlockStart { content_block, .. } => self.open = Some(content_block),
            Event::ContentBlockDelta { delta, .. } => match (delta, &mut self.open) {
                (
                    Delta::ThinkingDelta { thinking: more },
                    Some(Block::Thinking { thinking, .. }),
                ) => {
                    thinking.push_str(&more);
                }
                (
                    Delta::SignatureDelta { signature: all },
                    Some(Block::Thinking { signature, .. }),
                ) => {
                    *signature = all;
                }
                (Delta::TextDelta { text: more }, Some(Block::Text { text })) => {
                    text.push_str(&more);
                }
                (Delta::InputJsonDelta { partial_json }, _) => {
                    self.arguments.push_str(&partial_json);
                }
                _ => {}
            },
            Event::ContentBlockStop { .. } => {
                let complete = std::mem::take(&mut self.complete);
                let arguments = std::mem::take(&mut self.arguments);
                match self.open.take() {
                    Some(Block::ToolUse { id, name, .. }) if complete => {
                        let input = serde_json::from_str(&arguments)
                            .map_err(|error| error::internal(&error))?;
                        self.blocks.push(Block::ToolUse { id, name, input });
                    }
                    Some(Block::ToolUse { .. }) | None => {}
                    Some(block) => self.blocks.push(block),
                }
            }
            _ => {}
        }
        Ok(())
    }
}
