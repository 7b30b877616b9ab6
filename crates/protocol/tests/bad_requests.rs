//! Section 18 of the API, row by row, as far as a request body alone decides it.

use fathom_protocol::openai::{
    self, ChatRequest, ResponseFormat, Rules, Structured, TrailingAssistant,
};
use fathom_protocol::{ApiError, parse_object};
use serde_json::{Value, json};

fn read(body: &Value, rules: &Rules) -> Result<ChatRequest, ApiError> {
    let object = parse_object(body.to_string().as_bytes())?;
    openai::model_name(&object)?;
    ChatRequest::read(&object, rules)
}

/// The base body of section 18 with `change` laid over it; `null` removes a field.
fn changed(change: &Value) -> Value {
    let mut body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8});
    for (name, value) in change.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[track_caller]
fn refuses(change: Value, code: &str, param: &str) {
    refuses_under(&Rules::default(), change, code, param);
}

#[track_caller]
fn refuses_under(rules: &Rules, change: Value, code: &str, param: &str) {
    let error = read(&changed(&change), rules).expect_err(&format!("{change} must be refused"));
    let got = (error.code.as_str(), error.param.as_deref().unwrap_or("null"));
    assert_eq!(got, (code, param), "{change}: {}", error.message);
    assert!(error.message.ends_with('.') && !error.message.contains('\n'), "{}", error.message);
}

fn messages(list: Value) -> Value {
    json!({ "messages": list })
}

fn user(content: Value) -> Value {
    messages(json!([{"role": "user", "content": content}]))
}

fn call(id: &str) -> Value {
    let function = json!({"name": "f", "arguments": "{}"});
    json!({"role": "assistant", "content": null,
           "tool_calls": [{"id": id, "type": "function", "function": function}]})
}

fn tool(parameters: Value, strict: bool) -> Value {
    json!({"tools": [{"type": "function",
                      "function": {"name": "f", "parameters": parameters, "strict": strict}}]})
}

#[test]
fn the_model_comes_before_everything_else() {
    refuses(json!({"model": null, "messages": 5}), "missing_required_parameter", "model");
    refuses(json!({"model": 5, "messages": 5}), "invalid_type", "model");
}

#[test]
fn messages_must_be_a_list_of_known_things() {
    refuses(messages(Value::Null), "missing_required_parameter", "messages");
    refuses(messages(json!([])), "empty_array", "messages");
    refuses(messages(json!("hi")), "invalid_type", "messages");
    refuses(messages(json!(["hi"])), "invalid_type", "messages[0]");
    refuses(messages(json!([{"content": "hi"}])), "missing_required_parameter", "messages[0].role");
    refuses(
        messages(json!([{"role": "wizard", "content": "hi"}])),
        "invalid_value",
        "messages[0].role",
    );
    refuses(
        messages(json!([{"role": "function", "content": "hi"}])),
        "invalid_value",
        "messages[0].role",
    );
    refuses(user(Value::Null), "missing_required_parameter", "messages[0].content");
    refuses(user(json!(42)), "invalid_type", "messages[0].content");
    refuses(user(json!([{"type": "hologram"}])), "invalid_value", "messages[0].content[0].type");
    refuses(
        user(json!([{"type": "text"}])),
        "missing_required_parameter",
        "messages[0].content[0].text",
    );
    let image =
        json!([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]);
    refuses(user(image), "image_input_not_supported", "messages[0].content[1]");
    refuses(user(json!([{"type": "file"}])), "file_input_not_supported", "messages[0].content[0]");
    refuses(
        user(json!([{"type": "input_audio"}])),
        "audio_input_not_supported",
        "messages[0].content[0]",
    );
    let rules = Rules { max_messages: 1, ..Rules::default() };
    let two = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    refuses_under(&rules, messages(two), "array_above_max_length", "messages");
    let rules = Rules { reject_developer_role: true, ..Rules::default() };
    let developer = messages(json!([{"role": "developer", "content": "a"}]));
    refuses_under(&rules, developer, "invalid_value", "messages[0].role");
}

#[test]
fn calls_and_results_must_pair_up_in_order() {
    let result = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": "ok"});
    let ask = json!({"role": "user", "content": "a"});
    let broken = |list: Value, i: usize| {
        refuses(messages(list), "invalid_message_sequence", &format!("messages[{i}]"));
    };
    broken(json!([ask, result("1")]), 1);
    broken(json!([ask, call("1")]), 1);
    broken(json!([ask, call("1"), ask]), 1);
    broken(json!([ask, call("1"), call("2"), result("2")]), 1);
    broken(json!([ask, call("1"), result("2")]), 2);
    broken(json!([ask, call("1"), result("1"), result("1")]), 3);
    broken(json!([ask, call("1"), result("1"), ask, result("1")]), 4);
    let nameless = json!([ask, call("1"), {"role": "tool", "content": "ok"}]);
    refuses(messages(nameless), "missing_required_parameter", "messages[2].tool_call_id");

    let lenient = Rules { lenient_tool_history: true, ..Rules::default() };
    assert!(read(&changed(&messages(json!([ask, result("1")]))), &lenient).is_ok());
    let fine = json!([ask, call("1"), result("1"), {"role": "assistant", "content": "so"}, ask]);
    assert!(read(&changed(&messages(fine)), &Rules::default()).is_ok());
}

