//! The log: one line per request, numbers only; and what operators are warned of.

use std::io::Write;
use std::sync::{LazyLock, Mutex, Once, PoisonError};

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

/// Has everything that is logged from now on end in [`LINES`].
fn capture() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
            .with_ansi(false)
            .with_writer(Capture);
        tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
    });
}

#[test]
fn an_effort_that_the_context_has_no_room_for_is_warned_of_and_kept() {
    capture();
    let rig = Rig::start();
    let warned = |effort: &str| {
        let count = || {
            let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
            let lines = String::from_utf8_lossy(&lines);
            lines
                .lines()
                .filter(|l| l.contains(" WARN ") && l.contains("max_model_len=4096"))
                .count()
        };
        let before = count();
        let body = json!({"model": "deepseek-v4-flash", "reasoning_effort": effort,
            "messages": [{"role": "user", "content": "Hm.</think>Yes."}]});
        let n_prompt = rig.chat(&body).json()["usage"]["prompt_tokens"].as_u64().unwrap();
        (count() - before, n_prompt)
    };
    let ((of_high, usual), (of_max, instructed)) = (warned("high"), warned("max"));
    assert_eq!((of_high, of_max), (0, 1));
    assert!(instructed > usual, "the prompt asks for the highest effort all the same");
}

#[test]
fn a_request_is_one_line_of_numbers_and_none_of_its_text() {
    capture();
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
