//! Event streams: their bytes, their order, and that they say what whole answers say.

use async_openai::types::chat::CreateChatCompletionStreamResponse;
use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::client::Response;
use crate::rig::{Rig, normalised, saying};

fn streamed(rig: &Rig, text: &str, change: &Value) -> Response {
    let mut body = saying(text, change);
    body["stream"] = json!(true);
    let response = rig.chat(&body);
    assert_eq!(response.status, 200, "{}", response.body);
    response
}

/// The chunks of a stream, each of which the OpenAI types must understand.
fn chunks(response: &Response) -> Vec<Value> {
    let chunks = response.chunks();
    for chunk in &chunks {
        let typed: CreateChatCompletionStreamResponse =
            serde_json::from_value(chunk.clone()).unwrap();
        assert_eq!(typed.object.as_str(), "chat.completion.chunk");
    }
    assert!(response.complete);
    chunks
}

/// What the deltas of one choice add up to.
fn collected(chunks: &[Value], index: u64, field: &str) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let of_index = choices.filter(|choice| choice["index"] == index);
    of_index.filter_map(|choice| choice["delta"][field].as_str()).collect()
}

const CALL: &str = "Hm.</think>Sure.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n</｜DSML｜tool_calls>";

#[test]
fn a_short_stream_byte_by_byte() {
    let rig = Rig::start();
    let response = streamed(&rig, "Hi", &json!({"stream_options": {"include_usage": true}}));
    chunks(&response);
    assert_snapshot!(normalised(&response.body), @r#"
data: {"id":"chatcmpl-…","object":"chat.completion.chunk","created":…,"model":"deepseek-v4-flash","system_fingerprint":"fp_0123abcd","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}

data: {"id":"chatcmpl-…","object":"chat.completion.chunk","created":…,"model":"deepseek-v4-flash","system_fingerprint":"fp_0123abcd","choices":[{"index":0,"delta":{"content":"H"},"logprobs":null,"finish_reason":null}],"usage":null}

data: {"id":"chatcmpl-…","object":"chat.completion.chunk","created":…,"model":"deepseek-v4-flash","system_fingerprint":"fp_0123abcd","choices":[{"index":0,"delta":{"content":"i"},"logprobs":null,"finish_reason":null}],"usage":null}

data: {"id":"chatcmpl-…","object":"chat.completion.chunk","created":…,"model":"deepseek-v4-flash","system_fingerprint":"fp_0123abcd","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":null}

data: {"id":"chatcmpl-…","object":"chat.completion.chunk","created":…,"model":"deepseek-v4-flash","system_fingerprint":"fp_0123abcd","choices":[],"usage":{"prompt_tokens":6,"completion_tokens":3,"total_tokens":9,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0},"prompt_cache_hit_tokens":0,"prompt_cache_miss_tokens":6}}

data: [DONE]
"#);
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    assert_eq!(response.header("cache-control"), Some("no-cache"));
    assert_eq!(response.header("x-accel-buffering"), Some("no"));
    assert_eq!(response.header("content-length"), None);
}

#[test]
fn reasoning_content_and_a_call_come_in_their_order() {
    let tools = json!([{"type": "function", "function": {"name": "get"}}]);
    let rig = Rig::start();
    let response = streamed(&rig, CALL, &json!({"thinking": null, "tools": tools}));
    let chunks = chunks(&response);
    let mut kinds: Vec<&str> = Vec::new();
    for chunk in &chunks {
        let choice = &chunk["choices"][0];
        let delta = choice["delta"].as_object().unwrap();
        let kind = match delta {
            _ if delta.contains_key("role") => "role",
            _ if delta.contains_key("reasoning_content") => "reasoning",
            _ if delta.contains_key("content") => "content",
            _ if delta.contains_key("tool_calls") => "call",
            _ => "end",
        };
        assert_eq!(choice["finish_reason"].is_null(), kind != "end");
        if kinds.last() != Some(&kind) {
            kinds.push(kind);
        }
    }
    assert_eq!(kinds, ["role", "reasoning", "content", "call", "end"]);
    assert_eq!(collected(&chunks, 0, "reasoning_content"), "Hm.");
    assert_eq!(collected(&chunks, 0, "content"), "Sure.");
    let calls: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0]).collect();
    let arguments: String =
        calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"city\": \"Oslo\"}");
    let first = calls.iter().find(|call| call.is_object()).unwrap();
    assert_eq!(first["function"], json!({"name": "get", "arguments": ""}));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let rig = Rig::start();
    let tools = json!([{"type": "function", "function": {"name": "get"}}]);
    for (text, change) in [
        ("Grüße, 世界 🎉!", json!({})),
        (CALL, json!({"thinking": null, "tools": tools})),
        ("stop at the END of it", json!({"stop": ["END"]})),
        ("almost EN but no end", json!({"stop": ["END"]})),
        ("thoughts only", json!({"thinking": null})),
        ("cut here, somewhere", json!({"max_tokens": 5})),
        ("a</think>b", json!({"thinking": null, "include_reasoning": false})),
        ("", json!({})),
    ] {
        let whole = rig.say(text, &change).json();
        let chunks = chunks(&streamed(&rig, text, &change));
        let choice = &whole["choices"][0];
        for field in ["content", "reasoning_content"] {
            let expected = choice["message"][field].as_str().unwrap_or_default();
            assert_eq!(collected(&chunks, 0, field), expected, "{field} of {text:?}");
        }
        let end = &chunks.last().unwrap()["choices"][0];
        for field in ["finish_reason", "stop_reason"] {
            assert_eq!(end[field], choice[field], "{field} of {text:?}");
        }
    }
}