#[test]
fn a_prefix_is_the_last_message_and_the_assistants() {
    let ask = json!({"role": "user", "content": "a"});
    let prefix = json!({"role": "assistant", "content": "b", "prefix": true});
    let on_user = json!([{"role": "user", "content": "a", "prefix": true}]);
    refuses(messages(on_user), "invalid_value", "messages[0].prefix");
    refuses(messages(json!([prefix, ask])), "invalid_value", "messages[0].prefix");
    let reject = Rules { trailing_assistant: TrailingAssistant::Reject, ..Rules::default() };
    let trailing = messages(json!([ask, {"role": "assistant", "content": "b"}]));
    refuses_under(&reject, trailing.clone(), "invalid_message_sequence", "messages[1]");
    assert!(read(&changed(&trailing), &Rules::default()).is_ok());
    assert!(read(&changed(&messages(json!([ask, prefix]))), &reject).is_ok());

    let mut json_mode = messages(json!([{"role": "user", "content": "json"}, prefix]));
    json_mode["response_format"] = json!({"type": "json_object"});
    refuses(json_mode, "conflicting_parameters", "response_format");
    let mut forced = tool(json!({}), false);
    forced["messages"] = json!([ask, prefix]);
    forced["tool_choice"] = json!("required");
    refuses(forced, "conflicting_parameters", "tool_choice");
}

#[test]
fn sampling_fields_have_types_and_ranges() {
    for (change, code, param) in [
        (json!({"max_tokens": 0}), "integer_below_min_value", "max_tokens"),
        (json!({"max_tokens": -5}), "integer_below_min_value", "max_tokens"),
        (json!({"max_tokens": "8"}), "invalid_type", "max_tokens"),
        (json!({"max_tokens": 1.5}), "invalid_type", "max_tokens"),
        (json!({"max_tokens": 1_000_000_000}), "integer_above_max_value", "max_tokens"),
        (json!({"max_completion_tokens": 0}), "integer_below_min_value", "max_completion_tokens"),
        (json!({"temperature": 2.5}), "decimal_above_max_value", "temperature"),
        (json!({"temperature": -0.1}), "decimal_below_min_value", "temperature"),
        (json!({"temperature": "hot"}), "invalid_type", "temperature"),
        (json!({"temperature": true}), "invalid_type", "temperature"),
        (json!({"top_p": 1.5}), "decimal_above_max_value", "top_p"),
        (json!({"min_p": -1}), "decimal_below_min_value", "min_p"),
        (json!({"presence_penalty": 3}), "decimal_above_max_value", "presence_penalty"),
        (json!({"frequency_penalty": -3}), "decimal_below_min_value", "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "decimal_below_min_value", "repetition_penalty"),
        (json!({"repetition_penalty": 2.1}), "decimal_above_max_value", "repetition_penalty"),
        (json!({"n": 0}), "integer_below_min_value", "n"),
        (json!({"n": 100_000}), "integer_above_max_value", "n"),
        (json!({"top_k": -2}), "integer_below_min_value", "top_k"),
        (json!({"min_tokens": 9}), "integer_above_max_value", "min_tokens"),
        (json!({"stop": vec!["a"; 17]}), "array_above_max_length", "stop"),
        (json!({"stop": ""}), "invalid_value", "stop"),
        (json!({"stop": [""]}), "invalid_value", "stop"),
        (json!({"stop": 3}), "invalid_type", "stop"),
        (json!({"stop": ["a", 3]}), "invalid_type", "stop"),
        (json!({"stop": "x".repeat(1025)}), "string_above_max_length", "stop"),
        (json!({"logprobs": true, "top_logprobs": 21}), "integer_above_max_value", "top_logprobs"),
        (json!({"top_logprobs": 2}), "conflicting_parameters", "top_logprobs"),
        (json!({"stream_options": {}}), "conflicting_parameters", "stream_options"),
        (json!({"stream": "yes"}), "invalid_type", "stream"),
        (json!({"stream": 1}), "invalid_type", "stream"),
        (json!({"seed": "a"}), "invalid_type", "seed"),
        (json!({"logit_bias": {"0": 500}}), "decimal_above_max_value", "logit_bias"),
        (json!({"logit_bias": {"x": 1}}), "invalid_value", "logit_bias"),
        (json!({"logit_bias": {"129280": 1}}), "invalid_value", "logit_bias"),
        (json!({"logit_bias": {"1": "a"}}), "invalid_type", "logit_bias"),
        (json!({"stop_token_ids": [-1]}), "invalid_value", "stop_token_ids"),
        (json!({"user_id": "u".repeat(600)}), "string_above_max_length", "user_id"),
        (json!({"functions": []}), "unsupported_parameter", "functions"),
        (json!({"modalities": ["audio"]}), "unsupported_parameter", "modalities"),
    ] {
        refuses(change, code, param);
    }
}

#[test]
fn numbers_beyond_every_range_are_out_of_range_and_not_of_the_wrong_type() {
    let seed_of = |digits: &str| {
        let text = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"a"}}],"seed":{digits}}}"#
        );
        let object = parse_object(text.as_bytes()).unwrap();
        ChatRequest::read(&object, &Rules::default()).map(|request| request.sampling.seed)
    };
    assert_eq!(seed_of("-9223372036854775808"), Ok(Some(i64::MIN)));
    assert_eq!(seed_of("3e0"), Ok(Some(3)));
    let code = |digits| seed_of(digits).unwrap_err().code.as_str();
    assert_eq!(code("9223372036854775808"), "integer_above_max_value");
    assert_eq!(code("1e400"), "integer_above_max_value");
    assert_eq!(code(&format!("-{}", "9".repeat(60))), "integer_below_min_value");
}

