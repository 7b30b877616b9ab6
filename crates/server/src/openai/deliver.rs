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

use crate::app::App;
use crate::error;
use crate::generate::{Answer, Generation, Update};
use crate::record::Record;
use crate::sse::{Outbox, channel};

/// How the events of one kind of stream are written.
pub(crate) trait Frames: Send + 'static {
    /// What is new in an answer.
    type Piece;

    /// The events of an update; `usage` is what the whole request has used so far.
    fn update(&mut self, update: Update<Self::Piece>, usage: Usage) -> Vec<Vec<u8>>;

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

/// Writes a stream until its end, its failure, or its reader's departure.
async fn write<A, F>(app: Arc<App>, mut generation: Generation<A>, mut frames: F, outbox: Outbox)
where
    A: Answer,
    F: Frames<Piece = A::Piece>,
{
    let keep_alive = Duration::from_secs(app.config.sse.keepalive_s);
    if let Some(frame) = frames.begin(generation.usage())
        && outbox.send(frame).await.is_err()
    {
        return;
    }
    loop {
        let event = tokio::select! {
            event = generation.next() => event,
            () = outbox.closed() => return,
            () = tokio::time::sleep(keep_alive) => {
                if outbox.send(frames.keep_alive()).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let (updates, ended) = match event {
            Ok(Some(update)) => (vec![update], false),
            Ok(None) => (Vec::new(), true),
            Err(failure)
                if app.config.compat.insufficient_resource
                    && frames.shows_cuts()
                    && is_cut(&failure) =>
            {
                (generation.cut(), true)
            }
            Err(failure) => {
                let frame = frames.failure(&error::from_generate(&failure));
                // The client may be gone as well; either way this is the end.
                let _ = outbox.send(frame).await;
                return outbox.end();
            }
        };
        for update in updates {
            for frame in frames.update(update, generation.usage()) {
                if outbox.send(frame).await.is_err() {
                    return;
                }
            }
        }
        if ended {
            break;
        }
    }
    if let Some(frame) = frames.usage(generation.usage())
        && outbox.send(frame).await.is_err()
    {
        return;
    }
    // The request is over before the client hears so: whoever asks next finds it gone.
    drop(generation);
    if outbox.send(frames.last()).await.is_ok() {
        outbox.end();
    }
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