#[test]
fn logprobs_come_with_the_text_they_belong_to() {
    let rig = Rig::start();
    let change = json!({"thinking": null, "logprobs": true, "stop": ["zz", "!"]});
    let text = "é🎉</think>fi zoo nal!";
    let whole = rig.say(text, &change).json();
    let chunks = chunks(&streamed(&rig, text, &change));
    for field in ["content", "reasoning_content"] {
        let mut entries = Vec::new();
        for chunk in &chunks {
            let choice = &chunk["choices"][0];
            let list = choice["logprobs"][field].as_array().cloned().unwrap_or_default();
            if field == "content" && !list.is_empty() {
                assert!(choice["delta"]["content"].is_string());
            }
            entries.extend(list);
        }
        assert!(!entries.is_empty());
        assert_eq!(json!(entries), whole["choices"][0]["logprobs"][field], "{field}");
    }
}

#[test]
fn choices_may_interleave_but_each_is_whole() {
    let rig = Rig::start();
    let change = json!({"n": 3, "stream_options": {"include_usage": true}});
    let chunks = chunks(&streamed(&rig, "Several words to say", &change));
    let (usage, choices) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], rig.say("Several words to say", &json!({"n": 3})).json()["usage"]);
    for index in 0..3 {
        assert_eq!(collected(choices, index, "content"), "Several words to say");
        let own: Vec<&Value> =
            choices.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        let ended: Vec<bool> = own.iter().map(|c| !c["finish_reason"].is_null()).collect();
        assert_eq!(ended.iter().position(|ended| *ended), Some(own.len() - 1));
    }
    for chunk in choices {
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
        assert!(chunk["usage"].is_null() && chunk.get("usage").is_some());
        for field in ["id", "created", "model"] {
            assert_eq!(chunk[field], usage[field]);
        }
    }
}

#[test]
fn usage_is_on_the_last_chunk_of_a_choice_if_the_server_is_told_so() {
    let rig = Rig::configured(|config| config.compat.usage_on_final_chunk = true);
    let chunks = chunks(&streamed(&rig, "Hi", &json!({"n": 2})));
    let with_usage: Vec<bool> = chunks.iter().map(|chunk| chunk["usage"].is_object()).collect();
    assert_eq!(with_usage.iter().position(|with| *with), Some(chunks.len() - 1));
}

#[test]
fn reasoning_has_a_second_name_if_the_server_is_told_so() {
    let rig = Rig::configured(|config| config.compat.reasoning_alias = true);
    let change = json!({"thinking": null});
    let chunks = chunks(&streamed(&rig, "Hm</think>so", &change));
    assert_eq!(collected(&chunks, 0, "reasoning"), "Hm");
    let whole = rig.say("Hm</think>so", &change).json();
    assert_eq!(whole["choices"][0]["message"]["reasoning"], "Hm");
}

#[test]
fn a_refused_stream_is_an_ordinary_error() {
    let response = Rig::start().say("Hi", &json!({"stream": true, "temperature": 3}));
    assert_eq!(response.status, 400);
    assert_eq!(response.header("content-type"), Some("application/json"));
}

#[test]
fn a_stream_that_fails_ends_with_an_error_event_and_without_done() {
    let response = streamed(&Rig::start(), "NAN", &json!({}));
    let events = response.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "internal_error");
    assert!(!response.body.contains("[DONE]"));
}

#[test]
fn silence_is_filled_with_comments() {
    let rig = Rig::configured(|config| config.sse.keepalive_s = 1);
    // A step of this request takes longer than the silence that is allowed.
    let response = streamed(&rig, "PAUSE", &json!({}));
    assert!(response.body.contains(": keep-alive\n\n"), "{}", response.body);
    assert_eq!(collected(&chunks(&response), 0, "content"), "PAUSE");
}

#[test]
fn usage_is_on_every_chunk_if_asked_for() {
    let rig = Rig::start();
    let with = |options: Value| json!({"stream_options": options, "thinking": {"type": "enabled"}});
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = chunks(&streamed(&rig, "Hm.</think>Yes, so.", &with(options)));
    let count = |chunk: &Value, field: &str| chunk["usage"][field].as_u64().unwrap();
    let said: Vec<u64> = chunks.iter().map(|chunk| count(chunk, "completion_tokens")).collect();
    assert!(said.is_sorted() && said[0] <= 1, "{said:?}");
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(said[said.len() - 2..], [count(last, "completion_tokens"); 2]);
    for chunk in &chunks {
        let (prompt, said) = (count(chunk, "prompt_tokens"), count(chunk, "completion_tokens"));
        assert_eq!(prompt, count(last, "prompt_tokens"));
        assert_eq!(count(chunk, "total_tokens"), prompt + said);
        let reasoning = &chunk["usage"]["completion_tokens_details"]["reasoning_tokens"];
        assert!(reasoning.as_u64().unwrap() <= said);
        if chunk["choices"][0]["delta"]["reasoning_content"]
            .as_str()
            .is_some_and(|text| !text.is_empty())
        {
            assert_eq!(reasoning, said, "all of it is reasoning so far");
        }
    }
    // Alone it changes nothing, as in vLLM.
    let options = with(json!({"continuous_usage_stats": true}));
    let response = streamed(&rig, "Hm.</think>Yes.", &options);
    assert!(!response.body.contains("usage"));
}
