//! The raw limit: the HTTP stack of the server without the server, writing one chunk again and
//! again.
//!
//! A thread ticks like an engine: each event goes through a channel of its stream, whose reader is
//! the body itself. Not here: anything about tokens.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::readers::Readings;
use super::served::ReadyTimes;
use crate::{Load, REACTOR};

/// Runs `read` against a server whose events have about `bytes` bytes, chunk framing included.
pub(crate) fn run(
    load: &Load,
    bytes: f64,
    times: &Arc<ReadyTimes>,
    read: impl FnOnce(SocketAddr) -> Readings,
) -> Readings {
    let payload = (bytes as usize).saturating_sub("7f\r\n\r\n".len());
    let event = "data: ".to_owned() + &"x".repeat(payload.saturating_sub(8)) + "\n\n";
    let event = Bytes::from(event);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(REACTOR)
        .enable_all()
        .build()
        .expect("a runtime");
    let streams = Streams::default();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    let serving = runtime.spawn(serve(listener, streams.clone()));
    let (load, ticker) = (*load, std::thread::Builder::new().name("bench-engine".into()));
    let times = Arc::clone(times);
    let ticker = ticker.spawn(move || tick(&load, &streams, &event, &times)).expect("a thread");
    let readings = read(address);
    ticker.join().expect("a ticker that does not fail");
    serving.abort();
    readings
}

/// Where the events of the open streams go.
type Streams = Arc<Mutex<Vec<UnboundedSender<Bytes>>>>;

async fn serve(listener: TcpListener, streams: Streams) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).expect("a TCP stream");
        let streams = Arc::clone(&streams);
        let answer = service_fn(move |_: Request<Incoming>| {
            let (sender, receiver) = unbounded_channel();
            streams.lock().expect("no panic while it is held").push(sender);
            async { Ok::<_, Infallible>(Response::new(Chunks(receiver))) }
        });
        connections.spawn(async move {
            // A reader that leaves ends its own connection only.
            let _ = Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

/// Streams are numbered as they were opened here and as they connected at the reader; all get an
/// event at about the same time, so that is as good for [`ReadyTimes`].
fn tick(load: &Load, streams: &Streams, event: &Bytes, times: &ReadyTimes) {
    let all = loop {
        let mut open = streams.lock().expect("no panic while it is held");
        if open.len() == load.n_streams {
            break std::mem::take(&mut *open);
        }
        drop(open);
        std::thread::yield_now();
    };
    for token in 0..load.n_events {
        std::thread::sleep(load.tick);
        for (number, stream) in all.iter().enumerate() {
            times.note(number, token);
            stream.send(event.clone()).expect("a reader that stays");
        }
    }
}

struct Chunks(UnboundedReceiver<Bytes>);

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let event = ready!(self.0.poll_recv(cx));
        Poll::Ready(event.map(|bytes| Ok(Frame::data(bytes))))
    }
}
