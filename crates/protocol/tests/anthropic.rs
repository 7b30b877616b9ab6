//! Messages requests: what blocks become, and which field a refusal names.

use fathom_protocol::anthropic::{MessagesRequest, Purpose};
use fathom_protocol::openai::{Arguments, Effort, Role, Rules, ToolChoice};
use fathom_protocol::{ApiError, parse_object};
use serde_json::{Value, json};

fn read(change: &Value) -> Result<MessagesRequest, ApiError> {
    let mut body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8});
    for (name, value) in change.as_object().unwrap() {
        body[name] = value.clone();
    }
    let object = parse_object(body.to_string().as_bytes())?;
    MessagesRequest::read(&object, &Rules::default(), Purpose::Generate)
}

fn turns(messages: &Value) -> Value {
    json!({ "messages": messages })
}

fn call(id: &str) -> Value {
    json!({"type": "tool_use", "id": id, "name": "f", "input": {"b": 1, "a": 2}})
}

fn result(id: &str) -> Value {
    json!({"type": "tool_result", "tool_use_id": id, "content": "r", "is_error": true})
}

#[test]
fn each_refusal_names_its_field() {
    let user = |content: Value| turns(&json!([{"role": "user", "content": content}]));
    let asks = json!({"role": "assistant", "content": [call("a")]});
    for (change, code, param) in [
        (json!({"max_tokens": null}), "missing_required_parameter", "max_tokens"),
        (json!({"max_tokens": 0}), "integer_below_min_value", "max_tokens"),
        (json!({"messages": null}), "missing_required_parameter", "messages"),
        (json!({"messages": []}), "empty_array", "messages"),
        (user(json!(5)), "invalid_type", "messages[0].content"),
        (user(json!([])), "missing_required_parameter", "messages[0].content"),
        (user(json!([{"type": "image"}])), "image_input_not_supported", "messages[0].content[0]"),
        (user(json!([{"type": "document"}])), "file_input_not_supported", "messages[0].content[0]"),
        (user(json!([{"type": "hologram"}])), "invalid_value", "messages[0].content[0].type"),
        (user(json!([call("a")])), "invalid_value", "messages[0].content[0].type"),
        (
            user(json!([result("a")])),
            "invalid_message_sequence",
            "messages[0].content[0].tool_use_id",
        ),
        (turns(&json!([asks])), "invalid_message_sequence", "messages[0].content[0]"),
        (
            turns(&json!([asks, {"role": "user", "content": "hi"}])),
            "invalid_message_sequence",
            "messages[0].content[0]",
        ),
        (turns(&json!([{"role": "tool", "content": "x"}])), "invalid_value", "messages[0].role"),
        (json!({"system": 5}), "invalid_type", "system"),
        (json!({"stop_sequences": ["a", 1]}), "invalid_type", "stop_sequences[1]"),
        (json!({"stop_sequences": [""]}), "invalid_value", "stop_sequences"),
        (json!({"thinking": {}}), "missing_required_parameter", "thinking.type"),
        (json!({"thinking": {"type": "maybe"}}), "invalid_value", "thinking.type"),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 0}}),
            "integer_below_min_value",
            "thinking.budget_tokens",
        ),
        (json!({"output_config": {"effort": "vast"}}), "invalid_value", "output_config.effort"),
        (
            json!({"output_config": {"format": {"type": "xml"}}}),
            "invalid_value",
            "output_config.format.type",
        ),
        (
            json!({"metadata": {"user_id": "u".repeat(600)}}),
            "string_above_max_length",
            "metadata.user_id",
        ),
        (json!({"tools": [{"type": "bash_1"}]}), "unsupported_parameter", "tools[0].type"),
        (json!({"tools": [{"name": "f"}]}), "missing_required_parameter", "tools[0].input_schema"),
        (
            json!({"tools": [{"name": "n".repeat(129), "input_schema": {"type": "object"}}]}),
            "invalid_value",
            "tools[0].name",
        ),
        (json!({"tool_choice": {"type": "any"}}), "invalid_value", "tool_choice"),
        (
            json!({"tool_choice": {"type": "tool", "name": "f"}}),
            "invalid_value",
            "tool_choice.name",
        ),
    ] {
        let error = read(&change).expect_err(&change.to_string());
        let got = (error.code.as_str(), error.param.as_deref().unwrap_or("null"));
        assert_eq!(got, (code, param), "{change}: {}", error.message);
    }
}

