//! Section 18 of the API over the wire: transport, keys, models, and what this server cannot do.
//! The rows that a body alone decides are tested in `protocol`; a sample of them shows here that
//! the wiring keeps status, type, code and field.

use serde_json::{Value, json};

use crate::client::{Response, exchange};
use crate::rig::{Options, Rig, saying};

const CHAT: &str = "/v1/chat/completions";
const JSON: &str = "content-type: application/json";

#[track_caller]
fn is_error(response: &Response, status: u16, kind: &str, code: &str, param: Option<&str>) {
    let error = &response.json()["error"];
    let got =
        (response.status, error["type"].as_str(), error["code"].as_str(), error["param"].as_str());
    assert_eq!(got, (status, Some(kind), Some(code), param), "{}", response.body);
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert_eq!(error.as_object().unwrap().len(), 4);
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert!(response.header("x-request-id").is_some());
    let retry = response.header("retry-after").map(|value| value.parse::<u64>().unwrap());
    assert_eq!(retry.is_some_and(|seconds| seconds >= 1), [429, 503].contains(&status));
}

#[track_caller]
fn is_bad(response: &Response, status: u16, code: &str, param: Option<&str>) {
    is_error(response, status, "invalid_request_error", code, param);
}

#[test]
fn bodies_that_are_not_a_json_object() {
    let rig = Rig::start();
    let nested = format!(r#"{{"x":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let lone = br#"{"model":"deepseek-v4-flash","messages":[{"role":"user","content":"\ud800"}]}"#;
    for body in [&b""[..], b"{\"model\": ", b"[]", b"{\"a\":\"\xff\"}", nested.as_bytes(), lone] {
        is_bad(&rig.post_raw(CHAT, JSON, body), 400, "invalid_json", None);
    }
}

#[test]
fn media_types_and_encodings() {
    let rig = Rig::start();
    let body = saying("Hi", &json!({})).to_string();
    let send = |headers: &str| rig.post_raw(CHAT, headers, body.as_bytes());
    is_bad(&send("content-type: text/plain"), 415, "unsupported_media_type", None);
    let latin = "content-type: application/json; charset=latin-1";
    is_bad(&send(latin), 415, "unsupported_media_type", None);
    let gzip = "content-encoding: gzip";
    is_bad(&send(gzip), 415, "unsupported_content_encoding", None);
    assert_eq!(send("x-nothing: at-all").status, 200);
    assert_eq!(send("content-type: application/json; charset=utf-8").status, 200);
}

#[test]
fn methods_and_paths() {
    let rig = Rig::start();
    let wrong = rig.get(CHAT);
    is_bad(&wrong, 405, "method_not_allowed", None);
    assert_eq!(wrong.header("allow"), Some("POST"));
    let wrong = rig.post("/v1/models", &json!({}));
    is_bad(&wrong, 405, "method_not_allowed", None);
    assert_eq!(wrong.header("allow"), Some("GET,HEAD"));
    is_bad(&rig.post("/v1/nope", &json!({})), 404, "not_found", None);
    is_bad(&rig.get("/"), 404, "not_found", None);
}

#[test]
fn keys() {
    let rig = Rig::configured(|config| {
        config.keys = vec![fathom_server::config::KeyConfig {
            key: "sk-right".into(),
            max_concurrency: Some(0),
            ..Default::default()
        }];
    });
    let body = saying("Hi", &json!({})).to_string();
    let send = |headers: &str| rig.post_raw(CHAT, headers, body.as_bytes());
    let missing = send(JSON);
    is_error(&missing, 401, "authentication_error", "missing_api_key", None);
    assert_eq!(missing.header("www-authenticate"), Some("Bearer"));
    let wrong = send("authorization: Bearer sk-wrong");
    is_error(&wrong, 401, "authentication_error", "invalid_api_key", None);
    // Authentication comes before the media type and the body.
    is_error(
        &rig.post_raw(CHAT, "content-type: text/plain", b"{"),
        401,
        "authentication_error",
        "missing_api_key",
        None,
    );
    for header in ["authorization: Bearer sk-right", "x-api-key: sk-right"] {
        is_error(&send(header), 429, "rate_limit_error", "concurrency_limit_exceeded", None);
    }
    for open in ["/health", "/ready", "/metrics", "/version"] {
        assert_eq!(rig.get(open).status, 200, "{open}");
    }
    assert_eq!(rig.get("/v1/models").status, 401);
}

#[test]
fn a_key_may_be_kept_to_some_models() {
    let rig = Rig::configured(|config| {
        config.keys = vec![fathom_server::config::KeyConfig {
            key: "k".into(),
            models: Some(vec!["another".into()]),
            ..Default::default()
        }];
    });
    let body = saying("Hi", &json!({})).to_string();
    let response = rig.post_raw(CHAT, "x-api-key: k", body.as_bytes());
    is_error(&response, 403, "permission_error", "model_not_permitted", Some("model"));
}

#[test]
fn models() {
    let rig = Rig::start();
    is_bad(&rig.chat(&json!({"messages": 5})), 400, "missing_required_parameter", Some("model"));
    is_bad(&rig.chat(&json!({"model": 5})), 400, "invalid_type", Some("model"));
    let unknown = json!({"model": "no-such-model", "messages": 5});
    is_bad(&rig.chat(&unknown), 404, "model_not_found", Some("model"));
    is_bad(&rig.get("/v1/models/no-such-model"), 404, "model_not_found", Some("model"));
    let hosted = Rig::configured(|config| config.compat.unknown_model_status = 400);
    is_bad(&hosted.chat(&unknown), 400, "model_not_found", Some("model"));
}

#[test]
fn fields() {
    let rig = Rig::start();
    for (change, code, param) in [
        (json!({"messages": []}), "empty_array", "messages"),
        (json!({"messages": [{"role": "wizard"}]}), "invalid_value", "messages[0].role"),
        (json!({"max_tokens": 0}), "integer_below_min_value", "max_tokens"),
        (json!({"temperature": 2.5}), "decimal_above_max_value", "temperature"),
        (json!({"logit_bias": {"1024": 1}}), "invalid_value", "logit_bias"),
        (json!({"functions": []}), "unsupported_parameter", "functions"),
    ] {
        is_bad(&rig.say("Hi", &change), 400, code, Some(param));
    }
    let strict = Rig::configured(|config| config.compat.invalid_parameter_status = 422);
    let hot = json!({"temperature": "hot"});
    is_bad(&strict.say("Hi", &hot), 422, "invalid_type", Some("temperature"));
    is_bad(&strict.say("Hi", &json!({"messages": []})), 400, "empty_array", Some("messages"));
}

#[test]
fn what_does_not_fit_the_context() {
    let short = || Options { max_model_len: 128, ..Options::default() };
    let rig = Rig::with(short());
    let long = "word ".repeat(500);
    is_bad(&rig.say(&long, &json!({})), 400, "context_length_exceeded", Some("messages"));
    let response = rig.say("Hi", &json!({"max_completion_tokens": 128}));
    is_bad(&response, 400, "context_length_exceeded", Some("max_completion_tokens"));
    assert!(response.body.contains("128 tokens"), "{}", response.body);

    let mut clipping = short();
    clipping.config.limits.clip_max_tokens = true;
    let rig = Rig::with(clipping);
    assert_eq!(rig.say("Hi", &json!({"max_tokens": 4_000_000})).status, 200);
    is_bad(&rig.say(&long, &json!({})), 400, "context_length_exceeded", Some("messages"));
}

#[test]
fn beta_features_can_be_kept_to_their_path() {
    let rig = Rig::configured(|config| config.compat.require_beta_path = true);
    let messages = json!([{"role": "user", "content": "ab"},
                          {"role": "assistant", "content": "a", "prefix": true}]);
    let body = saying("", &json!({"messages": messages}));
    let param = Some("messages[1].prefix");
    is_bad(&rig.chat(&body), 400, "unsupported_parameter", param);
    assert_eq!(rig.post("/beta/v1/chat/completions", &body).status, 200);
}

#[test]
fn reasoning_can_be_demanded_back() {
    let rig = Rig::configured(|config| config.compat.require_reasoning_roundtrip = true);
    let messages = json!([
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "y"},
    ]);
    let body = saying("", &json!({"messages": messages, "thinking": {"type": "enabled"}}));
    let param = Some("messages[1].reasoning_content");
    is_bad(&rig.chat(&body), 400, "missing_required_parameter", param);
    assert_eq!(rig.chat(&saying("", &json!({"messages": messages}))).status, 200);
}

