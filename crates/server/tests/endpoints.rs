//! Every path of every endpoint, and what each says to a method it does not know.

use serde_json::{Value, json};

use crate::client::exchange;
use crate::rig::{Rig, saying};

/// Paths that take a body, and one that they answer with 200.
fn posted() -> Vec<(Vec<&'static str>, Value)> {
    let chat = saying("Hi", &json!({}));
    let messages = saying("Hi", &json!({"max_tokens": 8}));
    let model = "deepseek-v4-flash";
    vec![
        (
            vec![
                "/v1/chat/completions",
                "/chat/completions",
                "/beta/chat/completions",
                "/beta/v1/chat/completions",
            ],
            chat,
        ),
        (
            vec!["/v1/completions", "/completions", "/beta/completions", "/beta/v1/completions"],
            json!({"model": model, "prompt": "Once", "max_tokens": 2}),
        ),
        (
            vec!["/v1/responses", "/responses", "/beta/responses", "/beta/v1/responses"],
            json!({"model": model, "input": "Hi"}),
        ),
        (vec!["/v1/messages", "/anthropic/v1/messages"], messages.clone()),
        (vec!["/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"], messages),
        (vec!["/tokenize", "/v1/tokenize"], json!({"prompt": "Hi"})),
        (vec!["/detokenize", "/v1/detokenize"], json!({"tokens": [65]})),
    ]
}

/// Paths that take none.
const GOT: [&str; 15] = [
    "/v1/models",
    "/models",
    "/beta/models",
    "/beta/v1/models",
    "/anthropic/v1/models",
    "/v1/models/deepseek-v4-flash",
    "/models/deepseek-v4-flash",
    "/beta/models/deepseek-v4-flash",
    "/beta/v1/models/deepseek-v4-flash",
    "/anthropic/v1/models/deepseek-v4-flash",
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/openapi.json",
];

#[test]
fn every_path_leads_to_its_endpoint() {
    let rig = Rig::start();
    for (paths, body) in posted() {
        let keys = |path: &str| {
            let response = rig.post(path, &body);
            assert_eq!(response.status, 200, "{path}: {}", response.body);
            let json = response.json();
            json.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
        };
        let first = keys(paths[0]);
        for path in paths {
            assert_eq!(keys(path), first, "{path}");
            assert_eq!(keys(&format!("{path}/")), first, "{path}/");
        }
    }
    for path in GOT {
        assert_eq!(rig.get(path).status, 200, "{path}");
        assert_eq!(rig.get(&format!("{path}/")).status, 200, "{path}/");
    }
}

#[test]
fn a_wrong_method_is_told_the_right_ones() {
    let rig = Rig::start();
    let posted =
        posted().into_iter().flat_map(|(paths, _)| paths).map(|path| (path, "GET", "POST"));
    let got = GOT.iter().map(|path| (*path, "DELETE", "GET,HEAD"));
    for (path, method, allow) in posted.chain(got) {
        let response = exchange(rig.address, &format!("{method} {path} HTTP/1.1"), b"");
        assert_eq!((response.status, response.header("allow")), (405, Some(allow)), "{path}");
        let error = &response.json()["error"];
        if path.contains("messages") {
            assert_eq!(error["type"], "invalid_request_error", "{path}");
        } else {
            assert_eq!(error["code"], "method_not_allowed", "{path}");
        }
    }
}

#[test]
fn what_can_be_got_can_be_asked_for_its_head() {
    let rig = Rig::start();
    for path in GOT {
        let response = exchange(rig.address, &format!("HEAD {path} HTTP/1.1"), b"");
        assert_eq!((response.status, response.body.as_str()), (200, ""), "{path}");
        let whole = rig.get(path);
        assert_eq!(response.header("content-type"), whole.header("content-type"), "{path}");
    }
}
