//! What goes out, byte by byte.

use fathom_protocol::openai::models::{Model, ModelList};
use fathom_protocol::openai::response::{
    AssistantMessage, ChatCompletion, Choice, FinishDetails, FinishReason, FunctionBody,
    FunctionCall, LogprobEntry, Logprobs, StopReason, TokenLoop, TopLogprob, Usage,
};
use fathom_protocol::openai::stream::{ChatChunk, ChunkChoice, Delta, DeltaWriter};
use fathom_protocol::{ApiError, ErrorCode, Surface, sse};
use insta::assert_snapshot;
use proptest::prelude::*;

#[test]
fn a_completion_has_the_fields_of_the_contract_in_its_order() {
    let message = AssistantMessage {
        role: "assistant",
        content: Some("Hi".into()),
        reasoning_content: Some("Hm".into()),
        reasoning: None,
        tool_calls: Vec::new(),
    };
    let completion = ChatCompletion {
        id: "chatcmpl-0",
        object: "chat.completion",
        created: 1_735_000_000,
        model: "deepseek-v4-flash",
        choices: vec![Choice {
            index: 0,
            message,
            logprobs: None,
            finish_reason: FinishReason::Stop,
            stop_reason: None,
            finish_details: None,
        }],
        usage: Usage::new(12, 5, 47, 37),
        system_fingerprint: "fp_0123abcd",
    };
    assert_snapshot!(serde_json::to_string(&completion).unwrap(), @r#"{"id":"chatcmpl-0","object":"chat.completion","created":1735000000,"model":"deepseek-v4-flash","choices":[{"index":0,"message":{"role":"assistant","content":"Hi","reasoning_content":"Hm"},"logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":12,"completion_tokens":47,"total_tokens":59,"prompt_tokens_details":{"cached_tokens":5},"completion_tokens_details":{"reasoning_tokens":37},"prompt_cache_hit_tokens":5,"prompt_cache_miss_tokens":7},"system_fingerprint":"fp_0123abcd"}"#);
}

#[test]
fn a_call_only_answer_has_null_content() {
    let message = AssistantMessage {
        role: "assistant",
        content: None,
        reasoning_content: None,
        reasoning: None,
        tool_calls: vec![FunctionCall {
            id: "call_1".into(),
            kind: "function",
            function: FunctionBody { name: "f".into(), arguments: "{}".into() },
        }],
    };
    assert_snapshot!(serde_json::to_string(&message).unwrap(), @r#"{"role":"assistant","content":null,"tool_calls":[{"id":"call_1","type":"function","function":{"name":"f","arguments":"{}"}}]}"#);
}

#[test]
fn an_impossible_token_has_a_finite_logprob() {
    let top = TopLogprob { token: "b".into(), logprob: f32::NEG_INFINITY, bytes: vec![98] };
    let entry = LogprobEntry {
        token: "\u{fffd}".into(),
        logprob: -0.1,
        bytes: vec![0xe2],
        top_logprobs: vec![top],
    };
    let logprobs = Logprobs { content: vec![entry], reasoning_content: None, refusal: () };
    assert_snapshot!(serde_json::to_string(&logprobs).unwrap(), @r#"{"content":[{"token":"�","logprob":-0.1,"bytes":[226],"top_logprobs":[{"token":"b","logprob":-9999.0,"bytes":[98]}]}],"reasoning_content":null,"refusal":null}"#);
}

fn frame(delta: Delta<'_>, usage: Option<Option<Usage>>) -> String {
    let chunk = ChatChunk {
        id: "chatcmpl-0",
        object: "chat.completion.chunk",
        created: 7,
        model: "m",
        system_fingerprint: "fp_0",
        choices: vec![ChunkChoice { index: 1, delta, logprobs: None }],
        usage,
    };
    String::from_utf8(sse::event(&chunk)).unwrap()
}

#[test]
fn each_kind_of_delta_has_its_own_form() {
    let deltas = [
        Delta::Role { thinking: true },
        Delta::Role { thinking: false },
        Delta::Reasoning { text: "a\nb", alias: false },
        Delta::Reasoning { text: "a", alias: true },
        Delta::Content("c"),
        Delta::Call { index: 0, id: "call_1", name: "f" },
        Delta::Arguments { index: 0, text: "{\"a\":" },
        Delta::End { finish_reason: FinishReason::Length, stop_reason: None, finish_details: None },
        Delta::End {
            finish_reason: FinishReason::Stop,
            stop_reason: Some(StopReason::Text("###".into())),
            finish_details: Some(FinishDetails {
                cut_call: false,
                thought_only: true,
                token_loop: Some(TokenLoop { period: 2, repeats: 40 }),
            }),
        },
    ];
    let frames: String = deltas.into_iter().map(|delta| frame(delta, None)).collect();
    assert_snapshot!(frames, @r####"
data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"role":"assistant","content":null,"reasoning_content":""},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"reasoning_content":"a\nb"},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"reasoning_content":"a","reasoning":"a"},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"content":"c"},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"f","arguments":""}}]},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\":"}}]},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{},"logprobs":null,"finish_reason":"length","stop_reason":null}]}