#[test]
fn a_model_that_is_not_there_yet() {
    let rig = Rig::with(Options { loaded: false, ..Options::default() });
    let response = rig.say("Hi", &json!({}));
    is_error(&response, 503, "overloaded_error", "model_loading", None);
    assert_eq!(rig.get("/health").status, 200);
    let ready = rig.get("/ready");
    assert_eq!((ready.status, &ready.json()["status"]), (503, &json!("loading")));
    rig.install(&["deepseek-v4-flash"]);
    assert_eq!(rig.say("Hi", &json!({})).status, 200);
    assert_eq!(rig.get("/ready").json()["models"], json!(["deepseek-v4-flash"]));
}

#[test]
fn a_full_queue() {
    let rig = Rig::with(Options { max_num_seqs: 1, queue_len: 1, ..Options::default() });
    let endless = json!({"stream": true, "max_tokens": 4000});
    let body = saying("SLOWLY", &endless).to_string();
    let open = || {
        let mut stream = crate::client::connect(rig.address);
        let head =
            format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n", body.len());
        std::io::Write::write_all(&mut stream, (head + &body).as_bytes()).unwrap();
        // The status line comes when the request was taken.
        std::io::Read::read_exact(&mut stream, &mut [0; 12]).unwrap();
        stream
    };
    let running = open();
    while rig.metric("fathom_requests_running") < 1.0 {}
    let waiting = open();
    let refused = rig.say("Hi", &json!({}));
    is_error(&refused, 503, "overloaded_error", "queue_full", None);
    drop((running, waiting));
    rig.wait_until_idle();
}

