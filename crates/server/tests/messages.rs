//! The Messages surface: its errors, its events byte by byte, and that it counts and says what the
//! chat surface counts and says.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use fathom_server::config::{KeyConfig, MessagesThinking};
use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::client::{Response, connect};
use crate::rig::{Options, Rig, normalised};

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

/// A non-thinking request to say `text`, with `change` laid over it.
fn asking(text: &str, change: &Value) -> Value {
    let mut body = json!({
        "model": "deepseek-v4-flash",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": text}],
        "thinking": {"type": "disabled"},
    });
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

fn ask(rig: &Rig, text: &str, change: &Value) -> Value {
    let response = rig.post(MESSAGES, &asking(text, change));
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

fn streamed(rig: &Rig, text: &str, change: &Value) -> Response {
    let mut body = asking(text, change);
    body["stream"] = json!(true);
    let response = rig.post(MESSAGES, &body);
    assert_eq!(response.status, 200, "{}", response.body);
    response
}

/// The events of a stream, whose names must be their types.
fn events(response: &Response) -> Vec<Value> {
    let frames = response.body.split_terminator("\n\n");
    let event = |frame: &str| {
        let (name, data) = frame.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), data["type"]);
        data
    };
    frames.map(event).collect()
}

/// The message that a client puts together from a stream, which must keep the order of events.
fn assembled(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    let mut open = None;
    let mut json_text = String::new();
    for event in &events[1..] {
        let kind = event["type"].as_str().unwrap();
        let n_blocks = message["content"].as_array().unwrap().len();
        match kind {
            "content_block_start" => {
                assert!(open.is_none() && event["index"] == n_blocks);
                open = Some(n_blocks);
                let block = event["content_block"].clone();
                message["content"].as_array_mut().unwrap().push(block);
            }
            "content_block_delta" => {
                assert_eq!(event["index"], open.unwrap());
                let block = &mut message["content"][open.unwrap()];
                for field in ["thinking", "signature", "text"] {
                    if let Some(more) = event["delta"][field].as_str() {
                        block[field] = (block[field].as_str().unwrap().to_owned() + more).into();
                    }
                }
                json_text += event["delta"]["partial_json"].as_str().unwrap_or_default();
            }
            "content_block_stop" => {
                let block = &mut message["content"][open.take().unwrap()];
                if block["type"] == "tool_use" {
                    block["input"] = serde_json::from_str(&json_text).unwrap();
                    json_text.clear();
                }
            }
            "message_delta" => {
                for field in ["stop_reason", "stop_sequence"] {
                    message[field] = event["delta"][field].clone();
                }
                if let Some(details) = event["delta"].get("finish_details") {
                    message["finish_details"] = details.clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "message_stop" => assert!(std::ptr::eq(event, events.last().unwrap())),
            "ping" => {}
            other => panic!("{other}"),
        }
    }
    assert!(open.is_none());
    message
}

const CALLS: &str = "Hm.</think>Sure.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n<｜DSML｜invoke name=\"now\">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

fn tools() -> Value {
    let empty = json!({"type": "object", "properties": {}});
    json!([{"name": "get", "description": "Weather", "input_schema": {"type": "object"}},
           {"type": "custom", "name": "now", "input_schema": empty}])
}

fn thinking() -> Value {
    json!({"thinking": {"type": "enabled", "budget_tokens": 400}, "tools": tools()})
}

#[track_caller]
fn refused(response: &Response, row: &str, status: u16, kind: &str) {
    let body = response.json();
    let got = (response.status, body["error"]["type"].as_str());
    assert_eq!(got, (status, Some(kind)), "{row}: {}", response.body);
    assert_eq!(body["type"], "error");
    assert_eq!(body["request_id"].as_str(), response.header("request-id"));
    assert!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
}

#[test]
fn each_bad_request_gets_its_status_and_type() {
    let rig = Rig::start();
    let invalid = "invalid_request_error";
    let image = json!({"type": "image", "source": {"type": "url", "url": "http://x"}});
    let result = json!({"type": "tool_result", "tool_use_id": "nobody", "content": "1"});
    let says = |content: &Value| json!({"messages": [{"role": "user", "content": content}]});
    let forced = json!({"type": "tool", "name": "other"});
    for (row, change, status, kind) in [
        ("M01", json!({"max_tokens": null}), 400, invalid),
        ("M02", json!({"messages": null}), 400, invalid),
        ("M02", json!({"messages": []}), 400, invalid),
        ("M04", json!({"model": "gpt-5"}), 404, "not_found_error"),
        ("M05", says(&json!([result])), 400, invalid),
        ("M06", says(&json!([image])), 400, invalid),
        ("M07", json!({"max_tokens": 0}), 400, invalid),
        ("M08", json!({"thinking": {"type": "maybe"}}), 400, invalid),
        ("M09", json!({"tools": tools(), "tool_choice": forced}), 400, invalid),
        ("model", json!({"model": null}), 400, invalid),
        ("range", json!({"temperature": 2.5}), 400, invalid),
        ("long", json!({"max_tokens": 100_000}), 400, invalid),
        ("server tool", json!({"tools": [{"type": "web_search_1", "name": "w"}]}), 400, invalid),
        (
            "format",
            json!({"output_config": {"format": {"type": "json_schema", "schema":
                {"type": "object"}}}}),
            400,
            invalid,
        ),
    ] {
        let body = asking("Hi", &change);
        refused(&rig.post(MESSAGES, &body), row, status, kind);
        if !["M01", "M07", "long"].contains(&row) {
            refused(&rig.post(COUNT, &body), row, status, kind);
        }
    }
    let system = json!({"messages": [{"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]});
    assert_eq!(rig.post(MESSAGES, &asking("", &system)).status, 200, "M03");
    refused(&rig.post_raw(MESSAGES, "x-a: b", b"{\"model\": "), "M10", 400, invalid);
    let wrong = rig.get(MESSAGES);
    refused(&wrong, "method", 405, invalid);
    assert_eq!(wrong.header("allow"), Some("POST"));
}

#[test]
fn keys_and_limits_answer_in_the_same_envelope() {
    let rig = Rig::configured(|config| {
        config.keys = vec![KeyConfig { key: "secret".into(), ..KeyConfig::default() }];
        config.limits.max_body_bytes = 1000;
    });
    let body = asking("Hi", &json!({})).to_string();
    let send = |header: &str| rig.post_raw(MESSAGES, header, body.as_bytes());
    refused(&send("x-api-key: wrong"), "M11", 401, "authentication_error");
    refused(&send("anthropic-version: 2023-06-01"), "M11", 401, "authentication_error");
    assert_eq!(send("x-api-key: secret").status, 200);
    assert_eq!(send("authorization: Bearer secret").status, 200);
    let large = vec![b' '; 2000];
    let response = rig.post_raw(MESSAGES, "x-api-key: secret", &large);
    refused(&response, "M12", 413, "request_too_large");
}

#[test]
fn a_full_queue_is_529() {
    let rig = Rig::with(Options {
        max_num_seqs: 1,
        queue_len: 1,
        max_model_len: 120_000,
        ..Options::default()
    });
    let open = |n_running: f64, n_waiting: f64| {
        let connection = open(&rig);
        while rig.metric("fathom_requests_running") < n_running
            || rig.metric("fathom_requests_waiting") < n_waiting
        {}
        connection
    };
    let (_running, _waiting) = (open(1.0, 0.0), open(1.0, 1.0));
    let response = rig.post(MESSAGES, &asking("Hi", &json!({})));
    refused(&response, "queue", 529, "overloaded_error");
    assert!(response.header("retry-after").is_some());
}

#[test]
fn a_stream_of_thinking_text_and_calls_byte_by_byte() {
    let response = streamed(&Rig::start(), CALLS, &thinking());
    assert!(response.complete);
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    assert_snapshot!(normalised(&response.body));
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let rig = Rig::start();
    let without_ids = |mut message: Value| {
        message["id"] = json!("");
        // The second of two equal requests finds its prompt in the cache.
        let usage = &mut message["usage"];
        let cached = usage["cache_read_input_tokens"].take().as_u64().unwrap();
        usage["input_tokens"] = json!(usage["input_tokens"].as_u64().unwrap() + cached);
        for block in message["content"].as_array_mut().unwrap() {
            if block["type"] == "tool_use" {
                assert!(block["id"].as_str().unwrap().starts_with("toolu_"));
                block["id"] = json!("");
            }
        }
        message
    };
    let think = json!({"thinking": {"type": "adaptive"}});
    let omitted = json!({"thinking": {"type": "enabled", "display": "omitted"}});
    for (text, change, stop_reason, kinds) in [
        ("Grüße, 世界 🎉!", json!({}), "end_turn", vec!["text"]),
        (CALLS, thinking(), "tool_use", vec!["thinking", "text", "tool_use", "tool_use"]),
        ("at the END of it", json!({"stop_sequences": ["END"]}), "stop_sequence", vec!["text"]),
        ("almost EN", json!({"stop_sequences": ["END"]}), "end_turn", vec!["text"]),
        ("thoughts only", think.clone(), "end_turn", vec!["thinking"]),
        ("</think>none", think, "end_turn", vec!["text"]),
        ("quiet</think>so", omitted, "end_turn", vec!["thinking", "text"]),
        ("cut here, somewhere", json!({"max_tokens": 5}), "max_tokens", vec!["text"]),
        ("", json!({}), "end_turn", vec![]),
    ] {
        let whole = ask(&rig, text, &change);
        let got: Vec<&str> = whole["content"]
            .as_array()
            .unwrap()
            .iter()
            .map(|b| b["type"].as_str().unwrap())
            .collect();
        assert_eq!(got, kinds, "{text:?}: {whole}");
        assert_eq!(whole["stop_reason"], stop_reason, "{text:?}");
        let matched = (stop_reason == "stop_sequence").then_some("END");
        assert_eq!(whole["stop_sequence"].as_str(), matched);
        let events = events(&streamed(&rig, text, &change));
        assert_eq!(without_ids(assembled(&events)), without_ids(whole), "{text:?}");
    }
}

#[test]
fn thinking_is_signed_and_may_be_left_out() {
    let rig = Rig::start();
    let block = |display: &str| {
        let change = json!({"thinking": {"type": "enabled", "display": display}});
        ask(&rig, "Hm</think>so", &change)["content"][0].clone()
    };
    assert_eq!(block("summarized")["thinking"], "Hm");
    assert_eq!(block("omitted")["thinking"], "");
    assert_eq!(block("omitted")["signature"], block("summarized")["signature"]);
    assert!(!block("omitted")["signature"].as_str().unwrap().is_empty());
}

#[test]
fn a_request_that_says_nothing_thinks_unless_the_server_is_told_otherwise() {
    let silent = json!({"thinking": null});
    assert_eq!(ask(&Rig::start(), "a</think>b", &silent)["content"][0]["thinking"], "a");
    let rig = Rig::configured(|config| {
        config.anthropic.default_thinking = MessagesThinking::Off;
    });
    assert_eq!(ask(&rig, "plain", &silent)["content"][0]["text"], "plain");
    let effort = json!({"thinking": null, "output_config": {"effort": "high"}});
    assert_eq!(ask(&rig, "a</think>b", &effort)["content"][0]["thinking"], "a");
}

#[test]
fn a_count_is_what_the_request_is_charged_and_what_chat_counts() {
    let rig = Rig::start();
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": [
        {"type": "text", "text": "12 degrees"}]});
    let history = json!({"system": [{"type": "text", "text": "Be brief."}], "tools": tools(),
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t", "name": "get", "input": {"city": "Oslo"}}]},
            {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}]});
    for change in [json!({}), json!({"thinking": null}), thinking(), history] {
        let mut body = asking("Count me", &change);
        let usage = rig.post(MESSAGES, &body).json()["usage"].clone();
        let part = |name: &str| usage[name].as_u64().unwrap();
        let sum = part("input_tokens")
            + part("cache_read_input_tokens")
            + part("cache_creation_input_tokens");
        body.as_object_mut().unwrap().remove("max_tokens");
        assert_eq!(rig.post(COUNT, &body).json(), json!({"input_tokens": sum}));
        if body.get("tools").is_none() {
            let chat = rig.chat(&body).json();
            assert_eq!(chat["usage"]["prompt_tokens"], sum);
        }
    }
    let long = asking(&"long ".repeat(5000), &json!({}));
    assert!(rig.post(COUNT, &long).json()["input_tokens"].as_u64().unwrap() > 4096);
}

#[test]
fn names_of_anthropic_lead_to_a_model_and_come_back() {
    let rig = Rig::start();
    for name in ["claude-opus-5", "claude-sonnet-4-5", "claude-3-haiku", "deepseek-chat"] {
        let answer = ask(&rig, "Hi", &json!({"model": name}));
        assert_eq!((&answer["model"], &answer["content"][0]["text"]), (&json!(name), &json!("Hi")));
    }
    assert_eq!(rig.post("/anthropic/v1/messages", &asking("Hi", &json!({}))).status, 200);
    assert_eq!(
        rig.post("/anthropic/v1/messages/count_tokens", &asking("", &json!({}))).status,
        200
    );
    let chat = rig.chat(&asking("Hi", &json!({"model": "claude-opus-5"})));
    assert_eq!(chat.status, 404);
}

#[test]
fn a_last_assistant_message_is_continued() {
    let rig = Rig::start();
    let turns = json!({"messages": [{"role": "user", "content": "One two three"},
                                    {"role": "assistant", "content": "One two"}]});
    assert_eq!(ask(&rig, "", &turns)["content"][0]["text"], " three");
}

#[test]
fn at_most_one_call_if_asked_for() {
    let choice = json!({"type": "auto", "disable_parallel_tool_use": true});
    let mut change = thinking();
    change["tool_choice"] = choice;
    let answer = ask(&Rig::start(), CALLS, &change);
    assert_eq!(answer["content"].as_array().unwrap().len(), 3);
    assert_eq!(answer["content"][2]["input"], json!({"city": "Oslo", "days": 2}));
    assert_eq!(answer["stop_reason"], "tool_use");
}

#[test]
fn a_full_context_has_a_reason_of_its_own() {
    let mut options = Options { max_model_len: 64, ..Options::default() };
    options.config.limits.clip_max_tokens = true;
    let answer = ask(&Rig::with(options), "FOREVER", &json!({}));
    assert_eq!(answer["stop_reason"], "model_context_window_exceeded");
}

#[test]
fn ignored_sampling_is_named() {
    let change = json!({"thinking": {"type": "enabled"}, "temperature": 0.5, "top_k": 3});
    let response = Rig::start().post(MESSAGES, &asking("a</think>b", &change));
    assert_eq!(response.header("x-ignored-params"), Some("temperature, top_k"));
}

#[test]
fn a_stream_that_fails_ends_with_an_error_event() {
    let response = streamed(&Rig::start(), "NAN", &json!({}));
    let events = events(&response);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert_eq!(last["request_id"].as_str(), response.header("request-id"));
    assert!(!response.body.contains("message_stop"));
}

#[test]
fn silence_is_filled_with_pings() {
    let rig = Rig::configured(|config| config.sse.keepalive_s = 1);
    let response = streamed(&rig, "PAUSE", &json!({}));
    assert!(response.body.contains("event: ping\ndata: {\"type\":\"ping\"}\n\n"));
    assert_eq!(assembled(&events(&response))["content"][0]["text"], "PAUSE");
}

/// Opens a stream that would go on for a long time.
fn open(rig: &Rig) -> std::net::TcpStream {
    let body = asking("FOREVER", &json!({"stream": true, "max_tokens": 100_000})).to_string();
    let length = body.len();
    let head = format!("POST {MESSAGES} HTTP/1.1\r\nhost: t\r\ncontent-length: {length}\r\n\r\n");
    let mut connection = connect(rig.address);
    connection.write_all((head + &body).as_bytes()).unwrap();
    connection
}

#[test]
fn a_stream_whose_reader_leaves_is_cancelled() {
    let rig = Rig::with(Options { max_model_len: 120_000, ..Options::default() });
    let mut reader = open(&rig);
    reader.read_exact(&mut [0; 2000]).unwrap();
    let left = Instant::now();
    drop(reader);
    rig.wait_until_idle();
    assert!(left.elapsed() < Duration::from_secs(1));
    assert_eq!(rig.engine.stats().kv.blocks_used, 0);
    let labels = "{model=\"deepseek-v4-flash\",phase=\"decode\"}";
    assert_eq!(rig.metric(&format!("fathom_requests_cancelled_total{labels}")), 1.0);
}

#[test]
fn errors_name_the_fields_that_were_sent() {
    let rig = Rig::start();
    let strange = json!({"type": "object", "properties": {"a": {"type": "string",
        "pattern": "(?=x)y"}}, "required": ["a"], "additionalProperties": false});
    let tool = json!({"name": "f", "strict": true, "input_schema": strange});
    let forced = json!({"type": "any"});
    let format = json!({"format": {"type": "json_schema", "schema": strange}});
    let plain = json!({"name": "f", "input_schema": {"type": "object"}});
    let turns =
        |last: &str| json!([{"role": "user", "content": "hi"}, {"role": last, "content": "a"}]);
    let call = json!([{"type": "tool_use", "id": "c", "name": "f", "input": {}}]);
    let result = json!([{"type": "tool_result", "tool_use_id": "c", "content": "r"}]);
    let history = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": call},
        {"role": "user", "content": result}]);
    let closed = json!({"type": "object", "additionalProperties": false});
    let wants_reasoning = Rig::configured(|c| c.compat.require_reasoning_roundtrip = true);
    for (rig, change, status, field) in [
        (&rig, json!({"tools": [tool], "tool_choice": forced}), 422, "`tools[0].input_schema`"),
        (&rig, json!({"output_config": format}), 422, "`output_config.format.schema`"),
        (
            &rig,
            json!({"messages": turns("assistant"),
                "output_config": {"format": {"type": "json_schema", "schema": closed}}}),
            400,
            "`output_config.format` cannot be combined with a last message of the assistant",
        ),
        (
            &rig,
            json!({"messages": turns("assistant"), "tools": [plain], "tool_choice": forced}),
            400,
            "a last message of the assistant",
        ),
        (&rig, json!({"max_tokens": 5000}), 400, "The context length is 4096"),
        (
            &wants_reasoning,
            json!({"messages": history, "tools": [plain], "thinking": {"type": "enabled"}}),
            400,
            "`messages` must hold a `thinking` block",
        ),
    ] {
        let response = rig.post(MESSAGES, &asking("hi", &change));
        let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
        assert_eq!(response.status, status, "{message}");
        assert!(message.contains(field), "{message}");
        for of_chat in ["response_format", "function", "reasoning_content", "prefix"] {
            assert!(!message.contains(of_chat), "{message}");
        }
    }
}

