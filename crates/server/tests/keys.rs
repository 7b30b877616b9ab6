//! API keys over the wire: limits, balances, and a file that changes while requests run.

use std::io::{Read, Write};

use fathom_server::config::KeyConfig;
use serde_json::json;

use crate::client::{Response, connect};
use crate::rig::{Rig, saying};

const CHAT: &str = "/v1/chat/completions";

fn send(rig: &Rig, key: &str, text: &str) -> Response {
    let body = saying(text, &json!({})).to_string();
    rig.post_raw(CHAT, &format!("x-api-key: {key}"), body.as_bytes())
}

/// Status, code, and whether the client is told when to come back.
fn outcome(response: &Response) -> (u16, String, bool) {
    let code = response.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    (response.status, code, response.header("retry-after").is_some())
}

#[test]
fn tokens_are_limited_per_minute_and_in_all() {
    let rig = Rig::configured(|config| {
        config.keys = vec![
            KeyConfig { tokens_per_minute: Some(5), ..KeyConfig::plain("minute") },
            KeyConfig { token_balance: Some(5), ..KeyConfig::plain("balance") },
        ];
    });
    assert_eq!(send(&rig, "minute", "Hi").status, 200);
    rig.wait_until_idle();
    let limited = outcome(&send(&rig, "minute", "Hi"));
    assert_eq!(limited, (429, "rate_limit_exceeded".to_owned(), true));

    // Nobody pays for an error: refused, or failed while it ran.
    let body = saying("Hi", &json!({"temperature": 9})).to_string();
    assert_eq!(rig.post_raw(CHAT, "x-api-key: balance", body.as_bytes()).status, 400);
    assert_eq!(send(&rig, "balance", "NAN").status, 500);
    assert_eq!(send(&rig, "balance", "Hi").status, 200);
    rig.wait_until_idle();
    let spent = send(&rig, "balance", "Hi");
    assert_eq!(outcome(&spent), (402, "insufficient_balance".to_owned(), false));
    assert_eq!(spent.json()["error"]["type"], "insufficient_balance_error");
    let body = json!({"model": "claude-x", "max_tokens": 5,
        "messages": [{"role": "user", "content": "Hi"}]});
    let refused = rig.post_raw("/v1/messages", "x-api-key: balance", body.to_string().as_bytes());
    assert_eq!(
        (refused.status, refused.json()["error"]["type"].as_str()),
        (402, Some("billing_error"))
    );
}

#[test]
fn requests_per_minute_and_at_once_are_limited() {
    let rig = Rig::configured(|config| {
        config.keys = vec![
            KeyConfig { requests_per_minute: Some(1), ..KeyConfig::plain("minute") },
            KeyConfig { max_concurrency: Some(0), ..KeyConfig::plain("none") },
        ];
    });
    assert_eq!(send(&rig, "minute", "Hi").status, 200);
    let limited = send(&rig, "minute", "Hi");
    assert_eq!(outcome(&limited), (429, "rate_limit_exceeded".to_owned(), true));
    let seconds: u64 = limited.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    let refused = outcome(&send(&rig, "none", "Hi"));
    assert_eq!(refused, (429, "concurrency_limit_exceeded".to_owned(), true));
}

#[test]
fn a_hashed_key_is_as_good_as_its_secret() {
    let digits = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
    let rig = Rig::configured(|config| {
        let sha256 = Some(digits.to_owned());
        config.keys = vec![KeyConfig { sha256, ..KeyConfig::default() }];
    });
    assert_eq!(send(&rig, "secret", "Hi").status, 200);
    assert_eq!(send(&rig, digits, "Hi").status, 401);
}

#[test]
fn a_changed_file_of_keys_is_read_without_disturbing_what_runs() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.toml");
    std::fs::write(&path, "[[keys]]\nkey = 'old'\n").unwrap();
    let rig = Rig::configured(|config| config.server.keys_file = Some(path.clone()));
    let body = saying("SLOWLY", &json!({"stream": true, "max_tokens": 20})).to_string();
    let length = body.len();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: t\r\nx-api-key: old\r\nconnection: close\r\n\
         content-length: {length}\r\n\r\n"
    );
    let mut running = connect(rig.address);
    running.write_all((head + &body).as_bytes()).unwrap();
    running.read_exact(&mut [0; 600]).unwrap();

    std::fs::write(&path, "[[keys]]\nkey = 'new'\n").unwrap();
    rig.reloader.reload().unwrap();
    assert_eq!(send(&rig, "old", "Hi").status, 401);
    assert_eq!(send(&rig, "new", "Hi").status, 200);

    std::fs::write(&path, "[[keys]]\nkay = 'newer'\n").unwrap();
    assert!(rig.reloader.reload().unwrap_err().to_string().contains("line 2"));
    assert_eq!(send(&rig, "new", "Hi").status, 200);

    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
}
