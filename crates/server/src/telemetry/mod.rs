//! Traces: a span per request and one for each of its phases, posted to a collector (OTLP over HTTP).
//!
//! Off unless an endpoint is configured. Spans are made when a request is over, from what its record
//! knows; nothing is traced while it runs. A collector that is slow or gone costs spans and a warning,
//! never a request.
//!
//! Not here: the protocol's messages (`otlp`), and what is known about a request ([`crate::record`]).

mod otlp;

use std::pin::pin;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::header::{CONTENT_TYPE, HOST};
use axum::http::{HeaderMap, Request, Uri};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::TelemetryConfig;
use crate::record::Facts;
use otlp::{
    ExportTraceServiceRequest, InstrumentationScope, KeyValue, Resource, ResourceSpans, ScopeSpans,
    Span, SpanKind, Status,
};

/// Spans that may wait to be sent; the next ones are dropped.
const MAX_WAITING: usize = 4096;
/// Spans of one batch,
const MAX_BATCH: usize = 512;
/// and the longest time that a batch is collected.
const PERIOD: Duration = Duration::from_secs(5);
/// Longest time that a collector may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// `Status.code` of a failed span.
const STATUS_ERROR: i32 = 2;

/// Where a request stands in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TraceContext {
    trace_id: u128,
    /// The span that sent the request; 0 if it named none.
    parent: u64,
    sampled: bool,
}

impl TraceContext {
    /// The trace that the request names in `traceparent`, or a new one.
    pub(crate) fn of(headers: &HeaderMap, random: impl Fn() -> u64) -> Self {
        let named = headers.get("traceparent").and_then(|value| value.to_str().ok());
        named.and_then(Self::parse).unwrap_or_else(|| {
            let trace_id = u128::from(random()) << 64 | u128::from(random() | 1);
            Self { trace_id, parent: 0, sampled: true }
        })
    }

    /// Reads `00-{32 digits}-{16 digits}-{flags}`; later versions may go on after that.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let mut digits = |n: usize| {
            let part = parts.next().filter(|part| part.len() == n)?;
            let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            part.bytes().all(lower).then(|| u128::from_str_radix(part, 16).ok())?
        };
        let (version, trace_id, parent, flags) = (digits(2)?, digits(32)?, digits(16)?, digits(2)?);
        let parent = u64::try_from(parent).ok()?;
        let valid = version != 0xff && trace_id != 0 && parent != 0;
        valid.then_some(Self { trace_id, parent, sampled: flags & 1 == 1 })
    }
}

/// A request that is over.
pub(crate) struct Finished<'a> {
    pub(crate) context: TraceContext,
    pub(crate) request_id: &'a str,
    pub(crate) endpoint: &'static str,
    pub(crate) status: u16,
    pub(crate) facts: &'a Facts,
    /// When it began, by both clocks, and how long it took.
    pub(crate) began: (SystemTime, Instant),
    pub(crate) took: Duration,
}

/// Where finished requests are told.
pub(crate) struct Tracer {
    spans: mpsc::Sender<Span>,
}

/// What sends them on.
pub(crate) struct Exporter {
    spans: mpsc::Receiver<Span>,
    endpoint: Uri,
    service_name: String,
}

/// Both ends, if the settings name a collector.
pub(crate) fn channel(config: &TelemetryConfig) -> Option<(Tracer, Exporter)> {
    let endpoint = endpoint(config.otlp_endpoint.as_deref()?)?;
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    let service_name = config.service_name.clone();
    Some((Tracer { spans: sender }, Exporter { spans: receiver, endpoint, service_name }))
}

/// The URL of a collector, if it is one that spans can be posted to.
pub(crate) fn endpoint(url: &str) -> Option<Uri> {
    let uri: Uri = url.parse().ok()?;
    (uri.scheme_str() == Some("http") && uri.host().is_some()).then_some(uri)
}

impl Tracer {
    /// Makes the spans of a request. `random` draws their ids.
    pub(crate) fn record(&self, request: &Finished<'_>, random: impl Fn() -> u64) {
        if !request.context.sampled {
            return;
        }
        for span in spans(request, random) {
            // Full: the collector is too slow, which its exporter has said.
            if self.spans.try_send(span).is_err() {
                return;
            }
        }
    }
}

