//! Pieces of an answer to items.
//!
//! [`Items`] keeps the order of events: items are numbered from 0, never overlap, and each is
//! complete before the next begins. Whole answers are built by the same code as streams, with the
//! events left out, so they cannot differ. A call that was cut is in neither: a stream has shown the
//! beginning of it, but never says that it is done, so no client runs it.
//!
//! Not here: reading tokens (the chat surface's `raise`).

use std::sync::Arc;

use axum::response::Response as HttpResponse;
use fathom_protocol::openai::response::{FinishDetails, FinishReason, LogprobEntry, Usage};
use fathom_protocol::responses::response::{
    Failure, IncompleteDetails, Item, Part, Response, Status,
};
use fathom_protocol::responses::stream::Event;
use fathom_protocol::responses::{Echo, seal};
use fathom_protocol::{ApiError, sse};

use crate::app::App;
use crate::error;
use crate::generate::{Ending, Generation, Update};
use crate::openai::deliver::{self, Frames};
use crate::openai::raise::{ChatAnswer, Piece};
use crate::record::Record;

/// What a request's answer and events have in common.
pub(super) struct Form {
    pub(super) id: String,
    pub(super) created_at: u64,
    pub(super) model: String,
    pub(super) echo: Echo,
    /// Whether reasoning comes with a copy that clients pass on unread.
    pub(super) seal_reasoning: bool,
}

/// The items of one answer, opened and closed as its pieces come.
pub(super) struct Items {
    app: Arc<App>,
    form: Form,
    done: Vec<Item>,
    open: Open,
    /// Number of the next event. Two have been sent when the first piece comes.
    sequence_number: u64,
    ended: Option<(FinishReason, FinishDetails, Usage)>,
}

/// What is being said.
enum Open {
    Nothing,
    Reasoning { id: String, text: String },
    Message { id: String, text: String, logprobs: Vec<LogprobEntry> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

/// Where the events of an update go.
struct Sink<'a> {
    frames: &'a mut Vec<Vec<u8>>,
    sequence_number: &'a mut u64,
}

impl Sink<'_> {
    fn send(&mut self, event: &Event<'_>) {
        self.frames.push(event.to_frame(*self.sequence_number));
        *self.sequence_number += 1;
    }
}

impl Items {
    pub(super) fn new(app: Arc<App>, form: Form) -> Self {
        let (done, open) = (Vec::new(), Open::Nothing);
        Self { app, form, done, open, sequence_number: 2, ended: None }
    }

    fn push(&mut self, piece: Piece, frames: &mut Vec<Vec<u8>>) {
        match piece {
            Piece::Reasoning(more, _) if more.is_empty() => {}
            Piece::Reasoning(more, _) => {
                if !matches!(self.open, Open::Reasoning { .. }) {
                    let id = format!("rs_{}", self.app.random.id());
                    self.begin(Open::Reasoning { id, text: String::new() }, frames);
                }
                self.add(&more, Vec::new(), frames);
            }
            Piece::Content(more, _) if more.is_empty() => {}
            Piece::Content(more, entries) => {
                if !matches!(self.open, Open::Message { .. }) {
                    let id = format!("msg_{}", self.app.random.id());
                    let (text, logprobs) = (String::new(), Vec::new());
                    self.begin(Open::Message { id, text, logprobs }, frames);
                }
                self.add(&more, entries, frames);
            }
            Piece::Call { id: call_id, name, .. } => {
                let id = format!("fc_{}", self.app.random.id());
                self.begin(Open::Call { id, call_id, name, arguments: String::new() }, frames);
            }
            Piece::Arguments { text, .. } => self.add(&text, Vec::new(), frames),
            Piece::CallEnd { .. } => self.end(Status::Completed, frames),
        }
    }

    fn begin(&mut self, open: Open, frames: &mut Vec<Vec<u8>>) {
        self.end(Status::Completed, frames);
        let output_index = self.done.len() as u32;
        let mut sink = Sink { frames, sequence_number: &mut self.sequence_number };
        if let Some(item) = open.empty_item() {
            sink.send(&Event::ItemAdded { output_index, item: &item });
        }
        if let Some((item_id, part)) = open.empty_part() {
            sink.send(&Event::PartAdded { item_id, output_index, content_index: 0, part: &part });
        }
        self.open = open;
    }

