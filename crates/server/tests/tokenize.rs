//! Counting tokens without running them.

use serde_json::{Value, json};

use crate::rig::{Options, Rig, saying, tokenizer};

#[test]
fn text_and_tokens_are_turned_into_each_other() {
    let rig = Rig::start();
    for text in ["", "Hello, 世界 🎉", "<｜User｜></think>"] {
        let tokens = rig.post("/tokenize", &json!({"prompt": text})).json();
        assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
        assert_eq!(tokens["max_model_len"], 4096);
        assert!(tokens.get("token_strs").is_none());
        let back = rig.post("/v1/detokenize", &json!({"tokens": tokens["tokens"]})).json();
        assert_eq!(back, json!({"prompt": text}));
    }
}

#[test]
fn control_tokens_are_read_only_if_asked_for() {
    let rig = Rig::start();
    let count = |change: &Value| {
        let mut body = json!({"prompt": "</think>"});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        rig.post("/v1/tokenize", &body).json()
    };
    assert!(count(&json!({}))["count"].as_u64().unwrap() > 1);
    let special = count(&json!({"parse_special": true, "return_token_strs": true}));
    assert_eq!(special["tokens"], json!([tokenizer().special().think_end()]));
    assert_eq!(special["token_strs"], json!(["</think>"]));
}

#[test]
fn a_conversation_counts_what_chat_would_charge() {
    let rig = Rig::start();
    let tool = json!({"type": "function", "function": {"name": "f", "description": "does f"}});
    for change in [json!({}), json!({"thinking": null}), json!({"tools": [tool]})] {
        let body = saying("Count me", &change);
        let mut without_model = body.clone();
        without_model.as_object_mut().unwrap().remove("model");
        let count = rig.post("/tokenize", &without_model).json()["count"].clone();
        assert_eq!(count, rig.chat(&body).json()["usage"]["prompt_tokens"]);
    }
}

#[test]
fn each_bad_request_names_its_field() {
    let rig = Rig::start();
    for (path, body, code, param) in [
        ("/detokenize", json!({"tokens": [-1]}), "invalid_value", "tokens"),
        ("/detokenize", json!({"tokens": [1.5]}), "invalid_type", "tokens"),
        ("/detokenize", json!({}), "missing_required_parameter", "tokens"),
        ("/tokenize", json!({}), "missing_required_parameter", "prompt"),
        ("/tokenize", json!({"prompt": 5}), "invalid_type", "prompt"),
        ("/tokenize", json!({"model": 5}), "invalid_type", "model"),
        ("/tokenize", json!({"messages": []}), "empty_array", "messages"),
    ] {
        let response = rig.post(path, &body);
        let error = &response.json()["error"];
        let got = (response.status, error["code"].as_str(), error["param"].as_str());
        assert_eq!(got, (400, Some(code), Some(param)), "{path} {body}: {}", response.body);
    }
    let loading = Rig::with(Options { loaded: false, ..Options::default() });
    assert_eq!(loading.post("/tokenize", &json!({"prompt": "a"})).status, 503);
}