#[test]
fn a_request_whose_numbers_break_gets_a_generic_error() {
    let rig = Rig::start();
    let response = rig.say("NAN", &json!({}));
    is_error(&response, 500, "server_error", "internal_error", None);
    assert!(!response.body.contains("NaN") && !response.body.contains("logits"));
    assert_eq!(rig.say("Hi", &json!({})).status, 200);
    let failed = |reason: &str| {
        let labels = format!("{{model=\"deepseek-v4-flash\",reason=\"{reason}\"}}");
        rig.metric(&format!("fathom_failed_generations_total{labels}"))
    };
    assert_eq!((failed("non_finite_logits"), failed("step_failed")), (1.0, 0.0));
    assert_eq!(rig.metric("fathom_failed_steps_total"), 0.0);
}

#[test]
fn bodies_over_the_limit() {
    let rig = Rig::configured(|config| config.limits.max_body_bytes = 1000);
    let large = saying(&"x".repeat(2000), &json!({})).to_string();
    let declared = rig.post_raw(CHAT, JSON, large.as_bytes());
    is_bad(&declared, 413, "request_too_large", None);
    let chunked = format!("7d0\r\n{}\r\n0\r\n\r\n", &large[..2000]);
    let head = format!("POST {CHAT} HTTP/1.1\r\ntransfer-encoding: chunked");
    let undeclared = exchange(rig.address, &head, chunked.as_bytes());
    is_bad(&undeclared, 413, "request_too_large", None);
    assert_eq!(undeclared.header("connection"), Some("close"));
    let fitting: Value = saying("Hi", &json!({}));
    assert_eq!(rig.chat(&fitting).status, 200);
}
