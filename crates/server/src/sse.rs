//! The sending half of an event stream: bounded bytes, patient with slow readers, but not forever.
//!
//! A task writes events through an [`Outbox`]; the HTTP connection takes them from the [`Inbox`]
//! body at the client's pace. What waits between the two is bounded in bytes, and a reader that
//! takes nothing for too long is given up.
//!
//! A stream that ends early ends with an error of the body, so that no client takes a torn stream
//! for a whole one. Not here: what the events say.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use bytes::Bytes;
use http_body::Frame;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::config::SseConfig;

/// The reader is gone, or as good as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// Where a stream's task puts its events.
pub(crate) struct Outbox {
    events: mpsc::UnboundedSender<Event>,
    /// One permit per byte that may still wait.
    room: Arc<Semaphore>,
    capacity: u32,
    patience: Duration,
}

enum Event {
    /// The bytes, and the room they took.
    Data(Bytes, u32),
    /// The stream is over as it should be. Without it the body ends with an error.
    End,
}

/// A stream and the response that carries it.
pub(crate) fn channel(config: &SseConfig) -> (Outbox, Response) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let capacity = u32::try_from(config.buffer_bytes).unwrap_or(u32::MAX);
    let capacity = capacity.min(u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
    let room = Arc::new(Semaphore::new(capacity as usize));
    let inbox = Inbox { events: receiver, room: Arc::clone(&room), ended: false };
    let mut response = Response::new(Body::new(inbox));
    write_headers(response.headers_mut());
    let patience = config.write_timeout();
    (Outbox { events: sender, room, capacity, patience }, response)
}

fn write_headers(headers: &mut HeaderMap) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies like nginx would otherwise hold events back.
    let no_buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(no_buffering, HeaderValue::from_static("no"));
}

impl Outbox {
    /// Queues one event, waiting for room if the reader is slow.
    pub(crate) async fn send(&self, event: impl Into<Bytes>) -> Result<(), Gone> {
        let event = event.into();
        // An event larger than the whole buffer waits until the buffer is empty.
        let size = u32::try_from(event.len()).unwrap_or(u32::MAX).min(self.capacity);
        let room = tokio::select! {
            room = timeout(self.patience, self.room.acquire_many(size)) => room,
            () = self.events.closed() => return Err(Gone),
        };
        match room {
            Ok(Ok(permits)) => permits.forget(),
            Ok(Err(_)) | Err(_) => return Err(Gone),
        }
        self.events.send(Event::Data(event, size)).map_err(|_| Gone)
    }

    /// Waits until the reader is gone.
    pub(crate) async fn closed(&self) {
        self.events.closed().await;
    }

    /// Ends the stream as it should end.
    pub(crate) fn end(self) {
        // A reader that left misses nothing.
        let _ = self.events.send(Event::End);
    }
}

/// The body that the connection reads.
struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    room: Arc<Semaphore>,
    ended: bool,
}

/// The stream's task stopped before its end.
#[derive(Debug, thiserror::Error)]
#[error("the event stream was cut off")]
struct CutOff;

impl http_body::Body for Inbox {
    type Data = Bytes;
    type Error = CutOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match std::task::ready!(self.events.poll_recv(cx)) {
            Some(Event::Data(bytes, size)) => {
                self.room.add_permits(size as usize);
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Some(Event::End) => {
                self.ended = true;
                Poll::Ready(None)
            }
            None => {
                self.ended = true;
                Poll::Ready(Some(Err(CutOff)))
            }
        }
    }
}
