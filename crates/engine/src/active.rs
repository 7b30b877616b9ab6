//! A request in the engine, and what it is told.
//!
//! What a step gives is sent while the next one runs: to wake a reader takes microseconds, and a
//! device that waits for its next step would wait for every reader of a batch.
//!
//! Invariants:
//! - events of a request leave in the order in which they happened, the final one last;
//! - an ended request is told so even when its place has gone to another one.
//!
//! Not here: when to send (the step loop does, beside a step or when there is none).

use std::time::Instant;

use crate::events::EventSink;
use crate::handle::{GenerateError, QueueTicket, TokenEvent};
use crate::sample::RequestSampler;

/// One request as the engine sees it; the scheduler has its tokens.
pub(crate) struct Active {
    pub(crate) sampler: RequestSampler,
    /// Held until its first step.
    pub(crate) ticket: Option<QueueTicket>,
    /// Why it is about to end as failed.
    pub(crate) failure: Option<GenerateError>,
    events: EventSink,
    unsent: Vec<(TokenEvent, Instant)>,
}

impl Active {
    pub(crate) const fn new(
        sampler: RequestSampler,
        events: EventSink,
        ticket: QueueTicket,
    ) -> Self {
        Self { sampler, ticket: Some(ticket), failure: None, events, unsent: Vec::new() }
    }

    /// Notes that a step with the request is about to run.
    pub(crate) fn start(&mut self, now: Instant) {
        self.events.start(now);
        self.ticket = None;
    }

    fn send(&mut self) {
        for (event, at) in self.unsent.drain(..) {
            self.events.send(event, at);
        }
    }
}

impl Drop for Active {
    /// Whichever way a request goes, it is told what it got.
    fn drop(&mut self) {
        self.send();
    }
}

/// Events that are still to be sent.
#[derive(Default)]
pub(crate) struct Outbox {
    /// Requests with events, by index; one that has ended since is among `ended`.
    waiting: Vec<u32>,
    ended: Vec<Active>,
}

impl Outbox {
    /// Keeps an event of the request with this index.
    pub(crate) fn keep(
        &mut self,
        index: u32,
        request: &mut Active,
        event: TokenEvent,
        at: Instant,
    ) {
        if request.unsent.is_empty() {
            self.waiting.push(index);
        }
        request.unsent.push((event, at));
    }

    /// Keeps a request that has ended, with its final event.
    pub(crate) fn end(&mut self, mut request: Active, event: TokenEvent, at: Instant) {
        request.ticket = None;
        request.unsent.push((event, at));
        self.ended.push(request);
    }

    /// Sends everything; `requests` are by index.
    pub(crate) fn send(&mut self, requests: &mut [Option<Active>]) {
        for index in self.waiting.drain(..) {
            if let Some(request) = requests.get_mut(index as usize).and_then(Option::as_mut) {
                request.send();
            }
        }
        self.ended.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fathom_core::SamplingParams;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::stream::RequestClock;

    fn request() -> (Active, UnboundedReceiver<TokenEvent>) {
        let (sender, receiver) = unbounded_channel();
        let clock = Arc::new(RequestClock::new(Instant::now()));
        let sampler = RequestSampler::new(SamplingParams::greedy(9), &[1], None);
        let events = EventSink::new(sender, clock);
        let (ticket, failure, unsent) = (None, None, Vec::new());
        (Active { sampler, ticket, failure, events, unsent }, receiver)
    }

    fn token(id: u32) -> TokenEvent {
        TokenEvent::Token { id, logprob: None }
    }

    fn failed() -> TokenEvent {
        TokenEvent::Failed(GenerateError::ShuttingDown)
    }

    fn received(receiver: &mut UnboundedReceiver<TokenEvent>) -> Vec<TokenEvent> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    #[test]
    fn an_ended_request_gets_all_it_was_given_and_the_next_in_its_place_gets_none_of_it() {
        let (now, mut outbox) = (Instant::now(), Outbox::default());
        let (first, mut of_first) = request();
        let mut requests = vec![Some(first)];
        for id in [5, 6] {
            outbox.keep(0, requests[0].as_mut().unwrap(), token(id), now);
        }
        outbox.end(requests[0].take().unwrap(), failed(), now);
        let (second, mut of_second) = request();
        requests[0] = Some(second);
        outbox.keep(0, requests[0].as_mut().unwrap(), token(7), now);
        assert_eq!(received(&mut of_first), []);
        outbox.send(&mut requests);
        assert_eq!(received(&mut of_first), [token(5), token(6), failed()]);
        assert_eq!(received(&mut of_second), [token(7)]);
        outbox.send(&mut requests);
        assert_eq!(received(&mut of_second), []);
    }

    #[test]
    fn a_request_that_is_dropped_gets_its_events_before_its_end() {
        let (mut request, mut receiver) = request();
        Outbox::default().keep(0, &mut request, token(5), Instant::now());
        drop(request);
        assert_eq!(received(&mut receiver), [token(5), failed()]);
    }
}
