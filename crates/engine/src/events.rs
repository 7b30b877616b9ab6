//! The sending end of a request's stream.
//!
//! An [`EventSink`] sends its final event even if nobody remembers to: dropping it unfinished fails
//! the request. That is what makes "exactly one final event" hold through panics and races at
//! shutdown.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::handle::{GenerateError, TokenEvent};
use crate::stream::RequestClock;

/// Sends one request's events.
pub(crate) struct EventSink {
    sender: UnboundedSender<TokenEvent>,
    clock: Arc<RequestClock>,
    finished: bool,
}

impl EventSink {
    pub(crate) const fn new(sender: UnboundedSender<TokenEvent>, clock: Arc<RequestClock>) -> Self {
        Self { sender, clock, finished: false }
    }

    /// Notes that a step with the request is about to run; only the first one counts.
    pub(crate) fn start(&self, now: Instant) {
        let _ = self.clock.started.set(now);
    }

    /// Sends an event. A reader that has gone away cancels by its own command.
    pub(crate) fn send(&mut self, event: TokenEvent, now: Instant) {
        debug_assert!(!self.finished, "nothing follows the final event");
        match event {
            TokenEvent::Token { .. } => {
                let _ = self.clock.first_token.set(now);
            }
            TokenEvent::Finished { .. } | TokenEvent::Failed(_) => {
                self.finished = true;
                let _ = self.clock.finished.set(now);
            }
        }
        let _ = self.sender.send(event);
    }
}

impl Drop for EventSink {
    fn drop(&mut self) {
        if !self.finished {
            let error = if std::thread::panicking() {
                GenerateError::StepFailed { message: "the step loop panicked".to_owned() }
            } else {
                GenerateError::ShuttingDown
            };
            self.send(TokenEvent::Failed(error), Instant::now());
        }
    }
}
