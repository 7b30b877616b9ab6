//! gzip, on the way in and on the way out. Both are off unless the operator wants them.
//!
//! What comes in is bounded by its decompressed size: a small body that would become a huge one is
//! refused when it passes the limit. Event streams are never compressed: a compressor holds events
//! back.

use std::io::{Read, Write};

use axum::body::{Body, HttpBody, to_bytes};
use axum::http::HeaderMap;
use axum::http::HeaderValue;
use axum::http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, VARY};
use axum::response::Response;
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;

/// Bytes below which compression saves less than it costs.
const WORTHWHILE: u64 = 1024;

/// Why a body could not be decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inflate {
    /// It is no gzip.
    Broken,
    /// It is more than allowed.
    TooLarge,
}

/// Decompresses a body, up to `max` bytes.
pub(crate) fn inflate(compressed: &[u8], max: usize) -> Result<Vec<u8>, Inflate> {
    let mut bytes = Vec::new();
    // One byte more tells a body that is too large from one that just fits.
    let mut reader = MultiGzDecoder::new(compressed).take(max as u64 + 1);
    reader.read_to_end(&mut bytes).map_err(|_| Inflate::Broken)?;
    if bytes.len() > max { Err(Inflate::TooLarge) } else { Ok(bytes) }
}

/// Whether the client wants an answer in gzip.
pub(crate) fn is_accepted(request: &HeaderMap) -> bool {
    let values = request.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let weight = weight.trim().strip_prefix("q=").and_then(|q| q.parse::<f32>().ok());
        name.trim().eq_ignore_ascii_case("gzip") && weight.is_none_or(|weight| weight > 0.0)
    })
}

/// Compresses an answer that is whole and long enough.
pub(crate) async fn deflate(response: Response) -> Response {
    let is_stream = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let n_bytes = response.body().size_hint().exact();
    if is_stream || n_bytes.is_none_or(|n_bytes| n_bytes < WORTHWHILE) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    // The body is in memory already, so that reading it neither waits nor fails.
    let Ok(whole) = to_bytes(body, usize::MAX).await else {
        return Response::from_parts(parts, Body::empty());
    };
    let mut encoder = GzEncoder::new(Vec::with_capacity(whole.len() / 3), Compression::fast());
    let compressed = encoder.write_all(&whole).and_then(|()| encoder.finish());
    let Ok(compressed) = compressed else { return Response::from_parts(parts, whole.into()) };
    parts.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    parts.headers.append(VARY, HeaderValue::from_static("accept-encoding"));
    parts.headers.remove(CONTENT_LENGTH);
    Response::from_parts(parts, compressed.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_body_is_bounded_by_what_it_becomes() {
        let small = deflated(&[b'a'; 100]);
        assert_eq!(inflate(&small, 100), Ok(vec![b'a'; 100]));
        assert_eq!(inflate(&small, 99), Err(Inflate::TooLarge));
        let two = [deflated(b"{}"), deflated(b" ")].concat();
        assert_eq!(inflate(&two, 10), Ok(b"{} ".to_vec()));
        assert_eq!(inflate(b"{}", 10), Err(Inflate::Broken));
        assert_eq!(inflate(&small[..small.len() - 1], 200), Err(Inflate::Broken));
        let bomb = deflated(&vec![0; 10_000_000]);
        assert!(bomb.len() < 100_000);
        assert_eq!(inflate(&bomb, 1_000_000), Err(Inflate::TooLarge));
    }

    #[test]
    fn gzip_is_sent_only_to_those_who_ask_for_it() {
        let asks = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, value.parse().unwrap());
            is_accepted(&headers)
        };
        assert!(asks("gzip") && asks("br, GZIP;q=0.5") && asks("deflate, gzip;q=1.0"));
        assert!(!asks("br") && !asks("gzip;q=0") && !asks("gzip; q=0.0") && !asks("identity"));
        assert!(!is_accepted(&HeaderMap::new()));
    }
}