data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":"###","finish_details":{"thought_only":true,"token_loop":{"period":2,"repeats":40},"cut_call":false}}]}
"####);
}

#[test]
fn usage_is_absent_null_or_full() {
    assert!(!frame(Delta::Content("c"), None).contains("usage"));
    assert!(frame(Delta::Content("c"), Some(None)).contains(r#","usage":null}"#));
    let full = frame(Delta::Content("c"), Some(Some(Usage::new(3, 9, 4, 9))));
    assert_snapshot!(full, @r#"data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_0","choices":[{"index":1,"delta":{"content":"c"},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":4},"prompt_cache_hit_tokens":3,"prompt_cache_miss_tokens":0}}"#);
}

#[test]
fn both_envelopes_hold_all_their_keys() {
    let error = ApiError::at(ErrorCode::QueueFull, "n", "The \"queue\" is full.");
    assert_snapshot!(error.to_json(Surface::OpenAi, "r"), @r#"{"error":{"message":"The \"queue\" is full.","type":"overloaded_error","param":"n","code":"queue_full"}}"#);
    assert_snapshot!(error.to_json(Surface::Anthropic, "r"), @r#"{"type":"error","error":{"type":"overloaded_error","message":"The \"queue\" is full."},"request_id":"r"}"#);
    assert_eq!((error.status(Surface::OpenAi), error.status(Surface::Anthropic)), (503, 529));
    let plain = ApiError::new(ErrorCode::NotFound, "No such path.");
    assert_snapshot!(plain.to_json(Surface::OpenAi, "r"), @r#"{"error":{"message":"No such path.","type":"invalid_request_error","param":null,"code":"not_found"}}"#);
}

#[test]
fn each_status_has_the_types_of_both_surfaces() {
    let mut rows: Vec<String> = ErrorCode::ALL
        .iter()
        .map(|code| {
            let (status, kind) = code.anthropic();
            format!("{} {} | {status} {kind}", code.status(), code.kind())
        })
        .collect();
    rows.sort_unstable();
    rows.dedup();
    assert_snapshot!(rows.join("\n"), @r#"
400 invalid_request_error | 400 invalid_request_error
401 authentication_error | 401 authentication_error
402 insufficient_balance_error | 402 billing_error
403 permission_error | 403 permission_error
404 invalid_request_error | 404 not_found_error
405 invalid_request_error | 405 invalid_request_error
408 timeout_error | 408 timeout_error
413 invalid_request_error | 413 request_too_large
415 invalid_request_error | 415 invalid_request_error
422 invalid_request_error | 422 invalid_request_error
429 rate_limit_error | 429 rate_limit_error
431 invalid_request_error | 431 invalid_request_error
500 server_error | 500 api_error
503 overloaded_error | 503 overloaded_error
503 overloaded_error | 529 overloaded_error
"#);
}

#[test]
fn the_model_list_satisfies_both_sdks() {
    let model = Model::new("deepseek-v4-flash", 1_735_000_000, 65_536, 393_216);
    assert_snapshot!(serde_json::to_string(&ModelList::new(vec![model])).unwrap(), @r#"{"object":"list","data":[{"id":"deepseek-v4-flash","object":"model","created":1735000000,"owned_by":"deepseek-ai","type":"model","display_name":"deepseek-v4-flash","created_at":"2024-12-24T00:26:40Z","lifecycle":"active","max_model_len":65536,"max_output_tokens":65536,"max_input_tokens":65536,"max_tokens":65536}],"has_more":false,"first_id":"deepseek-v4-flash","last_id":"deepseek-v4-flash"}"#);
}

proptest! {
    #[test]
    fn a_stream_written_delta_by_delta_has_the_bytes_of_its_chunks(
        texts in prop::collection::vec(any::<String>(), 4),
        index in any::<u32>(),
        (alias, include_usage) in any::<(bool, bool)>(),
    ) {
        // A model may be called anything, also what the writer looks for.
        for model in [texts[0].as_str(), "\"choices\":[", "choices\":["] {
            let chunk = ChatChunk {
                id: "chatcmpl-0",
                object: "chat.completion.chunk",
                created: 1_735_000_000,
                model,
                system_fingerprint: &texts[1],
                choices: Vec::new(),
                usage: include_usage.then_some(None),
            };
            let writer = DeltaWriter::new(&chunk);
            for delta in [
                Delta::Role { thinking: alias },
                Delta::Reasoning { text: &texts[2], alias },
                Delta::Content(&texts[2]),
                Delta::Call { index, id: &texts[2], name: &texts[3] },
                Delta::Arguments { index, text: &texts[3] },
            ] {
                let mut written = b"before".to_vec();
                writer.append(index, &delta, &mut written);
                let choices = vec![ChunkChoice { index, delta, logprobs: None }];
                let expected = sse::event(&ChatChunk { choices, ..chunk.clone() });
                prop_assert_eq!(&written[6..], &expected[..]);
            }
        }
    }
}
