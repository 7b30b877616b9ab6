//! Section 18 of the API, row by row: what each bad request gets, over the wire.

use serde_json::{Value, json};

use crate::rig::{Options, Rig};

type Row = (&'static str, Value, u16, &'static str, Option<&'static str>);

fn tool(function: Value) -> Value {
    json!({"tools": [{"type": "function", "function": function}]})
}

fn user(content: Value) -> Value {
    json!({"messages": [{"role": "user", "content": content}]})
}

fn schema(schema: Value, strict: bool) -> Value {
    tool(json!({"name": "f", "parameters": schema, "strict": strict}))
}

fn message_rows() -> Vec<Row> {
    let image = json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]);
    let call = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
    let ask = json!({"role": "user", "content": "hi"});
    let none = Value::Null;
    vec![
        ("E13", json!({"model": none}), 400, "missing_required_parameter", Some("model")),
        ("E14", json!({"model": 5}), 400, "invalid_type", Some("model")),
        ("E15", json!({"model": "no-such-model"}), 404, "model_not_found", Some("model")),
        ("E16", json!({"messages": none}), 400, "missing_required_parameter", Some("messages")),
        ("E17", json!({"messages": []}), 400, "empty_array", Some("messages")),
        ("E18", json!({"messages": "hi"}), 400, "invalid_type", Some("messages")),
        (
            "E19",
            json!({"messages": [{"content": "hi"}]}),
            400,
            "missing_required_parameter",
            Some("messages[0].role"),
        ),
        (
            "E20",
            json!({"messages": [{"role": "wizard", "content": "hi"}]}),
            400,
            "invalid_value",
            Some("messages[0].role"),
        ),
        (
            "E21",
            json!({"messages": [{"role": "user"}]}),
            400,
            "missing_required_parameter",
            Some("messages[0].content"),
        ),
        ("E22", user(json!(42)), 400, "invalid_type", Some("messages[0].content")),
        (
            "E23",
            user(json!([{"type": "hologram"}])),
            400,
            "invalid_value",
            Some("messages[0].content[0].type"),
        ),
        ("E24", user(image), 400, "image_input_not_supported", Some("messages[0].content[1]")),
        (
            "E25",
            json!({"messages": [ask, {"role": "tool", "tool_call_id": "c", "content": "x"}]}),
            400,
            "invalid_message_sequence",
            Some("messages[1]"),
        ),
        (
            "E26",
            json!({"messages": [ask, call]}),
            400,
            "invalid_message_sequence",
            Some("messages[1]"),
        ),
        (
            "E26c",
            json!({"messages": [ask, call, {"role": "tool", "content": "x"}]}),
            400,
            "missing_required_parameter",
            Some("messages[2].tool_call_id"),
        ),
        (
            "E28",
            json!({"messages": [{"role": "user", "content": "hi", "prefix": true}]}),
            400,
            "invalid_value",
            Some("messages[0].prefix"),
        ),
        (
            "E34",
            user(json!("word ".repeat(5000))),
            400,
            "context_length_exceeded",
            Some("messages"),
        ),
    ]
}

fn sampling_rows() -> Vec<Row> {
    vec![
        ("E29", json!({"max_tokens": 0}), 400, "integer_below_min_value", Some("max_tokens")),
        ("E30", json!({"max_tokens": -5}), 400, "integer_below_min_value", Some("max_tokens")),
        ("E31", json!({"max_tokens": "8"}), 400, "invalid_type", Some("max_tokens")),
        ("E32", json!({"max_tokens": 1.5}), 400, "invalid_type", Some("max_tokens")),
        (
            "E33",
            json!({"max_tokens": 1_000_000_000}),
            400,
            "integer_above_max_value",
            Some("max_tokens"),
        ),
        ("E35", json!({"temperature": 2.5}), 400, "decimal_above_max_value", Some("temperature")),
        ("E36", json!({"temperature": -0.1}), 400, "decimal_below_min_value", Some("temperature")),
        ("E37", json!({"temperature": "hot"}), 400, "invalid_type", Some("temperature")),
        ("E38", json!({"top_p": 1.5}), 400, "decimal_above_max_value", Some("top_p")),
        (
            "E39",
            json!({"presence_penalty": 3}),
            400,
            "decimal_above_max_value",
            Some("presence_penalty"),
        ),
        (
            "E40",
            json!({"frequency_penalty": -3}),
            400,
            "decimal_below_min_value",
            Some("frequency_penalty"),
        ),
        ("E41", json!({"n": 0}), 400, "integer_below_min_value", Some("n")),
        ("E42", json!({"n": 100_000}), 400, "integer_above_max_value", Some("n")),
        ("E43", json!({"stop": vec!["s"; 17]}), 400, "array_above_max_length", Some("stop")),
        ("E44", json!({"stop": ""}), 400, "invalid_value", Some("stop")),
        ("E44", json!({"stop": [""]}), 400, "invalid_value", Some("stop")),
        ("E45", json!({"stop": 3}), 400, "invalid_type", Some("stop")),
        (
            "E46",
            json!({"logprobs": true, "top_logprobs": 21}),
            400,
            "integer_above_max_value",
            Some("top_logprobs"),
        ),
        ("E47", json!({"top_logprobs": 2}), 400, "conflicting_parameters", Some("top_logprobs")),
        (
            "E48",
            json!({"stream_options": {"include_usage": true}}),
            400,
            "conflicting_parameters",
            Some("stream_options"),
        ),
        ("E49", json!({"stream": "yes"}), 400, "invalid_type", Some("stream")),
        ("E50", json!({"seed": "a"}), 400, "invalid_type", Some("seed")),
        (
            "E51",
            json!({"logit_bias": {"0": 500}}),
            400,
            "decimal_above_max_value",
            Some("logit_bias"),
        ),
        ("E52", json!({"logit_bias": {"x": 1}}), 400, "invalid_value", Some("logit_bias")),
        ("E52", json!({"logit_bias": {"1000000": 1}}), 400, "invalid_value", Some("logit_bias")),
        (
            "E73",
            json!({"user_id": "u".repeat(600)}),
            400,
            "string_above_max_length",
            Some("user_id"),
        ),
        (
            "E74",
            json!({"functions": [{"name": "f"}]}),
            400,
            "unsupported_parameter",
            Some("functions"),
        ),
        ("E75", json!({"modalities": ["audio"]}), 400, "unsupported_parameter", Some("modalities")),
    ]
}

