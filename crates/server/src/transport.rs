//! Connections: accepting them, bounding them, and ending them in order.
//!
//! What holds for every connection: a client that sends its request head too slowly (or, on HTTP/2,
//! answers no ping), or takes nothing of an answer for too long, is dropped; a connection that ends
//! with unread input lingers, so that the answer reaches the client before the reset would.
//!
//! Not here: requests ([`crate::routes`]); which requests a shutdown waits for (the engine's drain).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{ServiceExt, service_fn};

use crate::routes;
use crate::tls::Tls;

/// Bytes that tell HTTP/1.1 from HTTP/2; the parser's own timeout begins after them.
const PREFACE_BYTES: usize = 24;
/// Header fields and bytes beyond which the connection's parser gives up without an envelope. More
/// than [`crate::observe`] allows, so that requests a little too large get a proper answer.
const MAX_PARSED_HEADERS: usize = 512;
const MAX_READ_BUFFER: usize = 256 * 1024;
/// A finished connection takes what the client still sends until it pauses for this long,
const LINGER_PAUSE: Duration = Duration::from_millis(250);
/// and in all for this long.
const LINGER_TOTAL: Duration = Duration::from_secs(5);
/// Pause after a failed accept, so that a lack of file descriptors does not burn the CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a client may take over things.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Sending a whole request head.
    pub(crate) head: Duration,
    /// Taking nothing of an answer.
    pub(crate) write: Duration,
}

/// Accepts connections until `stop`; each then ends after its current request. With `tls` nothing
/// but TLS is spoken.
pub(crate) async fn accept(
    listener: &TcpListener,
    router: Router,
    tls: Option<&Tls>,
    patience: Patience,
    stop: &CancellationToken,
    connections: &TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                // Events are small and must leave at once.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "cannot switch off Nagle's algorithm");
                }
                let router = router.clone();
                match tls.map(Tls::acceptor) {
                    None => connections.spawn(serve(stream, router, patience, stop.clone())),
                    Some(acceptor) => {
                        let stop = stop.clone();
                        connections.spawn(serve_tls(stream, acceptor, router, patience, stop))
                    }
                };
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_tls(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    router: Router,
    patience: Patience,
    stop: CancellationToken,
) {
    match timeout(patience.head, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => serve(stream, router, patience, stop).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

async fn serve<S>(stream: S, router: Router, patience: Patience, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        router.clone().oneshot(routes::without_trailing_slash(request))
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .max_headers(MAX_PARSED_HEADERS)
        .max_buf_size(MAX_READ_BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_READ_BUFFER as u32)
        // No head has a timeout here: a client that does not answer a ping either is dropped.
        .keep_alive_interval(patience.head)
        .keep_alive_timeout(patience.head);
    let io = TokioIo::new(Bounded::new(stream, patience));
    let mut connection =
        std::pin::pin!(builder.serve_connection(io, TowerToHyperService::new(service)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // The usual ends of a connection: a client that left, or was too slow.
        tracing::debug!(%error, "connection ended");
    }
}

/// A stream that fails when its peer is too slow, and lingers when it is shut down.
struct Bounded<S> {
    stream: S,
    /// Runs until the first bytes are there.
    silence: Option<Pin<Box<Sleep>>>,
    n_received: usize,
    write_timeout: Duration,
    /// Runs while a write waits.
    blocked: Option<Pin<Box<Sleep>>>,
    lingering: Option<Linger>,
}

struct Linger {
    pause: Pin<Box<Sleep>>,
    last: Instant,
}

impl<S> Bounded<S> {
    fn new(stream: S, patience: Patience) -> Self {
        Self {
            stream,
            silence: Some(Box::pin(sleep(patience.head))),
            n_received: 0,
            write_timeout: patience.write,
            blocked: None,
            lingering: None,
        }
    }

    /// Passes on a write's result, unless writes have waited for too long.
    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.blocked = None;
            return written;
        }
        let timeout = self.write_timeout;
        let blocked = self.blocked.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(blocked.as_mut().poll(cx));
        let message = "the client took nothing for too long";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        let Some(silence) = &mut this.silence else { return read };
        this.n_received += buffer.filled().len() - before;
        if this.n_received >= PREFACE_BYTES {
            this.silence = None;
        } else if read.is_pending() && silence.as_mut().poll(cx).is_ready() {
            let message = "the client said nothing for too long";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch(cx, flushed)
    }

    /// Ends our side, then takes and forgets what still comes until the client ends its side too:
    /// closing with unread input would reset the connection, and the client might never see why.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.lingering.is_none() {
            let shut = Pin::new(&mut this.stream).poll_shutdown(cx);
            ready!(this.watch(cx, shut))?;
        }
        let linger = this.lingering.get_or_insert_with(|| Linger {
            pause: Box::pin(sleep(LINGER_PAUSE)),
            last: Instant::now() + LINGER_TOTAL,
        });
        let mut scratch = [0; 16 * 1024];
        loop {
            if linger.pause.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut buffer = ReadBuf::new(&mut scratch);
            let read = ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            let pause = Instant::now() + LINGER_PAUSE;
            linger.pause.as_mut().reset(pause.min(linger.last));
        }
    }
}