#[test]
fn tools_are_checked_one_by_one() {
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let function = "tools[0].function";
    let parameters = "tools[0].function.parameters";
    let closed = json!({"type": "object", "properties": {"a": {"type": "string"}},
                        "required": ["a"], "additionalProperties": false});
    let with = |key: &str, value: Value| {
        let mut schema = closed.clone();
        schema[key] = value;
        schema
    };
    for (change, code, param) in [
        (json!({"tools": {}}), "invalid_type", "tools"),
        (json!({"tools": [{"type": "function"}]}), "missing_required_parameter", function),
        (json!({"tools": [{"type": "retrieval"}]}), "invalid_value", "tools[0].type"),
        (json!({"tools": [named("bad name!")]}), "invalid_value", "tools[0].function.name"),
        (json!({"tools": [named("a"), named("a")]}), "invalid_value", "tools[1].function.name"),
        (json!({"tools": vec![named("a"); 129]}), "array_above_max_length", "tools"),
        (tool(json!({"type": "string"}), false), "invalid_function_parameters", parameters),
        (tool(json!("object"), false), "invalid_function_parameters", parameters),
        (tool(with("required", json!([])), true), "invalid_function_parameters", parameters),
        (
            tool(with("additionalProperties", json!(true)), true),
            "invalid_function_parameters",
            parameters,
        ),
        (tool(with("not", json!({"type": "null"})), true), "unsupported_schema", parameters),
        (tool(with("if", json!({})), true), "unsupported_schema", parameters),
    ] {
        refuses(change, code, param);
    }
    assert!(read(&changed(&tool(closed, true)), &Rules::default()).is_ok());
}

#[test]
fn a_tool_choice_must_be_possible() {
    let with_tool = |choice: Value| {
        let mut change = tool(json!({}), false);
        change["tool_choice"] = choice;
        change
    };
    let choose = |name: &str| json!({"type": "function", "function": {"name": name}});
    refuses(json!({"tool_choice": "required"}), "invalid_value", "tool_choice");
    refuses(json!({"tool_choice": choose("f")}), "invalid_value", "tool_choice");
    refuses(with_tool(choose("g")), "invalid_value", "tool_choice.function.name");
    refuses(with_tool(json!("sometimes")), "invalid_value", "tool_choice");
    refuses(with_tool(json!(1)), "invalid_type", "tool_choice");
    for word in ["auto", "none"] {
        assert!(read(&changed(&json!({"tool_choice": word})), &Rules::default()).is_ok());
    }
}

#[test]
fn response_formats_are_checked() {
    let format = |value: Value| json!({ "response_format": value });
    let schema = |schema: Value| {
        format(json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}))
    };
    refuses(format(json!({"type": "xml"})), "invalid_value", "response_format.type");
    refuses(format(json!({"type": "json_object"})), "json_keyword_missing", "messages");
    refuses(
        format(json!({"type": "json_schema"})),
        "missing_required_parameter",
        "response_format.json_schema",
    );
    let at = "response_format.json_schema.schema";
    refuses(schema(json!({"type": "banana"})), "invalid_json_schema", at);

    let mut with_word = format(json!({"type": "json_object"}));
    with_word["messages"] = json!([{"role": "developer", "content": "Answer in JSON."}]);
    assert!(read(&changed(&with_word), &Rules::default()).is_ok());
}

