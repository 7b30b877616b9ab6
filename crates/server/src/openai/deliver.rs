//! Answers on their way to the client: a whole response, or a stream of events.
//!
//! Everything that can refuse a request has happened before; a stream that has begun ends with
//! the last event of its surface or with an error event, never silently. Not here: the JSON of
//! either form (`chat`, `completions`, `anthropic`).

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::to_bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use fathom_engine::GenerateError;
use fathom_protocol::openai::response::Usage;
use fathom_protocol::{ApiError, ErrorCode, Surface, sse};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::app::App;
use crate::error;
use crate::generate::{Answer, Generation, Update};
use crate::record::Record;
use crate::sse::{Outbox, channel};

/// Bytes of events beyond which those that are ready leave in more than one write.
const MAX_WRITE: usize = 16 * 1024;

/// How the events of one kind of stream are written.
pub(crate) trait Frames: Send + 'static {
    /// What is new in an answer.
    type Piece;

    /// Appends the events of an update; `usage` is what the whole request has used so far.
    fn update(&mut self, update: Update<Self::Piece>, usage: Usage, events: &mut Vec<u8>);

    /// The event after the last, for clients that asked for it.
    fn usage(&self, usage: Usage) -> Option<Vec<u8>>;

    /// The event before the first, sent at once.
    fn begin(&self, _usage: Usage) -> Option<Vec<u8>> {
        None
    }

    /// What is sent after too long a silence.
    fn keep_alive(&self) -> Vec<u8> {
        sse::KEEP_ALIVE.into()
    }

    /// The last event of a stream that fails.
    fn failure(&self, error: &ApiError) -> Vec<u8> {
        sse::raw_event(&error.to_json(Surface::OpenAi, ""))
    }

    /// The last event of a stream that does not.
    fn last(&self) -> Vec<u8> {
        sse::DONE.into()
    }

    /// Whether the client understands that the server cut an answer.
    fn shows_cuts(&self) -> bool {
        true
    }
}

/// Answers with a stream, whose task the server waits for at shutdown.
pub(crate) fn stream<A, F>(app: &Arc<App>, generation: Generation<A>, frames: F) -> Response
where
    A: Answer + Send + 'static,
    F: Frames<Piece = A::Piece>,
    A::Piece: Send,
{
    let (outbox, response) = channel(&app.config.sse);
    app.tasks.spawn(write(Arc::clone(app), generation, frames, outbox));
    response
}

/// Writes a stream until its end, its failure, or its reader's departure. Events that are ready at
/// the same time leave together, each still an event of its own.
async fn write<A, F>(app: Arc<App>, mut generation: Generation<A>, mut frames: F, outbox: Outbox)
where
    A: Answer,
    F: Frames<Piece = A::Piece>,
{
    let keep_alive = Duration::from_secs(app.config.sse.keepalive_s);
    // One timer for the whole stream: it is set again when it fires, not with every event.
    let mut alarm = pin!(sleep(keep_alive));
    let mut spoke = Instant::now();
    let mut events = frames.begin(generation.usage()).unwrap_or_default();
    if !events.is_empty() && outbox.send(&events).await.is_err() {
        return;
    }
    let end = loop {
        let first = tokio::select! {
            biased;
            event = generation.next() => event,
            () = outbox.closed() => return,
            () = alarm.as_mut() => {
                if spoke.elapsed() >= keep_alive {
                    if outbox.send(frames.keep_alive()).await.is_err() {
                        return;
                    }
                    spoke = Instant::now();
                }
                alarm.as_mut().reset(spoke + keep_alive);
                continue;
            }
        };
        events.clear();
        let end = take_ready(first, &mut generation, &mut frames, &mut events);
        if end.is_some() {
            break end;
        }
        if outbox.send(&events).await.is_err() {
            return;
        }
        spoke = Instant::now();
    };
    if let Some(Err(failure)) = end {
        if !(app.config.compat.insufficient_resource && frames.shows_cuts() && is_cut(&failure)) {
            events.append(&mut frames.failure(&error::from_generate(&failure)));
            // The client may be gone as well; either way this is the end.
            let _ = outbox.send(&events).await;
            return outbox.end();
        }
        for update in generation.cut() {
            frames.update(update, generation.usage(), &mut events);
        }
    }
    events.append(&mut frames.usage(generation.usage()).unwrap_or_default());
    // The request is over before the client hears so: whoever asks next finds it gone.
    drop(generation);
    events.append(&mut frames.last());
    if outbox.send(&events).await.is_ok() {
        outbox.end();
    }
}

