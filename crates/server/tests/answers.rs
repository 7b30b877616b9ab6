//! Whole answers: what a request gets when it does not stream.

use async_openai::types::chat::CreateChatCompletionResponse;
use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::client::Response;
use crate::rig::{Options, Rig, normalised, saying};

const CALL: &str = "Sure.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo \"N\"</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n<｜DSML｜invoke name=\"now\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

fn tools() -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
    json!([tool("get"), tool("now")])
}

/// The JSON of a successful answer, which the OpenAI types must understand.
#[track_caller]
fn answer(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.body);
    let typed: CreateChatCompletionResponse = serde_json::from_str(&response.body).unwrap();
    assert_eq!(typed.object, "chat.completion");
    response.json()
}

#[test]
fn a_plain_answer_has_the_fields_of_the_contract() {
    let response = Rig::start().say("Hello!", &json!({}));
    answer(&response);
    assert_snapshot!(normalised(&response.body), @r#"{"id":"chatcmpl-…","object":"chat.completion","created":…,"model":"deepseek-v4-flash","choices":[{"index":0,"message":{"role":"assistant","content":"Hello!"},"logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":8,"completion_tokens":5,"total_tokens":13,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0},"prompt_cache_hit_tokens":0,"prompt_cache_miss_tokens":8},"system_fingerprint":"fp_0123abcd"}"#);
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert!(response.header("openai-processing-ms").unwrap().parse::<u64>().is_ok());
    assert_eq!(response.header("x-request-id"), response.header("request-id"));
}

#[test]
fn thinking_is_on_by_default_and_kept_apart_from_the_answer() {
    let body = json!({"model": "deepseek-v4-flash",
        "messages": [{"role": "user", "content": "Hm.\n</think>\nYes."}]});
    let json = answer(&Rig::start().chat(&body));
    let message = &json["choices"][0]["message"];
    assert_eq!(
        (&message["reasoning_content"], &message["content"]),
        (&json!("Hm.\n"), &json!("\nYes."))
    );
    let usage = &json["usage"];
    let reasoning = usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!(0 < reasoning && reasoning < usage["completion_tokens"].as_u64().unwrap());
}

#[test]
fn reasoning_that_never_ends_leaves_the_content_empty() {
    let body = json!({"model": "deepseek-v4-flash",
        "messages": [{"role": "user", "content": "only thoughts"}]});
    let json = answer(&Rig::start().chat(&body));
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["reasoning_content"], "only thoughts");
    assert_eq!(choice["message"]["content"], "");
    assert_eq!(choice["finish_reason"], "stop");
}

#[test]
fn every_toggle_and_alias_switches_thinking() {
    let rig = Rig::start();
    let thinks = |change: Value| {
        let mut body = json!({"model": "deepseek-v4-flash",
            "messages": [{"role": "user", "content": "x"}]});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        answer(&rig.chat(&body))["choices"][0]["message"].get("reasoning_content").is_some()
    };
    for off in [
        json!({"thinking": {"type": "disabled"}}),
        json!({"chat_template_kwargs": {"thinking": false}}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
        json!({"reasoning": {"enabled": false}}),
        json!({"reasoning_effort": "none"}),
        json!({"model": "deepseek-chat"}),
        json!({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}),
        json!({"model": "deepseek-reasoner", "thinking": {"type": "disabled"}}),
        json!({"include_reasoning": false}),
    ] {
        assert!(!thinks(off.clone()), "{off}");
    }
    for on in [
        json!({}),
        json!({"reasoning_effort": "low"}),
        json!({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}),
        json!({"model": "deepseek-reasoner"}),
        json!({"model": "deepseek-chat", "thinking": {"type": "enabled"}}),
        json!({"model": "deepseek-chat", "reasoning_effort": "max"}),
    ] {
        assert!(thinks(on.clone()), "{on}");
    }
}

#[test]
fn tool_calls_are_parsed_and_their_arguments_are_json() {
    let rig = Rig::start();
    let json = answer(&rig.say(CALL, &json!({"tools": tools()})));
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "Sure.");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    let function = |i: usize| (&calls[i]["function"]["name"], &calls[i]["function"]["arguments"]);
    assert_eq!(function(0), (&json!("get"), &json!("{\"city\": \"Oslo \\\"N\\\"\", \"days\": 3}")));
    assert_eq!(function(1), (&json!("now"), &json!("{}")));
    let ids: Vec<&str> = calls.iter().map(|call| call["id"].as_str().unwrap()).collect();
    assert!(ids[0] != ids[1] && ids.iter().all(|id| id.len() >= 29), "{ids:?}");
}

