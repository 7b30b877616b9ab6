//! Request bodies: bytes to one JSON object, within bounds.
//!
//! What holds for every object returned here: the bytes were UTF-8 without a byte order mark, RFC
//! 8259 JSON without trailing bytes, nested at most [`MAX_DEPTH`] deep, without lone surrogates.
//! Of duplicate keys the last one won. Numbers keep the client's spelling.
//!
//! Not here: what the fields mean ([`crate::openai`]), and how large a body may be (the server).

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{ApiError, ErrorCode};

/// Deepest nesting of arrays and objects, the top-level object included.
pub const MAX_DEPTH: usize = 128;

/// A JSON object in the client's key order.
pub type Object = Map<String, Value>;

/// Parses a request body.
///
/// # Errors
/// [`ErrorCode::InvalidJson`] without a field, saying what is wrong and where.
pub fn parse_object(body: &[u8]) -> Result<Object, ApiError> {
    let invalid = |message: String| ApiError::new(ErrorCode::InvalidJson, message);
    let text = std::str::from_utf8(body).map_err(|e| {
        let at = e.valid_up_to();
        invalid(format!("The request body is not valid UTF-8: the byte at offset {at} is wrong."))
    })?;
    if text.starts_with('\u{feff}') {
        return Err(invalid("The request body must not begin with a byte order mark.".into()));
    }
    if text.trim_ascii().is_empty() {
        return Err(invalid("The request body is empty, but a JSON object is required.".into()));
    }
    if depth_exceeds(body, MAX_DEPTH) {
        return Err(invalid(format!(
            "The request body nests arrays and objects more than {MAX_DEPTH} deep."
        )));
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    // The scan above is the limit. The parser's own is one level short of the contract's.
    reader.disable_recursion_limit();
    let parsed = Value::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    match parsed {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(invalid("The request body must be a JSON object.".into())),
        Err(e) => Err(invalid(format!(
            "The request body is not valid JSON: error at line {} column {}.",
            e.line(),
            e.column()
        ))),
    }
}

/// Whether brackets outside strings open more than `limit` levels. Malformed text is judged too,
/// and then refused by the parser.
fn depth_exceeds(body: &[u8], limit: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for &byte in body {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > limit {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}
