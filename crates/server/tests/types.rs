//! A second opinion: `async-openai`'s types read every kind of response, chunk and error.
//!
//! Its types are strict where OpenAI's description is. They know nothing of DeepSeek's fields, which
//! other tests look at.

use async_openai::error::WrappedError;
use async_openai::types::chat::{
    CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason,
};
use async_openai::types::completions::CreateCompletionResponse;
use async_openai::types::models::{ListModelResponse, Model};
use async_openai::types::responses::{Response as ResponseObject, ResponseStreamEvent};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::rig::{Options, Rig, saying};

const CALLS: &str = "Hm.</think>Sure\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n<｜DSML｜invoke name=\"get\">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

#[track_caller]
fn read<T: DeserializeOwned>(json: &str) -> T {
    let value = serde_json::from_str::<Value>(json).unwrap_or_else(|e| panic!("{e}: {json}"));
    // From a value: the enums of the types read numbers with a fraction from nothing else.
    serde_json::from_value(value).unwrap_or_else(|error| panic!("{error}: {json}"))
}

/// Requests that together show every part of a chat answer.
fn chats() -> Vec<Value> {
    let tools = json!([{"type": "function", "function": {"name": "get"}}]);
    vec![
        saying("Hello!", &json!({})),
        saying("only thoughts", &json!({"thinking": null})),
        saying("Hm</think>so", &json!({"thinking": null, "logprobs": true, "top_logprobs": 3})),
        saying("é🎉", &json!({"logprobs": true, "top_logprobs": 0, "n": 3})),
        saying(CALLS, &json!({"thinking": null, "tools": tools, "logprobs": true})),
        saying(CALLS, &json!({"thinking": null, "tools": tools, "parallel_tool_calls": false})),
        saying(CALLS, &json!({"thinking": null, "tools": tools, "max_tokens": 40})),
        saying("cut", &json!({"max_tokens": 1})),
        saying("to the END", &json!({"stop": ["END"]})),
        saying("", &json!({})),
    ]
}