#[test]
fn one_call_at_a_time_if_the_client_wants_it_so() {
    let change = json!({"tools": tools(), "parallel_tool_calls": false});
    let json = answer(&Rig::start().say(CALL, &change));
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(choice["finish_reason"], "tool_calls");
}

#[test]
fn markup_without_tools_on_offer_is_neither_a_call_nor_text() {
    let json = answer(&Rig::start().say(CALL, &json!({})));
    let choice = &json["choices"][0];
    assert!(choice["message"].get("tool_calls").is_none());
    assert!(!choice["message"]["content"].as_str().unwrap().contains("DSML"));
    assert_eq!(choice["finish_reason"], "stop");
}

#[test]
fn a_forbidden_call_is_not_even_sampled() {
    let change = json!({"tools": tools(), "tool_choice": "none", "max_tokens": 12});
    let json = answer(&Rig::start().say("<｜DSML｜tool_calls>", &change));
    let message = &json["choices"][0]["message"];
    assert!(message.get("tool_calls").is_none());
    assert!(!message["content"].as_str().unwrap().contains("DSML"), "{message}");
}

#[test]
fn a_call_cut_by_length_is_not_returned() {
    let json = answer(&Rig::start().say(CALL, &json!({"tools": tools(), "max_tokens": 40})));
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
    assert_eq!(json["usage"]["completion_tokens"], 40);
}

#[test]
fn an_answer_ends_before_its_stop_string() {
    let rig = Rig::start();
    let json = answer(&rig.say("one two three four", &json!({"stop": ["zzz", "thr"]})));
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["content"], "one two ");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("thr")));
    rig.wait_until_idle();
    assert_eq!(
        rig.metric("fathom_requests_cancelled_total{model=\"deepseek-v4-flash\",phase=\"decode\"}"),
        0.0
    );
}

