//! What accepted requests mean.

use fathom_protocol::openai::{Arguments, ChatRequest, Effort, Role, Rules, Thinking, ToolChoice};
use fathom_protocol::parse_object;
use serde_json::{Value, json};

fn read(body: Value) -> ChatRequest {
    let object = parse_object(body.to_string().as_bytes()).unwrap();
    ChatRequest::read(&object, &Rules::default()).unwrap()
}

fn with(change: Value) -> ChatRequest {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    read(body)
}

#[test]
fn null_means_absent_everywhere() {
    let names = [
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "stop",
        "stream",
        "stream_options",
        "n",
        "seed",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "thinking",
        "reasoning",
        "reasoning_effort",
        "chat_template_kwargs",
        "user_id",
        "cache_salt",
        "functions",
        "modalities",
        "audio",
        "top_k",
    ];
    let nulls: Value = names.iter().map(|name| (name.to_string(), Value::Null)).collect();
    assert_eq!(with(nulls), with(json!({})));
}

#[test]
fn an_sdk_message_is_accepted_back_with_its_nulls() {
    let request = read(json!({"model": "m", "messages": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": null, "refusal": null, "annotations": [], "audio": null,
         "function_call": null, "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "index": 0,
             "function": {"name": "get", "arguments": "{\"a\":1}"}},
            {"id": "c2", "type": "function", "function": {"name": "put", "arguments": {"b": 1e2}}}
        ]},
        {"role": "tool", "tool_call_id": "c2", "content": [
            {"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]},
        {"role": "tool", "tool_call_id": "c1", "content": ""}
    ]}));
    let [_, assistant, result, empty] = &request.messages[..] else { panic!("four messages") };
    assert_eq!(assistant.reasoning.as_deref(), Some("hm"));
    assert_eq!(assistant.tool_calls[0].arguments, Arguments::Text("{\"a\":1}".into()));
    assert!(matches!(&assistant.tool_calls[1].arguments, Arguments::Object(o) if o.len() == 1));
    assert_eq!(result.content.as_deref(), Some("two\n\nparts"));
    assert_eq!((empty.role, empty.content.as_deref()), (Role::Tool, Some("")));
}

#[test]
fn the_newer_name_of_the_token_limit_wins() {
    let request = with(json!({"max_tokens": 5, "max_completion_tokens": 7.0}));
    assert_eq!(request.sampling.max_tokens, Some(("max_completion_tokens", 7)));
}

#[test]
fn a_clipping_server_cuts_the_token_limit() {
    let rules = Rules { clip_max_tokens: true, max_output_tokens: 100, ..Rules::default() };
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "a"}],
                      "max_tokens": 1e30});
    let object = parse_object(body.to_string().as_bytes()).unwrap();
    let request = ChatRequest::read(&object, &rules).unwrap();
    assert_eq!(request.sampling.max_tokens, Some(("max_tokens", 100)));
}

#[test]
fn toggles_and_efforts_have_one_meaning_each() {
    let thinking = |change: Value| with(change).thinking;
    let toggle = |toggle| Thinking { toggle: Some(toggle), ..Thinking::default() };
    assert_eq!(thinking(json!({})), Thinking::default());
    assert_eq!(thinking(json!({"thinking": {"type": "adaptive"}})), toggle(true));
    assert_eq!(thinking(json!({"thinking": {"type": "disabled"}})), toggle(false));
    assert_eq!(thinking(json!({"chat_template_kwargs": {"thinking": false}})), toggle(false));
    assert_eq!(thinking(json!({"chat_template_kwargs": {"enable_thinking": true}})), toggle(true));
    assert_eq!(thinking(json!({"reasoning": {"enabled": true}})), toggle(true));
    let efforts = json!({"reasoning": {"effort": "max"}, "thinking": {"effort": "low"}});
    assert_eq!(thinking(efforts).effort, Some(Effort::Max));
    let budgets = json!({"thinking": {"budget_tokens": 9}, "reasoning": {"max_tokens": 7}});
    assert_eq!(thinking(budgets).budget, Some(("reasoning.max_tokens", 7)));
    assert!(thinking(json!({"include_reasoning": false})).hide);
    assert!(thinking(json!({"reasoning": {"exclude": true}})).hide);
}

#[test]
fn the_default_tool_choice_depends_on_whether_there_are_tools() {
    let tool = json!({"type": "function", "function": {"name": "f", "description": "d"}});
    assert_eq!(with(json!({})).tool_choice, ToolChoice::None);
    assert_eq!(with(json!({"tools": []})).tool_choice, ToolChoice::None);
    assert_eq!(with(json!({"tools": [tool]})).tool_choice, ToolChoice::Auto);
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "f"}}]}});
    let request = with(json!({"tools": [tool], "tool_choice": allowed}));
    let names = vec!["f".to_owned()];
    assert_eq!(request.tool_choice, ToolChoice::Allowed { required: false, names });
}

#[test]
fn a_tool_keeps_its_function_object_as_it_came() {
    let text = r#"{"model":"m","messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"parameters":{"type":"object","properties":{"z":{"type":"integer","maximum":123456789012345678901234567890},"a":{}}},"name":"f"}}]}"#;
    let object = parse_object(text.as_bytes()).unwrap();
    let request = ChatRequest::read(&object, &Rules::default()).unwrap();
    let function = serde_json::to_string(&request.tools[0].function).unwrap();
    assert!(text.contains(&function), "{function}");
}