#[test]
fn every_kind_of_chat_answer_is_read() {
    let rig = Rig::start();
    for body in chats() {
        let response = rig.chat(&body);
        let typed: CreateChatCompletionResponse = read(&response.body);
        let json = response.json();
        let usage = typed.usage.unwrap();
        assert_eq!(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
        assert_eq!(typed.choices.len() as u64, body["n"].as_u64().unwrap_or(1));
        for (choice, json) in typed.choices.iter().zip(json["choices"].as_array().unwrap()) {
            assert_eq!(choice.message.content.as_deref(), json["message"]["content"].as_str());
            assert_eq!(choice.logprobs.is_some(), body.get("logprobs").is_some());
            let n_calls = choice.message.tool_calls.as_ref().map_or(0, Vec::len);
            assert_eq!(choice.finish_reason == Some(FinishReason::ToolCalls), n_calls > 0);
            let finished = serde_json::to_value(choice.finish_reason).unwrap();
            assert_eq!(finished, json["finish_reason"]);
        }
    }
}

#[test]
fn every_chunk_of_a_chat_stream_is_read() {
    let rig = Rig::start();
    for mut body in chats() {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let response = rig.chat(&body);
        let mut events = response.events();
        assert_eq!(events.pop(), Some("[DONE]"));
        let chunks: Vec<CreateChatCompletionStreamResponse> =
            events.into_iter().map(read).collect();
        let (last, rest) = chunks.split_last().unwrap();
        assert!(last.choices.is_empty() && last.usage.is_some());
        assert!(rest.iter().all(|chunk| chunk.choices.len() == 1 && chunk.usage.is_none()));
        let n_ends = rest.iter().filter(|chunk| chunk.choices[0].finish_reason.is_some()).count();
        assert_eq!(n_ends as u64, body["n"].as_u64().unwrap_or(1));
    }
}

#[test]
fn text_completions_and_their_chunks_are_read() {
    let rig = Rig::start();
    let body = |change: Value| {
        let mut body = json!({"model": "deepseek-v4-flash", "prompt": "Once upon"});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        body
    };
    for change in [
        json!({}),
        json!({"logprobs": 2, "n": 2}),
        json!({"echo": true, "max_tokens": 1}),
        json!({"suffix": "end"}),
        json!({"stop": " there"}),
    ] {
        let whole = rig.post("/v1/completions", &body(change.clone()));
        let typed: CreateCompletionResponse = read(&whole.body);
        assert!(typed.choices.iter().all(|choice| choice.finish_reason.is_some()));
        let mut streamed = body(change);
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let response = rig.post("/v1/completions", &streamed);
        let mut events = response.events();
        assert_eq!(events.pop(), Some("[DONE]"));
        let chunks: Vec<CreateCompletionResponse> = events.into_iter().map(read).collect();
        let text = |index| -> String {
            let all = chunks.iter().flat_map(|chunk| &chunk.choices);
            all.filter(|choice| choice.index == index).map(|choice| &*choice.text).collect()
        };
        for choice in &typed.choices {
            assert_eq!(text(choice.index), choice.text);
        }
    }
}

#[test]
fn lists_of_models_are_read() {
    let rig = Rig::with(Options { ids: vec!["deepseek-v4-flash", "tiny"], ..Options::default() });
    let list: ListModelResponse = read(&rig.get("/v1/models").body);
    for model in &list.data {
        let one: Model = read(&rig.get(&format!("/v1/models/{}", model.id)).body);
        assert_eq!(one.id, model.id);
    }
    assert!(!list.data.is_empty());
}

#[test]
fn errors_are_read_whole_and_in_a_stream() {
    let rig = Rig::start();
    let refused = [
        rig.get("/v1/models/none"),
        rig.get("/v1/chat/completions"),
        rig.post("/v1/nothing", &json!({})),
        rig.post_raw("/v1/chat/completions", "content-type: text/plain", b"{}"),
        rig.post_raw("/v1/completions", "x-a: b", b"{"),
        rig.say("Hi", &json!({"temperature": 9})),
        rig.say("Hi", &json!({"messages": []})),
        rig.say("Hi", &json!({"model": "none"})),
        rig.say("NAN", &json!({})),
    ];
    for response in &refused {
        assert!(response.status >= 400);
        let WrappedError { error } = read(&response.body);
        assert!(!error.message.is_empty() && error.r#type.is_some() && error.code.is_some());
    }
    let streamed = rig.say("NAN", &json!({"stream": true}));
    let WrappedError { error } = read(streamed.events().last().unwrap());
    assert_eq!(error.code.as_deref(), Some("internal_error"));
}

#[test]
fn responses_and_their_events_are_read() {
    let rig = Rig::start();
    let ask = |change: Value| {
        let mut body = json!({"model": "deepseek-v4-flash", "input": "Hm.</think>Yes."});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        rig.post("/v1/responses", &body)
    };
    let tools = json!([{"type": "function", "name": "get", "strict": false,
        "parameters": {"type": "object", "properties": {}}}]);
    for change in [
        json!({}),
        json!({"reasoning": {"effort": "none"}}),
        json!({"max_output_tokens": 2}),
        json!({"tools": tools, "input": CALLS}),
    ] {
        let whole = ask(change.clone());
        assert_eq!(whole.status, 200, "{}", whole.body);
        let typed: ResponseObject = read(&whole.body);
        let usage = typed.usage.unwrap();
        assert_eq!(usage.total_tokens, usage.input_tokens + usage.output_tokens);
        let mut streamed = change;
        streamed["stream"] = json!(true);
        let response = ask(streamed);
        let data = response.body.lines().filter_map(|line| line.strip_prefix("data: "));
        let events: Vec<ResponseStreamEvent> = data.map(read).collect();
        let ended = matches!(
            events.last(),
            Some(
                ResponseStreamEvent::ResponseCompleted(_)
                    | ResponseStreamEvent::ResponseIncomplete(_)
            )
        );
        assert!(ended, "{}", response.body);
    }
}
