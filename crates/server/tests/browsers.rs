//! What browsers and thrifty clients ask for: CORS and gzip. Both are off by default.

use std::io::{Read, Write};

use fathom_server::ServerConfig;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::client::{Response, connect, exchange};
use crate::rig::{Rig, saying};

const CHAT: &str = "/v1/chat/completions";

fn preflight(rig: &Rig, origin: &str) -> Response {
    let head = format!(
        "OPTIONS {CHAT} HTTP/1.1\r\norigin: {origin}\r\naccess-control-request-method: POST\r\n\
         access-control-request-headers: authorization, x-stainless-lang"
    );
    exchange(rig.address, &head, b"")
}

#[test]
fn pages_of_other_origins_are_not_spoken_to_unless_they_are_named() {
    let rig = Rig::start();
    let refused = preflight(&rig, "https://a.example");
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (405, None));
    let head = "GET /health HTTP/1.1\r\norigin: https://a.example";
    let answer = exchange(rig.address, head, b"");
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, None));
}

#[test]
fn a_named_origin_is_answered_and_told_what_it_may_read() {
    let rig = Rig::configured(|config| {
        config.server.cors_origins = vec!["https://a.example".to_owned()];
    });
    let answer = preflight(&rig, "https://a.example");
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://a.example"));
    assert!(answer.header("access-control-allow-methods").unwrap().contains("POST"));
    let headers = answer.header("access-control-allow-headers");
    assert_eq!(headers, Some("authorization, x-stainless-lang"));
    assert_eq!(answer.header("vary"), Some("origin"));

    let stranger = preflight(&rig, "https://b.example");
    assert_eq!((stranger.status, stranger.header("access-control-allow-origin")), (204, None));

    // Errors too, or a page could not read why.
    let head = format!("POST {CHAT} HTTP/1.1\r\norigin: https://a.example\r\ncontent-length: 2");
    let error = exchange(rig.address, &head, b"{}");
    assert_eq!(error.status, 400);
    assert_eq!(error.header("access-control-allow-origin"), Some("https://a.example"));
    assert!(error.header("access-control-expose-headers").unwrap().contains("x-request-id"));
    // A plain OPTIONS asks nothing of CORS.
    assert_eq!(exchange(rig.address, &format!("OPTIONS {CHAT} HTTP/1.1"), b"").status, 405);
}

#[test]
fn a_star_speaks_to_every_page() {
    let rig = Rig::configured(|config| config.server.cors_origins = vec!["*".to_owned()]);
    let answer = preflight(&rig, "null");
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn gzipping(change: impl FnOnce(&mut ServerConfig)) -> Rig {
    Rig::configured(|config| {
        config.server.accept_gzip = true;
        change(config);
    })
}

fn post_gzip(rig: &Rig, body: &[u8]) -> Response {
    rig.post_raw(CHAT, "content-encoding: gzip", body)
}

#[test]
fn a_compressed_body_is_read_if_the_server_is_told_so() {
    let body = deflated(saying("Hi", &json!({})).to_string().as_bytes());
    let answer = post_gzip(&gzipping(|_| {}), &body);
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "Hi");
    let code = |answer: &Response| answer.json()["error"]["code"].as_str().unwrap().to_owned();
    let refused = post_gzip(&Rig::start(), &body);
    assert_eq!((refused.status, code(&refused).as_str()), (415, "unsupported_content_encoding"));
    let rig = gzipping(|_| {});
    let other = rig.post_raw(CHAT, "content-encoding: br", &body);
    assert_eq!((other.status, code(&other).as_str()), (415, "unsupported_content_encoding"));
    let broken = post_gzip(&rig, b"{}");
    assert_eq!((broken.status, code(&broken).as_str()), (400, "invalid_json"));
}

#[test]
fn the_limit_is_for_what_a_compressed_body_becomes() {
    let rig = gzipping(|config| config.limits.max_body_bytes = 10_000);
    let bomb = deflated(&[b' '; 1_000_000]);
    assert!(bomb.len() < 10_000);
    let refused = post_gzip(&rig, &bomb);
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].as_str()),
        (413, Some("request_too_large"))
    );
}

/// Status line and headers, and the bytes of the body.
fn raw(rig: &Rig, body: &Value, accepts: &str) -> (String, Vec<u8>) {
    let body = body.to_string();
    let length = body.len();
    let head = format!(
        "POST {CHAT} HTTP/1.0\r\nhost: t\r\naccept-encoding: {accepts}\r\n\
         content-length: {length}\r\n\r\n"
    );
    let mut connection = connect(rig.address);
    connection.write_all((head + &body).as_bytes()).unwrap();
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes).unwrap();
    let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let body = bytes.split_off(split + 4);
    (String::from_utf8(bytes).unwrap(), body)
}

#[test]
fn answers_are_compressed_for_those_who_ask_and_streams_for_nobody() {
    let long = saying(&"long ".repeat(300), &json!({}));
    let rig = Rig::configured(|config| config.server.compress = true);
    let (head, body) = raw(&rig, &long, "gzip, br");
    assert!(
        head.contains("content-encoding: gzip") && head.contains("vary: accept-encoding"),
        "{head}"
    );
    let mut text = String::new();
    GzDecoder::new(&body[..]).read_to_string(&mut text).unwrap();
    assert!(text.contains("long long"));

    let mut stream = long.clone();
    stream["stream"] = json!(true);
    for (rig, body, accepts) in [
        (&rig, &long, "br"),
        (&rig, &saying("short", &json!({})), "gzip"),
        (&rig, &stream, "gzip"),
        (&Rig::start(), &long, "gzip"),
    ] {
        let (head, body) = raw(rig, body, accepts);
        assert!(!head.contains("content-encoding"), "{head}");
        assert!(std::str::from_utf8(&body).is_ok());
    }
}
