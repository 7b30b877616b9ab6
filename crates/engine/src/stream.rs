//! The receiving end of one request: its events, its times, its cancellation.
//!
//! Dropping a [`TokenStream`] before its final event cancels the request: the step loop reads
//! commands before it plans, so the request takes part in no step planned afterwards.

use std::sync::{Arc, OnceLock, mpsc};
use std::time::Instant;

use fathom_core::RequestId;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;

use crate::handle::{Command, TokenEvent};

/// When things happened to a request, written by the step loop as they happen.
#[derive(Debug)]
pub(crate) struct RequestClock {
    submitted: Instant,
    pub(crate) started: OnceLock<Instant>,
    pub(crate) first_token: OnceLock<Instant>,
    pub(crate) finished: OnceLock<Instant>,
}

impl RequestClock {
    pub(crate) const fn new(submitted: Instant) -> Self {
        Self {
            submitted,
            started: OnceLock::new(),
            first_token: OnceLock::new(),
            finished: OnceLock::new(),
        }
    }
}

/// When things happened to a request. Queue time ends at `started`, prefill at `first_token`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestTimes {
    /// The request was accepted.
    pub submitted: Instant,
    /// The first step with any of its tokens was about to run.
    pub started: Option<Instant>,
    /// Its first token was sampled.
    pub first_token: Option<Instant>,
    /// Its final event was sent.
    pub finished: Option<Instant>,
}

/// The events of one request. Ends with exactly one final event; dropping it earlier cancels the
/// request within one step.
#[derive(Debug)]
pub struct TokenStream {
    id: RequestId,
    events: UnboundedReceiver<TokenEvent>,
    clock: Arc<RequestClock>,
    commands: mpsc::Sender<Command>,
    ended: bool,
}

impl TokenStream {
    pub(crate) const fn new(
        id: RequestId,
        events: UnboundedReceiver<TokenEvent>,
        clock: Arc<RequestClock>,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        Self { id, events, clock, commands, ended: false }
    }

    /// The request's number, unique in this process.
    #[must_use]
    pub const fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after the final one. Cancel safe.
    pub async fn recv(&mut self) -> Option<TokenEvent> {
        let event = self.events.recv().await;
        self.note(event)
    }

    /// The next event if one is there already.
    pub fn try_recv(&mut self) -> Option<TokenEvent> {
        match self.events.try_recv() {
            Ok(event) => self.note(Some(event)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => self.note(None),
        }
    }

    /// The next event, waiting for it on a thread that is not part of an async runtime.
    pub fn blocking_recv(&mut self) -> Option<TokenEvent> {
        let event = self.events.blocking_recv();
        self.note(event)
    }

    fn note(&mut self, event: Option<TokenEvent>) -> Option<TokenEvent> {
        self.ended |= event.as_ref().is_none_or(TokenEvent::is_final);
        event
    }

    /// Asks the engine to stop; the stream then ends with `Finished` and the reason `Cancelled`
    /// (or with whatever came first), which tells the exact usage.
    pub fn cancel(&self) {
        if !self.ended {
            // A step loop that is gone has sent the final event already.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }

    /// When things happened to this request so far.
    #[must_use]
    pub fn times(&self) -> RequestTimes {
        RequestTimes {
            submitted: self.clock.submitted,
            started: self.clock.started.get().copied(),
            first_token: self.clock.first_token.get().copied(),
            finished: self.clock.finished.get().copied(),
        }
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.cancel();
    }
}