#[test]
fn blocks_become_messages_and_one_role_speaks_once() {
    let text = |text: &str| json!({"type": "text", "text": text, "cache_control": {}});
    let request = read(&json!({
        "system": [text("s"), text("t")],
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": [text("b")]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "?"},
                text("c"), call("1"), call("2")]},
            {"role": "user", "content": [result("2"), result("1"), text("d")]},
            {"role": "assistant", "content": "e"},
        ]
    }));
    let messages = request.unwrap().chat.messages;
    let said: Vec<(Role, &str)> =
        messages.iter().map(|m| (m.role, m.content.as_deref().unwrap())).collect();
    let expected = [
        (Role::System, "s\n\nt"),
        (Role::User, "a\n\nb"),
        (Role::Assistant, "c"),
        (Role::Tool, "r"),
        (Role::Tool, "r"),
        (Role::User, "d"),
        (Role::Assistant, "e"),
    ];
    assert_eq!(said, expected);
    assert_eq!(messages[2].reasoning.as_deref(), Some("hm"));
    let Arguments::Object(input) = &messages[2].tool_calls[1].arguments else { panic!() };
    assert_eq!(serde_json::to_string(input).unwrap(), r#"{"b":1,"a":2}"#);
    assert_eq!(messages[3].tool_call_id.as_deref(), Some("2"));
    let prefix: Vec<bool> = messages.iter().map(|m| m.prefix).collect();
    assert_eq!(prefix, [false, false, false, false, false, false, true]);
}

#[test]
fn tools_and_effort_are_those_of_the_chat_surface() {
    let request = read(&json!({
        "tools": [{"name": "f", "input_schema": {"type": "object"}, "description": "d"}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": true},
        "output_config": {"effort": "max"},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "metadata": {"user_id": "me"},
        "top_k": 5, "stop_sequences": ["x"], "mcp_servers": []
    }))
    .unwrap();
    let chat = &request.chat;
    let function = serde_json::to_string(&chat.tools[0].function).unwrap();
    assert_eq!(function, r#"{"name":"f","description":"d","parameters":{"type":"object"}}"#);
    assert_eq!(chat.tool_choice, ToolChoice::Named("f".into()));
    assert!(!chat.parallel_tool_calls && request.omit_thinking);
    assert_eq!((chat.thinking.toggle, chat.thinking.effort), (Some(true), Some(Effort::Max)));
    assert_eq!((chat.sampling.max_tokens, chat.sampling.top_k), (Some(("max_tokens", 8)), Some(5)));
    assert_eq!(chat.sampling.user_id.as_deref(), Some("me"));
    assert_eq!(chat.unknown, ["mcp_servers"]);
}

#[test]
fn an_answer_without_a_word_comes_back() {
    let said = |content: Value| {
        let turns = turns(&json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "b"},
        ]));
        read(&turns).unwrap().chat.messages[1].content.clone()
    };
    assert_eq!(said(json!([])).as_deref(), Some(""));
    assert_eq!(said(json!([{"type": "redacted_thinking", "data": "?"}])).as_deref(), Some(""));
}

#[test]
fn names_of_tools_may_be_twice_as_long_as_on_the_chat_surface() {
    let name = "mcp__plugin_x__y".repeat(8);
    let tools = json!({"tools": [{"name": name, "input_schema": {"type": "object"}}]});
    assert_eq!(read(&tools).unwrap().chat.tools[0].name, name);
}