/// Appends the events of everything that is ready, from `first` on; says how the generation ended
/// if it did.
fn take_ready<A, F>(
    first: Result<Option<Update<A::Piece>>, GenerateError>,
    generation: &mut Generation<A>,
    frames: &mut F,
    events: &mut Vec<u8>,
) -> Option<Result<(), GenerateError>>
where
    A: Answer,
    F: Frames<Piece = A::Piece>,
{
    let mut next = Some(first);
    while let Some(event) = next {
        match event {
            Ok(Some(update)) => frames.update(update, generation.usage(), events),
            Ok(None) => return Some(Ok(())),
            Err(failure) => return Some(Err(failure)),
        }
        next = if events.len() < MAX_WRITE { generation.next_ready() } else { None };
    }
    None
}

/// Runs a generation to its end and hands every update to `add`.
///
/// # Errors
/// What the client is told if a choice fails.
pub(crate) async fn gather<A: Answer>(
    app: &App,
    mut generation: Generation<A>,
    mut add: impl FnMut(Update<A::Piece>),
) -> Result<Usage, ApiError> {
    loop {
        match generation.next().await {
            Ok(Some(update)) => add(update),
            Ok(None) => return Ok(generation.usage()),
            Err(failure) if app.config.compat.insufficient_resource && is_cut(&failure) => {
                generation.cut().into_iter().for_each(&mut add);
                return Ok(generation.usage());
            }
            Err(failure) => return Err(error::from_generate(&failure)),
        }
    }
}

/// The hosted API knows the feature at `param` under `/beta` only, and so may this server.
pub(crate) fn beta_only(param: String) -> ApiError {
    let message = format!("`{param}` is supported under /beta only.");
    ApiError::at(ErrorCode::UnsupportedParameter, param, message)
}

/// Names the request's sampling fields that had no effect.
pub(crate) fn name_ignored(response: &mut Response, ignored: &[&'static str]) {
    if !ignored.is_empty() {
        let names = HeaderValue::from_str(&ignored.join(", ")).expect("field names are ASCII");
        response.headers_mut().insert(HeaderName::from_static("x-ignored-params"), names);
    }
}

/// Waits for a whole answer. If the server is told so, the client hears line ends meanwhile, as from
/// the hosted API: the status is then 200 whatever comes, and an error is the body's.
///
/// # Errors
/// What the client is told if the answer fails before anything was sent.
pub(crate) async fn wait(
    app: &Arc<App>,
    record: &Arc<Record>,
    surface: Surface,
    answer: impl Future<Output = Result<Response, ApiError>> + Send + 'static,
) -> Result<Response, ApiError> {
    if !app.config.compat.nonstream_keepalive {
        return answer.await;
    }
    let (outbox, mut response) = channel(&app.config.sse);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let keep_alive = Duration::from_secs(app.config.sse.keepalive_s);
    let record = Arc::clone(record);
    app.tasks.spawn(async move {
        let mut answer = pin!(answer);
        let answered = loop {
            tokio::select! {
                answered = &mut answer => break answered,
                () = outbox.closed() => return,
                () = tokio::time::sleep(keep_alive) => {
                    if outbox.send("\n").await.is_err() {
                        return;
                    }
                }
            }
        };
        let body = match answered {
            Ok(response) => to_bytes(response.into_body(), usize::MAX).await.unwrap_or_default(),
            Err(error) => error.to_json(surface, &record.id).into(),
        };
        if outbox.send(body).await.is_ok() {
            outbox.end();
        }
    });
    Ok(response)
}

/// Whether the server cut the generation, as opposed to never starting it.
const fn is_cut(failure: &GenerateError) -> bool {
    matches!(failure, GenerateError::ShuttingDown | GenerateError::StepFailed { .. })
}

/// A whole response, with how long it took.
///
/// # Errors
/// An internal error if `body` does not serialise.
pub(crate) fn whole(record: &Record, body: &impl Serialize) -> Result<Response, ApiError> {
    let json = serde_json::to_string(body).map_err(|error| error::internal(&error))?;
    let mut response = ([(CONTENT_TYPE, "application/json")], json).into_response();
    let elapsed = u64::try_from(record.began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let name = HeaderName::from_static("openai-processing-ms");
    response.headers_mut().insert(name, HeaderValue::from(elapsed));
    Ok(response)
}
