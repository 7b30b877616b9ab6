//! Bodies and heads that no client means, at every endpoint: each gets an answer, and nothing more.

use std::io::{Read, Write};

use serde_json::json;

use crate::client::{Response, connect, exchange, read_response};
use crate::rig::{Options, Rig, saying};

/// Every path that takes a body, one per endpoint.
const POSTED: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/responses",
];
const JSON: &str = "content-type: application/json";

/// Asserts an error in its surface's envelope.
#[track_caller]
fn is_refused(response: &Response, status: u16, path: &str) {
    assert_eq!(response.status, status, "{path}: {}", response.body);
    let body = response.json();
    assert!(body["error"]["message"].as_str().is_some_and(|message| message.len() < 400));
    assert!(response.header("x-request-id").is_some());
}

#[test]
fn what_is_no_json_object_is_refused_everywhere() {
    let rig = Rig::start();
    let nested = |open: &str, close: &str| {
        format!("{{\"model\":\"m\",\"x\":{}1{}}}", open.repeat(10_000), close.repeat(10_000))
    };
    let (arrays, objects) = (nested("[", "]"), nested("{\"x\":", "}"));
    let bodies: [&[u8]; 9] = [
        b"",
        b"{\"model\": ",
        b"[]",
        b"\xef\xbb\xbf{}",
        b"{\"a\":\"\xff\"}",
        b"{\"a\":NaN}",
        b"{} trailing",
        arrays.as_bytes(),
        objects.as_bytes(),
    ];
    for path in POSTED {
        for body in bodies {
            is_refused(&rig.post_raw(path, JSON, body), 400, path);
        }
    }
}

#[test]
fn numbers_keys_and_strings_of_any_size_are_survived() {
    let rig = Rig::start();
    let text = "deepseek-v4-flash";
    let key = "k".repeat(1 << 20);
    for path in POSTED {
        for (more, refused) in [
            ("\"max_tokens\":1e999".to_owned(), true),
            (format!("\"max_tokens\":{}", "9".repeat(10_000)), true),
            (format!("\"temperature\":-{}.0", "1".repeat(400)), true),
            ("\"seed\":-170141183460469231731687303715884105729".to_owned(), true),
            (format!("\"{key}\":1"), false),
            (format!("\"user\":\"{}\"", "\\u0000".repeat(10_000)), false),
        ] {
            let body = format!(
                "{{\"model\":\"{text}\",\"prompt\":\"a\",\"messages\":[{{\"role\":\"user\",\
                 \"content\":\"a\"}}],\"input\":\"a\",\"tokens\":[1],{more}}}"
            );
            let response = rig.post_raw(path, JSON, body.as_bytes());
            assert!(response.status < 500, "{path} {}: {}", &more[..20], response.body);
            // Only these two read all of the fields above.
            if refused && ["/v1/chat/completions", "/v1/completions"].contains(&path) {
                assert_eq!(response.status, 400, "{path} {}", &more[..20]);
            }
        }
    }
}

#[test]
fn thirty_four_megabytes_are_too_many_however_they_come() {
    let rig = Rig::start();
    const SIZE: usize = 34 << 20;
    for path in ["/v1/messages", "/tokenize"] {
        is_refused(&rig.post_raw(path, JSON, &vec![b' '; SIZE]), 413, path);
    }
    // Undeclared: the server reads up to its limit and no further.
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    let head = "POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked";
    let body = [chunk.repeat(SIZE >> 20), b"0\r\n\r\n".to_vec()].concat();
    is_refused(&exchange(rig.address, head, &body), 413, "chat");
    assert_eq!(rig.say("Hi", &json!({})).status, 200);
}

#[test]
fn a_body_just_within_the_limit_is_read() {
    let rig = Rig::configured(|config| config.limits.max_body_bytes = 4000);
    let mut body = saying("Hi", &json!({})).to_string();
    body.push_str(&" ".repeat(4000 - body.len()));
    assert_eq!(rig.post_raw("/v1/chat/completions", JSON, body.as_bytes()).status, 200);
    body.push(' ');
    assert_eq!(rig.post_raw("/v1/chat/completions", JSON, body.as_bytes()).status, 413);
}

#[test]
fn heads_within_64_kib_are_read_and_larger_ones_refused() {
    let rig = Rig::start();
    let status = |bytes: usize| {
        let value = "v".repeat(bytes);
        let mut connection = connect(rig.address);
        let head = format!("GET /health HTTP/1.1\r\nhost: t\r\nconnection: close\r\nx-a: {value}");
        // What is far too large may be refused before all of it was written.
        let _ = connection.write_all((head + "\r\n\r\n").as_bytes());
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap_or("none").to_owned()
    };
    assert_eq!(status(60_000), "200");
    assert_eq!(status(65_536), "431");
    assert_eq!(status(200_000), "431");
    // Beyond what the parser holds at all, its own short answer or none.
    assert!(["431", "none"].contains(&status(2_000_000).as_str()));
    assert_eq!(rig.get("/health").status, 200);
}

#[test]
fn large_bodies_are_read_where_they_delay_nobody() {
    let (open, gate) = std::sync::mpsc::channel();
    let rig = Rig::with(Options { gate: Some(gate), ..Options::default() });
    let mistake = json!({"role": "wizard", "content": ""});
    let text = |bytes: usize| "word ".repeat(bytes / 5);
    let messages = |bytes| json!([{"role": "user", "content": text(bytes)}, mistake]);
    let mut waiting = Vec::new();
    for (path, mut body, field) in [
        ("/v1/chat/completions", json!({"messages": messages(30_000_000)}), "messages[1].role"),
        ("/v1/completions", json!({"prompt": text(100_000), "n": 0}), "`n`"),
        ("/v1/messages", json!({"messages": messages(100_000), "max_tokens": 1}), "messages[1]"),
        ("/v1/messages/count_tokens", json!({"messages": messages(100_000)}), "messages[1]"),
        ("/v1/responses", json!({"input": messages(100_000)}), "input[1].role"),
        ("/tokenize", json!({"messages": messages(100_000)}), "messages[1].role"),
        ("/detokenize", json!({"tokens": vec![-1; 40_000]}), "tokens"),
    ] {
        body["model"] = "deepseek-v4-flash".into();
        let body = body.to_string();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: t\r\nconnection: close");
        let mut connection = connect(rig.address);
        let request = format!("{head}\r\ncontent-length: {length}\r\n\r\n{body}");
        connection.write_all(request.as_bytes()).unwrap();
        waiting.push((connection, path, field));
    }
    // All of them wait for the thread that is busy; who asks for little does not.
    for _ in 0..20 {
        let said = rig.say(&"so ".repeat(100), &json!({"stream": true}));
        assert_eq!(said.status, 200);
        assert!(said.complete && said.chunks().len() > 100);
    }
    for (connection, path, _) in &waiting {
        connection.set_nonblocking(true).unwrap();
        let answered = connection.peek(&mut [0]);
        assert!(answered.is_err(), "{path} was read on the reactor");
        connection.set_nonblocking(false).unwrap();
    }
    open.send(()).unwrap();
    for (mut connection, path, field) in waiting {
        let response = read_response(&mut connection);
        assert_eq!(response.status, 400, "{path}: {}", response.body);
        let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(field), "{path}: {message}");
    }
}