#[test]
fn structured_outputs_say_one_thing_and_agree_with_the_rest() {
    let structured = |value: Value| json!({ "structured_outputs": value });
    for (value, code, param) in [
        (json!("json"), "invalid_type", "structured_outputs"),
        (json!({"json_object": false}), "invalid_value", "structured_outputs"),
        (
            json!({"regex": "a", "grammar": "b"}),
            "conflicting_parameters",
            "structured_outputs.grammar",
        ),
        (json!({"regex": ""}), "invalid_value", "structured_outputs.regex"),
        (json!({"regex": 5}), "invalid_type", "structured_outputs.regex"),
        (json!({"choice": "a"}), "invalid_type", "structured_outputs.choice"),
        (json!({"choice": [""]}), "invalid_value", "structured_outputs.choice[0]"),
        (json!({"json": 5}), "invalid_type", "structured_outputs.json"),
        (json!({"json": {"type": "banana"}}), "invalid_json_schema", "structured_outputs.json"),
        (
            json!({"grammar": "a".repeat(300_000)}),
            "schema_too_complex",
            "structured_outputs.grammar",
        ),
    ] {
        refuses(structured(value), code, param);
    }
    let mut both = structured(json!({"choice": ["a"]}));
    both["response_format"] = json!({"type": "json_object"});
    refuses(both.clone(), "conflicting_parameters", "structured_outputs");
    both["response_format"] = json!({"type": "text"});
    let request = read(&changed(&both), &Rules::default()).unwrap();
    let expected = Structured::Choice(vec!["a".into()]);
    assert_eq!(request.response_format, ResponseFormat::Structured(expected));
    let mut forced = tool(json!({}), false);
    forced["tool_choice"] = json!("required");
    forced["structured_outputs"] = json!({"json_object": true});
    refuses(forced, "conflicting_parameters", "structured_outputs");
}

#[test]
fn a_forced_choice_among_no_tools_is_refused() {
    let mut change = tool(json!({}), false);
    let allowed = json!({"mode": "required", "tools": []});
    change["tool_choice"] = json!({"type": "allowed_tools", "allowed_tools": allowed});
    refuses(change, "invalid_value", "tool_choice.allowed_tools.tools");
}

#[test]
fn thinking_fields_must_make_sense_and_agree() {
    for (change, code, param) in [
        (json!({"thinking": {"type": "maybe"}}), "invalid_value", "thinking.type"),
        (json!({"thinking": "on"}), "invalid_type", "thinking"),
        (json!({"reasoning_effort": "turbo"}), "invalid_value", "reasoning_effort"),
        (json!({"reasoning": {"effort": "turbo"}}), "invalid_value", "reasoning.effort"),
        (json!({"reasoning": {"enabled": 1}}), "invalid_type", "reasoning.enabled"),
        (
            json!({"thinking": {"budget_tokens": 0}}),
            "integer_below_min_value",
            "thinking.budget_tokens",
        ),
        (
            json!({"thinking": {"type": "enabled"},
                   "chat_template_kwargs": {"enable_thinking": false}}),
            "conflicting_parameters",
            "chat_template_kwargs.enable_thinking",
        ),
        (
            json!({"chat_template_kwargs": {"thinking": true}, "reasoning": {"enabled": false}}),
            "conflicting_parameters",
            "reasoning.enabled",
        ),
    ] {
        refuses(change, code, param);
    }
}

#[test]
fn of_two_mistakes_the_earlier_check_reports() {
    // Required before types, types before ranges, ranges before rules, rules before messages,
    // messages before tools.
    refuses(
        json!({"messages": null, "temperature": "hot"}),
        "missing_required_parameter",
        "messages",
    );
    refuses(json!({"temperature": 9, "top_p": "x"}), "invalid_type", "top_p");
    refuses(json!({"top_logprobs": 2, "n": 0}), "integer_below_min_value", "n");
    refuses(json!({"messages": [{}], "top_logprobs": 2}), "conflicting_parameters", "top_logprobs");
    refuses(
        json!({"messages": [{}], "tools": [{}]}),
        "missing_required_parameter",
        "messages[0].role",
    );
}

#[test]
fn unknown_fields_are_refused_only_when_told_so() {
    let change = json!({"frobnicate": 1, "thinking": {"type": "enabled", "depth": 3}});
    let request = read(&changed(&change), &Rules::default()).unwrap();
    assert_eq!(request.unknown, ["thinking.depth", "frobnicate"]);
    let strict = Rules { reject_unknown: true, ..Rules::default() };
    refuses_under(&strict, change, "unknown_parameter", "thinking.depth");
}

#[test]
fn messages_quote_at_most_64_characters_of_the_request() {
    let long = "w".repeat(5000);
    let error = read(&changed(&json!({"reasoning_effort": long})), &Rules::default()).unwrap_err();
    assert!(error.message.len() < 250, "{}", error.message);
}
