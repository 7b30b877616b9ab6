//! The record of one request: filled in on its way, told once when the last part of it is gone.
//!
//! The record outlives the handler: a stream's task holds it until the last event is written. On
//! drop it counts the request, writes its line of the access log and its trace, whatever way the
//! request ended.
//!
//! Not here: request or answer text, which never reaches a log.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fathom_engine::RequestTimes;

use crate::app::App;
use crate::routes;
use crate::telemetry::{Finished, TraceContext};

/// Status of a request whose client left before an answer; as other servers count it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// What is known about a request so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// The route's template.
    pub(crate) endpoint: Option<&'static str>,
    /// The resolved model's canonical id.
    pub(crate) model: Option<String>,
    /// The status that was sent.
    pub(crate) status: Option<u16>,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) reasoning_tokens: u64,
    /// Of the first choice.
    pub(crate) times: Option<RequestTimes>,
    pub(crate) finish_reason: Option<&'static str>,
}

/// One request's record.
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) began: Instant,
    /// [`Record::began`] by the clock on the wall.
    began_at: SystemTime,
    trace: TraceContext,
    app: Arc<App>,
    facts: Mutex<Facts>,
}

impl Record {
    pub(crate) fn new(app: Arc<App>, id: String, trace: TraceContext) -> Self {
        let (began, began_at) = (Instant::now(), SystemTime::now());
        Self { id, began, began_at, trace, app, facts: Mutex::default() }
    }

    /// Adds to what is known.
    pub(crate) fn note(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Says which fields of the body were ignored; by name, never by value.
    pub(crate) fn note_unknown(&self, fields: &[String]) {
        if !fields.is_empty() {
            tracing::debug!(request_id = %self.id, ?fields, "ignored fields");
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let facts = self.facts.get_mut().unwrap_or_else(PoisonError::into_inner);
        let total = self.began.elapsed();
        let status = facts.status.unwrap_or(CLIENT_CLOSED_REQUEST);
        let endpoint = facts.endpoint.unwrap_or("other");
        let model = facts.model.as_deref().unwrap_or("other");
        self.app.metrics.count_request(model, endpoint, status, facts, total);
        // What only asks how the server is would bury the traces of those who use it.
        if let Some(tracer) = self.app.tracer.as_ref().filter(|_| routes::is_posted(endpoint)) {
            let request = Finished {
                context: self.trace,
                request_id: &self.id,
                endpoint,
                status,
                facts,
                began: (self.began_at, self.began),
                took: total,
            };
            tracer.record(&request, || self.app.random.draw());
        }
        let (queue_ms, ttft_ms) = facts.times.map_or((0, 0), |times| {
            let since = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(self.began));
            let queued = times.started.map(|at| at.saturating_duration_since(times.submitted));
            (millis(queued), millis(since(times.first_token)))
        });
        tracing::info!(
            target: "fathom::access",
            request_id = %self.id,
            endpoint,
            model,
            status,
            prompt_tokens = facts.prompt_tokens,
            cached_tokens = facts.cached_tokens,
            completion_tokens = facts.completion_tokens,
            queue_ms,
            ttft_ms,
            total_ms = millis(Some(total)),
            finish_reason = facts.finish_reason.unwrap_or("none"),
            "request"
        );
    }
}

fn millis(duration: Option<Duration>) -> u64 {
    duration.map_or(0, |duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}