#[test]
fn stop_strings_do_not_apply_to_reasoning() {
    let body =
        saying("stop here</think>and stop there", &json!({"thinking": null, "stop": "stop"}));
    let json = answer(&Rig::start().chat(&body));
    let message = &json["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "stop here");
    assert_eq!(message["content"], "and ");
}

#[test]
fn a_token_limit_is_met_exactly() {
    let rig = Rig::start();
    for field in ["max_tokens", "max_completion_tokens"] {
        let json = answer(&rig.say("FOREVER", &json!({field: 7})));
        assert_eq!(json["choices"][0]["finish_reason"], "length");
        assert_eq!(json["usage"]["completion_tokens"], 7);
    }
    let whole = answer(
        &Rig::with(Options { max_model_len: 64, ..Options::default() }).say("FOREVER", &json!({})),
    );
    assert_eq!(whole["usage"]["total_tokens"], 64);
}

#[test]
fn several_choices_are_sorted_and_counted_together() {
    let json = answer(&Rig::start().say("Hi", &json!({"n": 3, "seed": 5})));
    let indices: Vec<_> = json["choices"].as_array().unwrap().iter().map(|c| &c["index"]).collect();
    assert_eq!(indices, [0, 1, 2]);
    let one = answer(&Rig::start().say("Hi", &json!({})));
    let count = |json: &Value, name: &str| json["usage"][name].as_u64().unwrap();
    assert_eq!(count(&json, "completion_tokens"), 3 * count(&one, "completion_tokens"));
    assert_eq!(count(&json, "prompt_tokens"), count(&one, "prompt_tokens"));
}

#[test]
fn logprobs_cover_the_text_and_nothing_else() {
    let change = json!({"thinking": null, "logprobs": true, "top_logprobs": 2, "tools": tools()});
    // Without the full stop, which shares a token with the blank line that belongs to the block.
    let body = saying(&format!("Hé</think>{}", CALL.replace("Sure.", "Sure")), &change);
    let json = answer(&Rig::start().chat(&body));
    let logprobs = &json["choices"][0]["logprobs"];
    let text = |entries: &Value| {
        let entries = entries.as_array().unwrap();
        let bytes = entries.iter().flat_map(|entry| entry["bytes"].as_array().unwrap());
        let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(text(&logprobs["reasoning_content"]), "Hé");
    assert_eq!(text(&logprobs["content"]), "Sure");
    for entry in logprobs["content"].as_array().unwrap() {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(top[0]["bytes"], entry["bytes"]);
        let value = |entry: &Value| entry["logprob"].as_f64().unwrap();
        assert!(value(entry) <= 0.0 && value(&top[0]) >= value(&top[1]));
    }
    let without = answer(&Rig::start().say("Hi", &json!({})));
    assert_eq!(without["choices"][0]["logprobs"], Value::Null);
}

#[test]
fn a_prefix_is_continued_and_not_repeated() {
    let rig = Rig::start();
    let messages = json!([{"role": "user", "content": "Hello world"},
                          {"role": "assistant", "content": "Hello", "prefix": true}]);
    let json = answer(&rig.chat(&json!({"model": "deepseek-v4-flash", "messages": messages})));
    let message = &json["choices"][0]["message"];
    assert_eq!(message["content"], " world");
    assert!(message.get("reasoning_content").is_none());
}

#[test]
fn a_trailing_assistant_message_begins_a_new_turn() {
    let messages = json!([{"role": "user", "content": "Hello"},
                          {"role": "assistant", "content": "Hel"}]);
    let body = saying("", &json!({"messages": messages}));
    assert_eq!(answer(&Rig::start().chat(&body))["choices"][0]["message"]["content"], "Hello");
}

#[test]
fn tool_history_is_rendered_and_answered() {
    let messages = json!([
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]);
    let json =
        answer(&Rig::start().chat(&saying("", &json!({"messages": messages, "tools": tools()}))));
    assert_eq!(json["choices"][0]["message"]["content"], "<tool_result>sunny</tool_result>");
}

#[test]
fn a_repeated_prompt_reports_its_cached_tokens() {
    let rig = Rig::start();
    let text = "word ".repeat(900);
    let usage = |user: &str| {
        let change = json!({"max_tokens": 1, "user_id": user});
        answer(&rig.say(&text, &change))["usage"].clone()
    };
    let count = |usage: &Value, name: &str| usage[name].as_u64().unwrap();
    let cold = usage("ann");
    assert_eq!(count(&cold, "prompt_cache_hit_tokens"), 0);
    let warm = usage("ann");
    let hit = count(&warm, "prompt_cache_hit_tokens");
    assert!(hit > 0 && hit < count(&warm, "prompt_tokens"));
    assert_eq!(warm["prompt_tokens_details"]["cached_tokens"], hit);
    assert_eq!(hit + count(&warm, "prompt_cache_miss_tokens"), count(&warm, "prompt_tokens"));
    assert_eq!(count(&usage("bob"), "prompt_cache_hit_tokens"), 0);
}

#[test]
fn thinking_mode_ignores_sampling_and_says_so() {
    let rig = Rig::start();
    let change = json!({"thinking": null, "temperature": 0, "top_p": 0.5, "min_p": 0.1, "seed": 1});
    let response = rig.chat(&saying("x</think>y", &change));
    assert_eq!(response.header("x-ignored-params"), Some("temperature, top_p, min_p"));
    assert_eq!(rig.say("y", &json!({"temperature": 0})).header("x-ignored-params"), None);
}

#[test]
fn a_reasoning_budget_forces_the_end_of_reasoning() {
    let change = json!({"thinking": {"type": "enabled", "budget_tokens": 3}, "max_tokens": 8});
    let json = answer(&Rig::start().chat(&saying("FOREVER", &change)));
    let choice = &json["choices"][0];
    assert_eq!(choice["message"]["reasoning_content"], "aaa");
    assert_eq!(choice["message"]["content"], "aaaa");
    assert_eq!(json["usage"]["completion_tokens_details"]["reasoning_tokens"], 3);
    assert_eq!(choice["finish_reason"], "length");
}

#[test]
fn every_path_of_the_endpoint_answers_alike() {
    let rig = Rig::start();
    for path in [
        "/v1/chat/completions",
        "/chat/completions",
        "/beta/chat/completions",
        "/beta/v1/chat/completions",
        "/v1/chat/completions/",
    ] {
        let response = rig.post(path, &saying("Hi", &json!({})));
        assert_eq!(answer(&response)["choices"][0]["message"]["content"], "Hi", "{path}");
    }
}

#[test]
fn aliases_are_echoed_and_lead_to_the_loaded_model() {
    let rig = Rig::start();
    for model in ["deepseek-v4-flash", "deepseek-ai/DeepSeek-V4-Flash", "deepseek-chat"] {
        let response = rig.say("Hi", &json!({"model": model}));
        assert_eq!(answer(&response)["model"], model);
    }
    assert_eq!(rig.say("Hi", &json!({"model": "deepseek-v4-pro"})).status, 404);
    let other = Rig::with(Options { ids: vec!["tiny"], ..Options::default() });
    for model in ["tiny", "deepseek-reasoner"] {
        assert_eq!(answer(&other.say("Hi", &json!({"model": model})))["model"], model);
    }
    assert_eq!(other.say("Hi", &json!({"model": "deepseek-v4-flash"})).status, 404);
}