    fn add(&mut self, more: &str, entries: Vec<LogprobEntry>, frames: &mut Vec<Vec<u8>>) {
        let output_index = self.done.len() as u32;
        let mut sink = Sink { frames, sequence_number: &mut self.sequence_number };
        match &mut self.open {
            Open::Nothing => {}
            Open::Reasoning { id: item_id, text } => {
                text.push_str(more);
                sink.send(&Event::ReasoningDelta {
                    item_id,
                    output_index,
                    content_index: 0,
                    delta: more,
                });
            }
            Open::Message { id: item_id, text, logprobs } => {
                text.push_str(more);
                sink.send(&Event::TextDelta {
                    item_id,
                    output_index,
                    content_index: 0,
                    delta: more,
                    logprobs: &entries,
                });
                logprobs.extend(entries);
            }
            Open::Call { id: item_id, arguments, .. } => {
                arguments.push_str(more);
                sink.send(&Event::ArgumentsDelta { item_id, output_index, delta: more });
            }
        }
    }

    /// Ends the open item, if there is one; a call counts only if it is complete.
    fn end(&mut self, status: Status, frames: &mut Vec<Vec<u8>>) {
        let open = std::mem::replace(&mut self.open, Open::Nothing);
        let output_index = self.done.len() as u32;
        let mut sink = Sink { frames, sequence_number: &mut self.sequence_number };
        match &open {
            Open::Reasoning { id: item_id, text } => {
                sink.send(&Event::ReasoningDone { item_id, output_index, content_index: 0, text });
            }
            Open::Message { id: item_id, text, logprobs } => {
                sink.send(&Event::TextDone {
                    item_id,
                    output_index,
                    content_index: 0,
                    text,
                    logprobs,
                });
            }
            Open::Call { id: item_id, name, arguments, .. } if status == Status::Completed => {
                sink.send(&Event::ArgumentsDone { item_id, output_index, name, arguments });
            }
            Open::Nothing | Open::Call { .. } => return,
        }
        let Some(item) = open.into_item(status, self.form.seal_reasoning) else { return };
        if let Item::Reasoning { id, content, .. } | Item::Message { id, content, .. } = &item {
            for part in content {
                sink.send(&Event::PartDone { item_id: id, output_index, content_index: 0, part });
            }
        }
        sink.send(&Event::ItemDone { output_index, item: &item });
        self.done.push(item);
    }

    fn update(&mut self, update: Update<Piece>, usage: Usage) -> Vec<Vec<u8>> {
        let mut frames = Vec::with_capacity(update.pieces.len() + 4);
        for piece in update.pieces {
            self.push(piece, &mut frames);
        }
        if let Some(Ending { finish_reason, details, .. }) = update.ending {
            let whole = matches!(finish_reason, FinishReason::Stop | FinishReason::ToolCalls);
            // What is open when the model stops by itself is complete, but for a call.
            let is_call = matches!(self.open, Open::Call { .. });
            let status = if whole && !is_call { Status::Completed } else { Status::Incomplete };
            self.end(status, &mut frames);
            self.ended = Some((finish_reason, details, usage));
        }
        frames
    }

    /// The response as it stands.
    fn response<'a>(&'a self, status: Status, failure: Option<&'a ApiError>) -> Response<'a> {
        let incomplete = status == Status::Incomplete;
        let Form { id, created_at, model, echo, .. } = &self.form;
        Response {
            id,
            object: "response",
            created_at: *created_at,
            status,
            background: false,
            error: failure.map(|error| Failure { code: "server_error", message: &error.message }),
            incomplete_details: incomplete
                .then_some(IncompleteDetails { reason: "max_output_tokens" }),
            finish_details: self.ended.and_then(|(_, details, _)| details.unless_plain()),
            model,
            output: &self.done,
            previous_response_id: (),
            store: false,
            truncation: "disabled",
            usage: self.ended.map(|(.., usage)| usage.into()),
            echo,
        }
    }

