//! Framing of server-sent events.

use serde::Serialize;

/// A comment that keeps proxies and clients from giving up on a silent stream.
pub const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// The last event of a stream on the OpenAI surface.
pub const DONE: &str = "data: [DONE]\n\n";

/// `value` as one event: `data: `, the JSON on one line, and an empty line.
#[must_use]
pub fn event(value: &impl Serialize) -> Vec<u8> {
    let mut frame = b"data: ".to_vec();
    serde_json::to_writer(&mut frame, value)
        .expect("response types hold strings, numbers and lists, which always serialise");
    frame.extend_from_slice(b"\n\n");
    frame
}

/// `value` as one event with a name of its own, as the Messages surface has them.
#[must_use]
pub fn named_event(name: &str, value: &impl Serialize) -> Vec<u8> {
    let mut frame = format!("event: {name}\n").into_bytes();
    frame.append(&mut event(value));
    frame
}

/// JSON that is already written, as one event.
#[must_use]
pub fn raw_event(json: &str) -> Vec<u8> {
    format!("data: {json}\n\n").into_bytes()
}