fn tool_rows() -> Vec<Row> {
    let parameters = Some("tools[0].function.parameters");
    let open = json!({"type": "object", "properties": {}, "required": []});
    let optional = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": [], "additionalProperties": false});
    let keyword = |name: &str| {
        let mut closed = json!({"type": "object", "properties": {}, "required": [], "additionalProperties": false});
        closed[name] = json!({"type": "object", "additionalProperties": false});
        closed
    };
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let with = |mut tools: Value, choice: Value| {
        tools["tool_choice"] = choice;
        tools
    };
    let format = |format: Value| json!({ "response_format": format });
    let banana =
        json!({"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "banana"}}});
    vec![
        ("E53", json!({"tools": {}}), 400, "invalid_type", Some("tools")),
        (
            "E54",
            json!({"tools": [{"type": "function"}]}),
            400,
            "missing_required_parameter",
            Some("tools[0].function"),
        ),
        (
            "E55",
            tool(json!({"name": "bad name!"})),
            400,
            "invalid_value",
            Some("tools[0].function.name"),
        ),
        (
            "E56",
            json!({"tools": [named("f"), named("f")]}),
            400,
            "invalid_value",
            Some("tools[1].function.name"),
        ),
        (
            "E57",
            json!({"tools": vec![named("f"); 129]}),
            400,
            "array_above_max_length",
            Some("tools"),
        ),
        (
            "E58",
            schema(json!({"type": "string"}), false),
            400,
            "invalid_function_parameters",
            parameters,
        ),
        ("E59", schema(optional, true), 400, "invalid_function_parameters", parameters),
        ("E60", schema(open, true), 400, "invalid_function_parameters", parameters),
        ("E61", schema(keyword("not"), true), 422, "unsupported_schema", parameters),
        ("E61", schema(keyword("if"), true), 422, "unsupported_schema", parameters),
        ("E62", json!({"tool_choice": "required"}), 400, "invalid_value", Some("tool_choice")),
        (
            "E63",
            with(tool(json!({"name": "f"})), named("g")),
            400,
            "invalid_value",
            Some("tool_choice.function.name"),
        ),
        ("E64", json!({"tool_choice": "sometimes"}), 400, "invalid_value", Some("tool_choice")),
        ("E65", format(json!({"type": "xml"})), 400, "invalid_value", Some("response_format.type")),
        (
            "E66",
            format(json!({"type": "json_object"})),
            400,
            "json_keyword_missing",
            Some("messages"),
        ),
        (
            "E67",
            format(json!({"type": "json_schema"})),
            400,
            "missing_required_parameter",
            Some("response_format.json_schema"),
        ),
        (
            "E68",
            format(banana),
            400,
            "invalid_json_schema",
            Some("response_format.json_schema.schema"),
        ),
        (
            "E69",
            json!({"thinking": {"type": "maybe"}}),
            400,
            "invalid_value",
            Some("thinking.type"),
        ),
        ("E70", json!({"thinking": "on"}), 400, "invalid_type", Some("thinking")),
        (
            "E71",
            json!({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": false}}),
            400,
            "conflicting_parameters",
            Some("chat_template_kwargs.enable_thinking"),
        ),
        (
            "E72",
            json!({"reasoning_effort": "turbo"}),
            400,
            "invalid_value",
            Some("reasoning_effort"),
        ),
    ]
}

#[track_caller]
fn check(rig: &Rig, rows: &[Row]) {
    for (id, change, status, code, param) in rows {
        let mut body = json!({"model": "deepseek-v4-flash", "max_tokens": 8,
            "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let response = rig.chat(&body);
        let error = &response.json()["error"];
        let got = (response.status, error["code"].as_str(), error["param"].as_str());
        assert_eq!(got, (*status, Some(*code), *param), "{id}: {}", response.body);
        assert_eq!(error["type"], "invalid_request_error", "{id}");
    }
}

#[test]
fn every_row_about_messages() {
    check(&Rig::start(), &message_rows());
}

#[test]
fn every_row_about_sampling() {
    check(&Rig::start(), &sampling_rows());
}

#[test]
fn every_row_about_tools_formats_and_thinking() {
    check(&Rig::start(), &tool_rows());
}

#[test]
fn a_trailing_assistant_message_where_it_is_refused() {
    let mut options = Options::default();
    options.config.compat.trailing_assistant = fathom_protocol::openai::TrailingAssistant::Reject;
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let row = (
        "E27",
        json!({"messages": messages}),
        400,
        "invalid_message_sequence",
        Some("messages[1]"),
    );
    check(&Rig::with(options), &[row]);
}