fn spans(request: &Finished<'_>, random: impl Fn() -> u64) -> Vec<Span> {
    let Finished { context, facts, began: (began_at, began), took, .. } = request;
    let nanos = |at: Instant| {
        let time = *began_at + at.saturating_duration_since(*began);
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    let span = |parent: u64, name: String, kind: SpanKind, from: Instant, to: Instant| Span {
        trace_id: context.trace_id.to_be_bytes().to_vec(),
        span_id: (random() | 1).to_be_bytes().to_vec(),
        parent_span_id: if parent == 0 { Vec::new() } else { parent.to_be_bytes().to_vec() },
        name,
        kind: kind.into(),
        start_time_unix_nano: nanos(from),
        end_time_unix_nano: nanos(to.max(from)),
        attributes: Vec::new(),
        status: None,
    };
    let ended = *began + *took;
    let name = format!("POST {}", request.endpoint);
    let mut root = span(context.parent, name, SpanKind::Server, *began, ended);
    root.attributes = attributes(request);
    if request.status >= 500 {
        root.status = Some(Status { message: String::new(), code: STATUS_ERROR });
    }
    let id = root.span_id.as_slice().try_into().map_or(0, u64::from_be_bytes);
    let mut spans = vec![root];
    let Some(times) = facts.times else { return spans };
    let done = times.finished.unwrap_or(ended);
    let mut phase = |name: &str, from: Option<Instant>, to: Option<Instant>| {
        if let Some(from) = from {
            let to = to.unwrap_or(done);
            spans.push(span(id, name.to_owned(), SpanKind::Internal, from, to));
        }
    };
    phase("queue", Some(times.submitted), times.started);
    phase("prefill", times.started, times.first_token);
    phase("decode", times.first_token, Some(done));
    spans
}

/// What a request's span says about it, under the names of OpenTelemetry's conventions where there
/// is one. Never what was asked or answered.
fn attributes(request: &Finished<'_>) -> Vec<KeyValue> {
    let facts = request.facts;
    let mut attributes = vec![
        KeyValue::text("http.request.method", "POST"),
        KeyValue::text("http.route", request.endpoint),
        KeyValue::integer("http.response.status_code", request.status.into()),
        KeyValue::text("fathom.request_id", request.request_id),
    ];
    if let Some(model) = &facts.model {
        attributes.push(KeyValue::text("gen_ai.request.model", model));
    }
    if facts.times.is_some() {
        attributes.extend([
            KeyValue::integer("gen_ai.usage.input_tokens", facts.prompt_tokens),
            KeyValue::integer("gen_ai.usage.output_tokens", facts.completion_tokens),
            KeyValue::integer("fathom.usage.cached_tokens", facts.cached_tokens),
            KeyValue::integer("fathom.usage.reasoning_tokens", facts.reasoning_tokens),
        ]);
    }
    if let Some(reason) = facts.finish_reason {
        attributes.push(KeyValue::texts("gen_ai.response.finish_reasons", &[reason]));
    }
    if request.status >= 500 {
        attributes.push(KeyValue::text("error.type", request.status.to_string()));
    }
    attributes
}

/// Spans did not reach the collector.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    #[error("the connection broke")]
    Http(#[source] hyper::Error),
    #[error("the request cannot be written")]
    Request(#[source] axum::http::Error),
    #[error("the collector answered {0}")]
    Refused(axum::http::StatusCode),
    #[error("the collector took too long")]
    Timeout,
}

impl Exporter {
    /// Sends batches until `stop`, and then what is left.
    pub(crate) async fn run(mut self, stop: &CancellationToken) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        let mut is_well = true;
        loop {
            let room = MAX_BATCH - batch.len();
            let stopped = tokio::select! {
                _ = self.spans.recv_many(&mut batch, room) => false,
                _ = ticks.tick() => true,
                () = stop.cancelled() => true,
            };
            if batch.len() < MAX_BATCH && !stopped {
                continue;
            }
            self.send(std::mem::take(&mut batch), &mut is_well).await;
            if stop.is_cancelled() {
                break;
            }
        }
        // Requests keep their end: without this the last of what they told would be waited for for ever.
        self.spans.close();
        while self.spans.recv_many(&mut batch, MAX_BATCH).await > 0 {
            self.send(std::mem::take(&mut batch), &mut is_well).await;
            // A collector that does not answer holds the end up once, not for each batch.
            if !is_well {
                break;
            }
        }
    }

    async fn send(&self, spans: Vec<Span>, is_well: &mut bool) {
        if spans.is_empty() {
            return;
        }
        let n_spans = spans.len();
        let sent = timeout(PATIENCE, self.post(self.body(spans))).await;
        match sent.unwrap_or(Err(ExportError::Timeout)) {
            Ok(()) => *is_well = true,
            Err(error) => {
                // Once per outage: a dead collector must not fill the log.
                if std::mem::replace(is_well, false) {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, n_spans, endpoint = %self.endpoint,
                        "traces are lost");
                }
            }
        }
    }

    fn body(&self, spans: Vec<Span>) -> Vec<u8> {
        let attributes = vec![
            KeyValue::text("service.name", self.service_name.as_str()),
            KeyValue::text("service.version", env!("CARGO_PKG_VERSION")),
        ];
        let scope = InstrumentationScope {
            name: "fathom".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource { attributes }),
                scope_spans: vec![ScopeSpans { scope: Some(scope), spans }],
            }],
        };
        request.encode_to_vec()
    }

    async fn post(&self, body: Vec<u8>) -> Result<(), ExportError> {
        let (host, port) = (self.endpoint.host().unwrap_or_default(), self.endpoint.port_u16());
        // A literal IPv6 address stands in brackets in a URL, and without them everywhere else.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, port.unwrap_or(80))).await;
        let stream = stream.map_err(ExportError::Connect)?;
        let (mut sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(ExportError::Http)?;
        let path = self.endpoint.path_and_query().map_or("/", |path| path.as_str());
        let authority = self.endpoint.authority().map_or("", |authority| authority.as_str());
        let request = Request::post(path)
            .header(HOST, authority)
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(Full::new(Bytes::from(body)))
            .map_err(ExportError::Request)?;
        let mut answer = pin!(sender.send_request(request));
        let mut connection = pin!(connection);
        let response = tokio::select! {
            response = &mut answer => response,
            ended = &mut connection => match ended {
                Err(error) => Err(error),
                // The answer was there before the connection ended.
                Ok(()) => answer.await,
            },
        };
        let status = response.map_err(ExportError::Http)?.status();
        if status.is_success() { Ok(()) } else { Err(ExportError::Refused(status)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[test]
    fn a_trace_is_continued_if_its_header_is_whole() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let read = |text: &str| TraceContext::parse(text);
        let context = read(&format!("00-{trace}-00f067aa0ba902b7-01")).unwrap();
        assert_eq!(format!("{:032x}", context.trace_id), trace);
        assert_eq!((context.parent, context.sampled), (0x00f0_67aa_0ba9_02b7, true));
        assert!(!read(&format!("00-{trace}-00f067aa0ba902b7-00")).unwrap().sampled);
        assert!(read(&format!("01-{trace}-00f067aa0ba902b7-01-more")).is_some());
        let zeros = "0".repeat(32);
        for broken in [
            "",
            "00",
            &format!("ff-{trace}-00f067aa0ba902b7-01"),
            &format!("00-{zeros}-00f067aa0ba902b7-01"),
            &format!("00-{trace}-0000000000000000-01"),
            &format!("00-{}-00f067aa0ba902b7-01", trace.to_uppercase()),
            &format!("00-{trace}-00f067aa0ba902b7"),
            &format!("00-+{}-00f067aa0ba902b7-01", &trace[1..]),
        ] {
            assert_eq!(read(broken), None, "{broken}");
        }
    }

    #[test]
    fn only_a_plain_url_can_be_posted_to() {
        for url in ["http://localhost:4318/v1/traces", "http://[::1]:4318"] {
            assert!(endpoint(url).is_some(), "{url}");
        }
        for url in ["https://collector", "localhost:4318", "/v1/traces", "http://", ""] {
            assert!(endpoint(url).is_none(), "{url}");
        }
    }

    #[tokio::test]
    async fn a_server_that_stops_while_a_batch_is_sent_ends_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        let config = TelemetryConfig { otlp_endpoint: Some(url), ..TelemetryConfig::default() };
        // Requests that are not over yet keep their end.
        let (tracer, exporter) = channel(&config).unwrap();
        for _ in 0..MAX_BATCH {
            tracer.spans.try_send(Span::default()).unwrap();
        }
        let stop = CancellationToken::new();
        let collect = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stop.cancel();
            stream.read_exact(&mut [0; 64]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            stream
        };
        let both = async { tokio::join!(exporter.run(&stop), collect) };
        assert!(timeout(PATIENCE, both).await.is_ok(), "the exporter waits for its requests");
        drop(tracer);
    }
}