#[test]
fn odd_endings_are_told() {
    let rig = Rig::start();
    let thought = ask(&rig, "only thoughts", &json!({"thinking": {"type": "enabled"}}));
    assert_eq!(thought["finish_details"]["thought_only"], true);
    let looping = ask(&rig, "FOREVER", &json!({"max_tokens": 400}));
    assert_eq!(looping["finish_details"]["token_loop"], json!({"period": 1, "repeats": 400}));
    assert!(ask(&rig, "Hi", &json!({})).get("finish_details").is_none());

    // The first limit at which a call is begun.
    let cut_at = |n_tokens: u64| {
        json!({"thinking": {"type": "enabled"}, "tools": tools(),
        "max_tokens": n_tokens})
    };
    let (cut, whole) = (10..200)
        .map(|n_tokens| (cut_at(n_tokens), ask(&rig, CALLS, &cut_at(n_tokens))))
        .find(|(_, whole)| whole["finish_details"]["cut_call"] == true)
        .unwrap();
    assert_eq!(whole["stop_reason"], "max_tokens");
    let stream = events(&streamed(&rig, CALLS, &cut));
    let ending = stream.iter().find(|event| event["type"] == "message_delta").unwrap();
    assert_eq!(ending["delta"]["finish_details"], whole["finish_details"]);
}
