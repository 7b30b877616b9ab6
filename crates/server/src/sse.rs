//! The sending half of an event stream: bounded bytes, patient with slow readers, but not forever.
//!
//! A task writes events through an [`Outbox`]; the HTTP connection takes them from the [`Inbox`]
//! body at the client's pace. What waits between the two is bounded in bytes, and a reader that
//! takes nothing for too long is given up. Events that wait together leave in one write.
//!
//! A stream that ends early ends with an error of the body, so that no client takes a torn stream
//! for a whole one. Not here: what the events say.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::time::timeout;

use crate::config::SseConfig;

/// Most bytes that the connection takes at once, so that it does not become a second buffer.
const MAX_FRAME: usize = 64 * 1024;

/// The reader is gone, or as good as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// Where a stream's task puts its events. Dropping it before [`Outbox::end`] cuts the stream off.
pub(crate) struct Outbox {
    stream: Arc<Stream>,
    patience: Duration,
}

/// What both halves see. The lock is held for a few instructions and one copy of an event.
struct Stream {
    state: Mutex<State>,
    capacity: usize,
}

#[derive(Default)]
struct State {
    /// What the connection has not taken.
    waiting: BytesMut,
    end: Option<End>,
    /// The connection has dropped the body.
    reader_gone: bool,
    /// Whether the writer waits for room, and not only for the reader's departure.
    wants_room: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

enum End {
    AsItShould,
    CutOff,
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: End) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        wake(state.reader.take(), state);
    }
}

impl State {
    /// Takes an event in, or says that there is no room. One larger than the whole buffer waits
    /// until the buffer is empty.
    fn put(&mut self, event: &[u8], capacity: usize) -> Option<Result<(), Gone>> {
        if self.reader_gone {
            return Some(Err(Gone));
        }
        if !self.waiting.is_empty() && self.waiting.len() + event.len() > capacity {
            return None;
        }
        self.waiting.extend_from_slice(event);
        Some(Ok(()))
    }

    fn watch(&mut self, cx: &Context<'_>) {
        if self.writer.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            self.writer = Some(cx.waker().clone());
        }
    }
}

/// Wakes a task after the lock is released: it would only run into it.
fn wake(waker: Option<Waker>, state: MutexGuard<'_, State>) {
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A stream and the response that carries it.
pub(crate) fn channel(config: &SseConfig) -> (Outbox, Response) {
    let stream = Arc::new(Stream { state: Mutex::default(), capacity: config.buffer_bytes });
    let inbox = Inbox { stream: Arc::clone(&stream), ended: false };
    let mut response = Response::new(Body::new(inbox));
    write_headers(response.headers_mut());
    (Outbox { stream, patience: config.write_timeout() }, response)
}

fn write_headers(headers: &mut HeaderMap) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies like nginx would otherwise hold events back.
    let no_buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(no_buffering, HeaderValue::from_static("no"));
}

impl Outbox {
    /// Queues whole events, waiting for room if the reader is slow.
    pub(crate) async fn send(&self, events: impl AsRef<[u8]>) -> Result<(), Gone> {
        let events = events.as_ref();
        if let Some(result) = self.put(events, None) {
            return result;
        }
        let for_room = poll_fn(|cx| self.put(events, Some(cx)).map_or(Poll::Pending, Poll::Ready));
        timeout(self.patience, for_room).await.unwrap_or(Err(Gone))
    }

    /// Queues events if there is room; the task of `cx` is woken when there is.
    fn put(&self, events: &[u8], cx: Option<&Context<'_>>) -> Option<Result<(), Gone>> {
        let mut state = self.stream.lock();
        let put = state.put(events, self.stream.capacity);
        state.wants_room = put.is_none();
        match (&put, cx) {
            (Some(_), _) => wake(state.reader.take(), state),
            (None, Some(cx)) => state.watch(cx),
            (None, None) => {}
        }
        put
    }

    /// Waits until the reader is gone.
    pub(crate) async fn closed(&self) {
        poll_fn(|cx| {
            let mut state = self.stream.lock();
            if state.reader_gone {
                return Poll::Ready(());
            }
            state.watch(cx);
            Poll::Pending
        })
        .await;
    }

    /// Ends the stream as it should end.
    pub(crate) fn end(self) {
        self.stream.end(End::AsItShould);
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.stream.end(End::CutOff);
    }
}

/// The body that the connection reads.
struct Inbox {
    stream: Arc<Stream>,
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
        let mut state = self.stream.lock();
        if !state.waiting.is_empty() {
            let size = state.waiting.len().min(MAX_FRAME);
            let bytes = state.waiting.split_to(size).freeze();
            let writer = if state.wants_room { state.writer.take() } else { None };
            wake(writer, state);
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        let ended = match state.end {
            Some(End::AsItShould) => None,
            Some(End::CutOff) => Some(Err(CutOff)),
            None => {
                if state.reader.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    state.reader = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
        };
        drop(state);
        self.ended = true;
        Poll::Ready(ended)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut state = self.stream.lock();
        state.reader_gone = true;
        state.waiting = BytesMut::new();
        wake(state.writer.take(), state);
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn with_room_for(buffer_bytes: usize) -> (Outbox, Body) {
        let (outbox, response) = channel(&SseConfig { buffer_bytes, ..SseConfig::default() });
        (outbox, response.into_body())
    }

    async fn read(body: &mut Body) -> Option<Bytes> {
        let frame = body.frame().await?.expect("not cut off");
        Some(frame.into_data().expect("events are data"))
    }

    #[tokio::test]
    async fn events_that_wait_together_leave_together_and_in_order() {
        let (outbox, mut body) = with_room_for(100);
        outbox.send("data: a\n\n").await.unwrap();
        outbox.send("data: b\n\n").await.unwrap();
        assert_eq!(read(&mut body).await.unwrap(), "data: a\n\ndata: b\n\n");
        outbox.send("data: c\n\n").await.unwrap();
        outbox.end();
        assert_eq!(read(&mut body).await.unwrap(), "data: c\n\n");
        assert_eq!(read(&mut body).await, None);
    }

    #[tokio::test]
    async fn a_full_buffer_takes_no_more_until_it_is_read() {
        let (outbox, mut body) = with_room_for(4);
        outbox.send("1234").await.unwrap();
        let (sent, read) = tokio::join!(outbox.send("56"), async {
            tokio::task::yield_now().await;
            read(&mut body).await
        });
        assert_eq!((sent, read.unwrap()), (Ok(()), Bytes::from("1234")));
        assert_eq!(self::read(&mut body).await.unwrap(), "56");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_given_up() {
        let (outbox, _body) = with_room_for(4);
        outbox.send("12345678").await.expect("an empty buffer takes any event");
        assert_eq!(outbox.send("9").await, Err(Gone));
    }

    #[tokio::test]
    async fn a_reader_that_leaves_is_noticed_while_writing_and_while_waiting() {
        let (outbox, body) = with_room_for(4);
        outbox.send("1234").await.unwrap();
        let (sent, ()) = tokio::join!(outbox.send("5"), async { drop(body) });
        assert_eq!(sent, Err(Gone));
        outbox.closed().await;
    }

    #[tokio::test]
    async fn a_stream_without_its_end_is_an_error_of_the_body() {
        let (outbox, mut body) = with_room_for(100);
        outbox.send("data: a\n\n").await.unwrap();
        drop(outbox);
        assert!(body.frame().await.unwrap().is_ok());
        assert!(body.frame().await.unwrap().is_err());
    }
}