    fn ended_as(&self) -> Status {
        match self.ended {
            Some((FinishReason::Stop | FinishReason::ToolCalls, ..)) => Status::Completed,
            Some((FinishReason::Length | FinishReason::InsufficientSystemResource, ..)) | None => {
                Status::Incomplete
            }
        }
    }
}

impl Open {
    /// The item as a stream begins it.
    fn empty_item(&self) -> Option<Item> {
        let status = Status::InProgress;
        let item = match self {
            Self::Nothing => return None,
            Self::Reasoning { id, .. } => {
                let (summary, content, encrypted_content) = ([], Vec::new(), None);
                Item::Reasoning { id: id.clone(), summary, content, encrypted_content, status }
            }
            Self::Message { id, .. } => {
                let (role, content) = ("assistant", Vec::new());
                Item::Message { id: id.clone(), status, role, content }
            }
            Self::Call { id, call_id, name, .. } => Item::FunctionCall {
                id: id.clone(),
                call_id: call_id.clone(),
                name: name.clone(),
                arguments: String::new(),
                status,
            },
        };
        Some(item)
    }

    /// The item's part as a stream begins it, and the item's id.
    fn empty_part(&self) -> Option<(&str, Part)> {
        let text = String::new();
        match self {
            Self::Nothing | Self::Call { .. } => None,
            Self::Reasoning { id, .. } => Some((id, Part::ReasoningText { text })),
            Self::Message { id, .. } => {
                let (annotations, logprobs) = ([], Vec::new());
                Some((id, Part::OutputText { text, annotations, logprobs }))
            }
        }
    }

    fn into_item(self, status: Status, seals: bool) -> Option<Item> {
        let item = match self {
            Self::Nothing => return None,
            Self::Reasoning { id, text } => Item::Reasoning {
                id,
                summary: [],
                encrypted_content: seals.then(|| seal(&text)),
                content: vec![Part::ReasoningText { text }],
                status,
            },
            Self::Message { id, text, logprobs } => Item::Message {
                id,
                status,
                role: "assistant",
                content: vec![Part::OutputText { text, annotations: [], logprobs }],
            },
            Self::Call { id, call_id, name, arguments } => {
                Item::FunctionCall { id, call_id, name, arguments, status }
            }
        };
        Some(item)
    }
}

impl Frames for Items {
    type Piece = Piece;

    fn begin(&self, _usage: Usage) -> Option<Vec<u8>> {
        let response = self.response(Status::InProgress, None);
        let mut frames = Event::Created { response: response.clone() }.to_frame(0);
        frames.append(&mut Event::InProgress { response }.to_frame(1));
        Some(frames)
    }

    fn update(&mut self, update: Update<Piece>, usage: Usage, events: &mut Vec<u8>) {
        for mut frame in Items::update(self, update, usage) {
            events.append(&mut frame);
        }
    }

    fn usage(&self, _usage: Usage) -> Option<Vec<u8>> {
        None
    }

    fn keep_alive(&self) -> Vec<u8> {
        sse::KEEP_ALIVE.into()
    }

    fn failure(&self, error: &ApiError) -> Vec<u8> {
        let response = self.response(Status::Failed, Some(error));
        Event::Failed { response }.to_frame(self.sequence_number)
    }

    fn last(&self) -> Vec<u8> {
        let status = self.ended_as();
        let response = self.response(status, None);
        let event = match status {
            Status::Completed => Event::Completed { response },
            Status::Incomplete | Status::InProgress | Status::Failed => {
                Event::Incomplete { response }
            }
        };
        event.to_frame(self.sequence_number)
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
    mut items: Items,
) -> Result<HttpResponse, ApiError> {
    while let Some(update) =
        generation.next().await.map_err(|failure| error::from_generate(&failure))?
    {
        let usage = generation.usage();
        items.update(update, usage);
    }
    items.ended = items.ended.map(|(reason, details, _)| (reason, details, generation.usage()));
    deliver::whole(record, &items.response(items.ended_as(), None))
}
