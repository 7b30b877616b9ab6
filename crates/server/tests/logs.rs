//! The access log: one line per request, numbers only.

use std::io::Write;
use std::sync::{LazyLock, Mutex, PoisonError};

use serde_json::json;
use tracing_subscriber::fmt::MakeWriter;

use crate::client::exchange;
use crate::rig::{Rig, saying};

static LINES: LazyLock<Mutex<Vec<u8>>> = LazyLock::new(Mutex::default);

struct Capture;

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LINES.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Capture {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

#[test]
fn a_request_is_one_line_of_numbers_and_none_of_its_text() {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
        .with_ansi(false)
        .with_writer(Capture);
    tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
    let rig = Rig::start();
    let body = saying("secretive words", &json!({"user_id": "somebody", "odd_field": "odd value"}));
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nx-request-id: logged-one\r\ncontent-length: {}",
        body.len()
    );
    let usage = exchange(rig.address, &head, body.as_bytes()).json()["usage"].clone();
    // The line is written when the last part of the request is gone.
    drop(rig);
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    let lines = String::from_utf8_lossy(&lines);
    let own: Vec<&str> = lines.lines().filter(|line| line.contains("logged-one")).collect();
    let access: Vec<&&str> = own.iter().filter(|line| line.contains("fathom::access")).collect();
    assert_eq!(access.len(), 1, "{own:#?}");
    for part in [
        "endpoint=\"/v1/chat/completions\"".to_owned(),
        "model=\"deepseek-v4-flash\"".to_owned(),
        "status=200".to_owned(),
        format!("prompt_tokens={}", usage["prompt_tokens"]),
        format!("completion_tokens={}", usage["completion_tokens"]),
        "finish_reason=\"stop\"".to_owned(),
    ] {
        assert!(access[0].contains(&part), "{part} in {}", access[0]);
    }
    assert!(own.iter().any(|line| line.contains("odd_field")));
    for secret in ["secretive", "somebody", "odd value"] {
        assert!(!lines.contains(secret), "{secret}");
    }
}
