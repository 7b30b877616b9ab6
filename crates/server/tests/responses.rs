//! The Responses surface: its errors, its events byte by byte, and conversations as agents send them.

use async_openai::types::responses::{Response as TypedResponse, ResponseStreamEvent};
use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::client::{Response, exchange};
use crate::rig::{Options, Rig, normalised};

const PATH: &str = "/v1/responses";
const CALLS: &str = "Hm.</think>Sure.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n<｜DSML｜invoke name=\"now\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

fn tools() -> Value {
    json!([
        {"type": "function", "name": "get", "description": "Weather.", "strict": false,
         "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
        {"type": "function", "name": "now", "parameters": null, "strict": null},
    ])
}

/// A non-thinking request to say `text`, with `change` laid over it.
fn asking(text: &str, change: &Value) -> Value {
    let mut body =
        json!({"model": "deepseek-v4-flash", "input": text, "reasoning": {"effort": "none"}});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

/// A whole answer, which the OpenAI types must understand.
#[track_caller]
fn ask(rig: &Rig, text: &str, change: &Value) -> Value {
    let response = rig.post(PATH, &asking(text, change));
    assert_eq!(response.status, 200, "{}", response.body);
    let whole = response.json();
    // From a value: the enums of the types read numbers with a fraction from nothing else.
    serde_json::from_value::<TypedResponse>(whole.clone()).unwrap();
    whole
}

/// The events of a stream, which the OpenAI types must understand, numbered and named.
#[track_caller]
fn events(response: &Response) -> Vec<Value> {
    assert_eq!(response.status, 200, "{}", response.body);
    assert!(response.complete);
    let frames = response.body.split_terminator("\n\n").filter(|frame| !frame.starts_with(':'));
    let event = |(number, frame): (usize, &str)| {
        let (name, data) = frame.split_once('\n').unwrap();
        let data = data.strip_prefix("data: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        let typed = serde_json::from_value::<ResponseStreamEvent>(data.clone());
        typed.unwrap_or_else(|e| panic!("{e}: {data}"));
        assert_eq!(name.strip_prefix("event: ").unwrap(), data["type"]);
        assert_eq!(data["sequence_number"], number);
        data
    };
    frames.enumerate().map(event).collect()
}

fn streamed(rig: &Rig, text: &str, change: &Value) -> Response {
    let mut body = asking(text, change);
    body["stream"] = json!(true);
    rig.post(PATH, &body)
}

/// A response without what differs between two runs.
fn comparable(mut response: Value) -> Value {
    for field in ["id", "created_at"] {
        response[field] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        for field in ["id", "call_id"] {
            if let Some(value) = item.get_mut(field) {
                *value = Value::Null;
            }
        }
    }
    // The second of two equal requests finds its prompt in the cache.
    response["usage"]["input_tokens_details"]["cached_tokens"] = Value::Null;
    response
}

/// The output that a client puts together from a stream, which must keep the order of events.
fn assembled(events: &[Value]) -> Vec<Value> {
    let mut output: Vec<Value> = Vec::new();
    let mut open: Option<(Value, String)> = None;
    for event in events {
        let index = || event["output_index"].as_u64().unwrap() as usize;
        match event["type"].as_str().unwrap() {
            "response.output_item.added" => {
                assert!(open.is_none() && index() == output.len());
                open = Some((event["item"]["id"].clone(), String::new()));
            }
            "response.output_text.delta"
            | "response.reasoning_text.delta"
            | "response.function_call_arguments.delta" => {
                let (id, text) = open.as_mut().unwrap();
                assert_eq!((&event["item_id"], index()), (&*id, output.len()));
                text.push_str(event["delta"].as_str().unwrap());
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(event["text"], open.as_ref().unwrap().1);
            }
            "response.function_call_arguments.done" => {
                assert_eq!(event["arguments"], open.as_ref().unwrap().1);
            }
            "response.output_item.done" => {
                let (id, text) = open.take().unwrap();
                let item = &event["item"];
                assert_eq!(item["id"], id);
                let said = item.get("arguments").unwrap_or_else(|| &item["content"][0]["text"]);
                assert_eq!(*said, text);
                output.push(item.clone());
            }
            _ => {}
        }
    }
    output
}

#[test]
fn a_plain_answer_has_the_fields_of_the_contract() {
    let response = Rig::start().post(PATH, &asking("Hello!", &json!({"user": "u", "store": true})));
    assert_snapshot!(normalised(&response.body));
    assert!(response.header("openai-processing-ms").is_some());
}

#[test]
fn a_stream_of_thinking_text_and_calls_byte_by_byte() {
    let change = json!({"reasoning": null, "tools": tools()});
    let response = streamed(&Rig::start(), CALLS, &change);
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    events(&response);
    assert_snapshot!(normalised(&response.body));
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let rig = Rig::start();
    let think = json!({"reasoning": {"effort": "high"}});
    let sealed = json!({"reasoning": null, "include": ["reasoning.encrypted_content"]});
    let calls = json!({"reasoning": null, "tools": tools()});
    for (text, change, status, kinds) in [
        ("Grüße, 世界 🎉!", json!({}), "completed", vec!["message"]),
        (CALLS, calls, "completed", vec!["reasoning", "message", "function_call", "function_call"]),
        ("a</think>b", sealed, "completed", vec!["reasoning", "message"]),
        ("thoughts only", think.clone(), "completed", vec!["reasoning"]),
        ("</think>none", think, "completed", vec!["message"]),
        ("cut here, somewhere", json!({"max_output_tokens": 5}), "incomplete", vec!["message"]),
        ("", json!({}), "completed", vec![]),
    ] {
        let whole = ask(&rig, text, &change);
        let output = whole["output"].as_array().unwrap();
        let got: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
        assert_eq!((got, whole["status"].as_str()), (kinds, Some(status)), "{text:?}: {whole}");
        let reason = whole["incomplete_details"]["reason"].as_str();
        assert_eq!(reason, (status == "incomplete").then_some("max_output_tokens"));

        let events = events(&streamed(&rig, text, &change));
        let last = events.last().unwrap();
        assert_eq!(last["type"], format!("response.{status}"));
        assert_eq!(last["response"]["output"], json!(assembled(&events)), "{text:?}");
        assert_eq!(comparable(last["response"].clone()), comparable(whole), "{text:?}");
    }
}

#[test]
fn a_call_that_is_cut_is_never_done() {
    let rig = Rig::start();
    let cut_at =
        |n_tokens: u64| json!({"reasoning": null, "tools": tools(), "max_output_tokens": n_tokens});
    let named = |events: &[Value], name: &str| {
        events
            .iter()
            .any(|event| event["type"] == format!("response.function_call_arguments.{name}"))
    };
    // The first limit at which a stream shows the beginning of a call.
    let (n_tokens, events) = (10..200)
        .map(|n_tokens| (n_tokens, events(&streamed(&rig, CALLS, &cut_at(n_tokens)))))
        .find(|(_, events)| named(events, "delta"))
        .unwrap();
    assert!(!named(&events, "done"));
    let whole = ask(&rig, CALLS, &cut_at(n_tokens));
    assert_eq!(whole["status"], "incomplete");
    let output = whole["output"].as_array().unwrap();
    assert!(output.iter().all(|item| item["type"] != "function_call"), "{whole}");
    let last = events.last().unwrap();
    assert_eq!(comparable(last["response"].clone()), comparable(whole));
}

#[test]
fn usage_counts_what_chat_counts() {
    let rig = Rig::start();
    let usage = ask(&rig, "a</think>b", &json!({"reasoning": null}))["usage"].clone();
    let chat = rig.chat(&json!({"model": "deepseek-v4-flash",
        "messages": [{"role": "user", "content": "a</think>b"}]}));
    let chat = &chat.json()["usage"];
    assert_eq!(usage["input_tokens"], chat["prompt_tokens"]);
    assert_eq!(usage["output_tokens"], chat["completion_tokens"]);
    assert_eq!(usage["total_tokens"], chat["total_tokens"]);
    let reasoning = &usage["output_tokens_details"]["reasoning_tokens"];
    assert_eq!(*reasoning, chat["completion_tokens_details"]["reasoning_tokens"]);
    assert_eq!(usage["input_tokens_details"], json!({"cached_tokens": 0, "cache_write_tokens": 0}));
}

/// The next request of an agent: all that was said, what the server answered, and the results.
fn next_turn(rig: &Rig, first: &Value, sealed_only: bool) -> Value {
    let mut input = vec![json!({"type": "message", "role": "user", "content": CALLS})];
    for item in first["output"].as_array().unwrap() {
        let mut item = item.clone();
        if sealed_only && item["type"] == "reasoning" {
            item.as_object_mut().unwrap().remove("content");
            item["id"] = Value::Null;
        }
        let call = item.get("call_id").cloned();
        input.push(item);
        if let Some(call_id) = call {
            let output = json!([{"type": "input_text", "text": "12 degrees"}]);
            input.push(
                json!({"type": "function_call_output", "call_id": call_id, "output": output}),
            );
        }
    }
    // Outputs may come right after their calls, or after all of them.
    input.sort_by_key(|item| item["type"] == "function_call_output");
    input.push(json!({"role": "user", "content": [{"type": "input_text", "text": "x</think>y"}]}));
    let change = json!({"input": input, "reasoning": null, "tools": tools()});
    ask(rig, "", &change)
}

#[test]
fn an_agent_goes_on_with_its_reasoning_calls_and_results() {
    let rig = Rig::start();
    let include = json!(["reasoning.encrypted_content"]);
    let change = json!({"reasoning": null, "tools": tools(), "include": include});
    let first = ask(&rig, CALLS, &change);
    let calls: Vec<&Value> = first["output"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|i| i["type"] == "function_call")
        .collect();
    assert_eq!(calls.len(), 2);
    assert_eq!(calls[0]["arguments"], "{\"city\": \"Oslo\"}");

    let answered = next_turn(&rig, &first, false);
    assert_eq!(answered["output"][1]["content"][0]["text"], "y");
    // Sealed reasoning is as good as its text: the prompt has the same tokens.
    let sealed = next_turn(&rig, &first, true);
    assert_eq!(sealed["usage"]["input_tokens"], answered["usage"]["input_tokens"]);
}

#[test]
fn the_conversation_is_rendered_as_chat_renders_it() {
    let rig = Rig::start();
    let responses = json!({"model": "deepseek-v4-flash", "instructions": "Be brief.",
        "tools": tools(), "max_output_tokens": 1, "input": [
            {"role": "developer", "content": "Use tools."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"},
                                         {"type": "input_text", "text": "Please."}]},
            {"type": "reasoning", "summary": [], "content": [
                {"type": "reasoning_text", "text": "Look."}]},
            {"type": "message", "role": "assistant", "content": [
                {"type": "output_text", "text": "Let me see.", "annotations": []}]},
            {"type": "function_call", "call_id": "c", "name": "get", "arguments": "{\"city\": \"Oslo\"}"},
            {"type": "function_call_output", "call_id": "c", "output": "12"},
            {"role": "user", "content": "And?"}]});
    let function = |name: &str, rest: Value| {
        let mut function = json!({ "name": name });
        function.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        json!({"type": "function", "function": function})
    };
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let chat = json!({"model": "deepseek-v4-flash", "max_tokens": 1, "tools": [
            function("get", json!({"description": "Weather.", "parameters": parameters})),
            function("now", json!({}))],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather?\n\nPlease."},
            {"role": "assistant", "content": "Let me see.", "reasoning_content": "Look.",
             "tool_calls": [{"id": "c", "type": "function",
                             "function": {"name": "get", "arguments": "{\"city\": \"Oslo\"}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "12"},
            {"role": "user", "content": "And?"}]});
    let got = rig.post(PATH, &responses).json()["usage"]["input_tokens"].clone();
    let chat = rig.chat(&chat).json()["usage"].clone();
    assert_eq!(got, chat["prompt_tokens"]);
    // The second request found the first one's tokens in the cache: they are the same.
    assert!(got.as_u64().unwrap() > 100);
}

#[test]
fn logprobs_cover_the_text() {
    let include = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let rig = Rig::start();
    let part = ask(&rig, "Hi", &include)["output"][0]["content"][0].clone();
    let entries = part["logprobs"].as_array().unwrap();
    let text: String = entries.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!((text.as_str(), entries[0]["top_logprobs"].as_array().unwrap().len()), ("Hi", 2));
    let events = events(&streamed(&rig, "Hi", &include));
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let streamed: Vec<Value> =
        deltas.flat_map(|event| event["logprobs"].as_array().unwrap().clone()).collect();
    assert_eq!(json!(streamed), part["logprobs"]);
}

#[test]
fn a_response_that_fails_says_so_in_its_last_event() {
    let response = streamed(&Rig::start(), "NAN", &json!({}));
    let events = events(&response);
    let last = events.last().unwrap();
    assert_eq!(
        (&last["type"], &last["response"]["status"]),
        (&json!("response.failed"), &json!("failed"))
    );
    assert_eq!(last["response"]["error"]["code"], "server_error");
    let whole = Rig::start().post(PATH, &asking("NAN", &json!({})));
    assert_eq!(
        (whole.status, whole.json()["error"]["code"].as_str()),
        (500, Some("internal_error"))
    );
}

#[test]
fn each_bad_request_names_its_field() {
    let rig = Rig::start();
    let item = |item: Value| json!({ "input": [item] });
    let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"});
    let output = json!({"type": "function_call_output", "call_id": "c", "output": "r"});
    let user = json!({"role": "user", "content": "hi"});
    let image = json!({"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]});
    let file = json!({"role": "user", "content": [{"type": "input_file", "file_id": "f"}]});
    let web = json!({"tools": [{"type": "web_search"}]});
    let format = |format: Value| json!({"text": {"format": format}});
    for (change, code, param) in [
        (json!({"model": null}), "missing_required_parameter", "model"),
        (json!({"input": null}), "missing_required_parameter", "input"),
        (json!({"input": 5}), "invalid_type", "input"),
        (json!({"input": []}), "empty_array", "input"),
        (
            json!({"previous_response_id": "resp_1"}),
            "unsupported_parameter",
            "previous_response_id",
        ),
        (json!({"conversation": "conv_1"}), "unsupported_parameter", "conversation"),
        (json!({"background": true}), "unsupported_parameter", "background"),
        (json!({"max_output_tokens": 0}), "integer_below_min_value", "max_output_tokens"),
        (json!({"max_output_tokens": "8"}), "invalid_type", "max_output_tokens"),
        (
            json!({"max_output_tokens": 1_000_000_000}),
            "integer_above_max_value",
            "max_output_tokens",
        ),
        (json!({"max_output_tokens": 4096}), "context_length_exceeded", "max_output_tokens"),
        (json!({"input": "word ".repeat(5000)}), "context_length_exceeded", "input"),
        (json!({"temperature": 3}), "decimal_above_max_value", "temperature"),
        (json!({"reasoning": {"effort": "turbo"}}), "invalid_value", "reasoning.effort"),
        (json!({"instructions": 5}), "invalid_type", "instructions"),
        (item(json!({"content": "hi"})), "missing_required_parameter", "input[0].role"),
        (item(json!({"role": "wizard", "content": "hi"})), "invalid_value", "input[0].role"),
        (item(json!({"role": "user"})), "missing_required_parameter", "input[0].content"),
        (item(json!({"type": "hologram"})), "invalid_value", "input[0].type"),
        (
            item(json!({"type": "item_reference", "id": "x"})),
            "unsupported_parameter",
            "input[0].type",
        ),
        (item(json!({"type": "web_search_call"})), "unsupported_parameter", "input[0].type"),
        (item(image), "image_input_not_supported", "input[0].content[0]"),
        (item(file), "file_input_not_supported", "input[0].content[0]"),
        (item(call.clone()), "invalid_message_sequence", "input[0]"),
        (json!({"input": [call, user]}), "invalid_message_sequence", "input[0]"),
        (json!({"input": [user, output]}), "invalid_message_sequence", "input[1]"),
        (web, "unsupported_parameter", "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "missing_required_parameter", "tools[0].name"),
        (json!({"tools": [tools()[0], tools()[0]]}), "invalid_value", "tools[1].name"),
        (json!({"tool_choice": "required"}), "invalid_value", "tool_choice"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "name": "x"}}),
            "invalid_value",
            "tool_choice.name",
        ),
        (
            json!({"tools": tools(), "tool_choice": {"type": "web_search"}}),
            "unsupported_parameter",
            "tool_choice.type",
        ),
        (format(json!({"type": "xml"})), "invalid_value", "text.format.type"),
        (
            format(json!({"type": "json_schema", "schema": {}})),
            "missing_required_parameter",
            "text.format.name",
        ),
        (
            format(json!({"type": "json_schema", "name": "n", "schema": {"type": "banana"}})),
            "invalid_json_schema",
            "text.format.schema",
        ),
        (format(json!({"type": "json_object"})), "json_keyword_missing", "input"),
    ] {
        let response = rig.post(PATH, &asking("hi", &change));
        let error = &response.json()["error"];
        let got = (response.status, error["code"].as_str(), error["param"].as_str());
        assert_eq!(got, (400, Some(code), Some(param)), "{change}: {}", response.body);
    }
}

#[test]
fn every_path_answers_and_nothing_is_kept() {
    let rig = Rig::start();
    for path in [PATH, "/responses", "/beta/responses", "/beta/v1/responses", "/v1/responses/"] {
        assert_eq!(rig.post(path, &asking("Hi", &json!({}))).status, 200, "{path}");
    }
    assert_eq!(rig.get("/v1/responses/resp_1").status, 404);
    assert_eq!(exchange(rig.address, "GET /v1/responses HTTP/1.1", b"").status, 405);
    let loading = Rig::with(Options { loaded: false, ..Options::default() });
    assert_eq!(loading.post(PATH, &asking("Hi", &json!({}))).status, 503);
}

#[test]
fn silence_is_filled_with_comments() {
    let rig = Rig::configured(|config| config.sse.keepalive_s = 1);
    let response = streamed(&rig, "PAUSE", &json!({}));
    assert!(response.body.contains(": keep-alive\n\n"));
    events(&response);
}

#[test]
fn errors_name_the_fields_that_were_sent() {
    let rig = Rig::start();
    let strange = json!({"type": "object", "properties": {"a": {"type": "string",
        "pattern": "(?=x)y"}}, "required": ["a"], "additionalProperties": false});
    let tool = json!({"type": "function", "name": "f", "strict": true, "parameters": strange});
    let format = json!({"type": "json_schema", "name": "n", "strict": true, "schema": strange});
    for (change, param) in [
        (json!({"tools": [tool], "tool_choice": "required"}), "tools[0].parameters"),
        (json!({"text": {"format": format}}), "text.format.schema"),
    ] {
        let response = rig.post(PATH, &asking("hi", &change));
        let error = &response.json()["error"];
        assert_eq!((response.status, &error["param"]), (422, &json!(param)), "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(&format!("`{param}`")) && !message.contains("function"));
    }
    let rig = Rig::configured(|config| config.compat.require_reasoning_roundtrip = true);
    let items = json!([{"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c", "name": "get", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "r"}]);
    let thinking = json!({"input": items, "tools": tools(), "reasoning": {"effort": "high"}});
    let error = rig.post(PATH, &asking("", &thinking)).json();
    assert_eq!(error["error"]["param"], "input");
    assert!(error["error"]["message"].as_str().unwrap().contains("a `reasoning` item"));
}

#[test]
fn odd_endings_are_told() {
    let rig = Rig::start();
    let thinking = json!({"reasoning": {"effort": "high"}});
    let thought = ask(&rig, "only thoughts", &thinking);
    assert_eq!(thought["finish_details"]["thought_only"], true);
    let looping = ask(&rig, "FOREVER", &json!({"max_output_tokens": 400}));
    assert_eq!(looping["finish_details"]["token_loop"], json!({"period": 1, "repeats": 400}));
    assert!(ask(&rig, "Hi", &json!({})).get("finish_details").is_none());

    // The first limit at which a call is begun.
    let cut_at = |n_tokens: u64| {
        json!({"tools": tools(), "reasoning": {"effort": "high"},
        "max_output_tokens": n_tokens})
    };
    let (cut, whole) = (10..200)
        .map(|n_tokens| (cut_at(n_tokens), ask(&rig, CALLS, &cut_at(n_tokens))))
        .find(|(_, whole)| whole["finish_details"]["cut_call"] == true)
        .unwrap();
    assert_eq!(whole["status"], "incomplete");
    let stream = events(&streamed(&rig, CALLS, &cut));
    let last = &stream.last().unwrap()["response"];
    assert_eq!(last["finish_details"], whole["finish_details"]);
}
