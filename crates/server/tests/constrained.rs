//! What a request promises about its answer holds, whatever the model would rather say.
//!
//! The scripted model here is as good as certain of its text. Where that is not allowed it has no
//! preference, so the constraint alone decides what comes out.

use fathom_protocol::openai::Effort;
use fathom_server::config::{ForcedToolInThinking, LoopAction, ModelEffort};
use serde_json::{Value, json};

use crate::client::Response;
use crate::rig::{Rig, saying};

const PROSE: &str = "I would rather talk about json and the weather.";

fn schema() -> Value {
    json!({"type": "object", "properties": {
            "ok": {"type": "boolean"}, "color": {"enum": ["red", "blue"]}},
        "required": ["ok", "color"], "additionalProperties": false})
}

fn follows_schema(value: &Value) -> bool {
    let object = value.as_object().unwrap();
    object.len() == 2
        && object["ok"].is_boolean()
        && ["red", "blue"].contains(&object["color"].as_str().unwrap())
}

fn json_schema() -> Value {
    json!({"response_format": {"type": "json_schema",
        "json_schema": {"name": "s", "schema": schema(), "strict": true}}})
}

fn tool(name: &str, strict: bool) -> Value {
    let function = json!({"name": name, "parameters": schema(), "strict": strict});
    json!({"type": "function", "function": function})
}

fn with(mut change: Value, more: &Value) -> Value {
    change.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    change
}

#[track_caller]
fn choice(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()["choices"][0].clone()
}

#[track_caller]
fn is_bad(response: &Response, status: u16, code: &str, param: &str) {
    let error = &response.json()["error"];
    let got = (response.status, error["code"].as_str(), error["param"].as_str());
    assert_eq!(got, (status, Some(code), Some(param)), "{}", response.body);
}

/// The calls of a choice that ended with calls, all of which follow the schema.
#[track_caller]
fn calls(choice: &Value) -> Vec<String> {
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    let calls = choice["message"]["tool_calls"].as_array().unwrap().iter();
    calls
        .map(|call| {
            let arguments = call["function"]["arguments"].as_str().unwrap();
            assert!(follows_schema(&serde_json::from_str(arguments).unwrap()), "{arguments}");
            call["function"]["name"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn a_schema_is_followed_and_reasoning_comes_before_it() {
    let rig = Rig::start();
    for seed in 0..4 {
        let seed = json!({ "seed": seed });
        let choice = choice(&rig.say(PROSE, &with(json_schema(), &seed)));
        assert_eq!(choice["finish_reason"], "stop");
        let content = choice["message"]["content"].as_str().unwrap();
        assert!(follows_schema(&serde_json::from_str(content).unwrap()), "{content}");
    }
    let thinking = with(json_schema(), &json!({"thinking": {"type": "enabled"}}));
    let text = "Let me think.</think>{\"ok\": true, \"color\": \"red\"}";
    let choice = choice(&rig.say(text, &thinking));
    let message = &choice["message"];
    assert_eq!(message["reasoning_content"], "Let me think.");
    assert_eq!(message["content"], "{\"ok\": true, \"color\": \"red\"}");
}

#[test]
fn a_json_object_is_one_or_the_beginning_of_one() {
    let rig = Rig::start();
    let object = json!({"response_format": {"type": "json_object"}, "max_tokens": 30});
    let said = choice(&rig.say("{\"json\": [1, {\"a\": null}]} and more", &object));
    assert_eq!(said["message"]["content"], "{\"json\": [1, {\"a\": null}]}");
    assert_eq!(said["finish_reason"], "stop");
    let cut = choice(&rig.say(PROSE, &object));
    assert!(cut["message"]["content"].as_str().unwrap().starts_with('{'), "{cut}");
    // A model that reasons and then wants to stop must still answer.
    let thinking = with(object, &json!({"thinking": {"type": "enabled"}, "max_tokens": 400}));
    let answered = choice(&rig.say("json?", &thinking));
    let content = answered["message"]["content"].as_str().unwrap();
    assert!(answered["finish_reason"] == "length" || content.starts_with('{'), "{answered}");
}

#[test]
fn a_forced_call_is_made_with_and_without_thinking() {
    let rig = Rig::start();
    let tools = json!({"tools": [tool("f", false), tool("g", true)]});
    let named = json!({"type": "function", "function": {"name": "g"}});
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required",
        "tools": [{"type": "function", "function": {"name": "g"}}]}});
    for (tool_choice, only_g) in [(json!("required"), false), (named, true), (allowed, true)] {
        let change = with(
            tools.clone(),
            &json!({"tool_choice": tool_choice, "max_tokens": 2000,
            "parallel_tool_calls": false}),
        );
        let names = calls(&choice(&rig.say(PROSE, &change)));
        assert_eq!(names.len(), 1);
        assert!(!only_g || names == ["g"], "{names:?}");

        let thinking = with(change, &json!({"thinking": {"type": "enabled"}}));
        let said = choice(&rig.say("Hm, what now?</think>No call.", &thinking));
        assert_eq!(said["message"]["reasoning_content"], "Hm, what now?");
        assert_eq!(calls(&said).len(), 1);
    }
}

#[test]
fn a_forced_call_in_thinking_mode_can_be_refused_or_end_the_thinking() {
    let change = json!({"tools": [tool("f", false)], "tool_choice": "required",
        "parallel_tool_calls": false, "thinking": {"type": "enabled"}, "max_tokens": 2000});
    let with_mode = |mode| Rig::configured(|config| config.compat.forced_tool_in_thinking = mode);
    let rig = with_mode(ForcedToolInThinking::Reject);
    is_bad(&rig.say(PROSE, &change), 400, "conflicting_parameters", "tool_choice");
    let rig = with_mode(ForcedToolInThinking::DisableThinking);
    let said = choice(&rig.say(PROSE, &change));
    assert!(said["message"].get("reasoning_content").is_none());
    assert_eq!(calls(&said), ["f"]);
}

#[test]
fn a_block_that_the_model_opens_is_held_to_names_and_schemas() {
    let rig = Rig::start();
    let wrong = "Well.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"unknown\">\n";
    for strict in [false, true] {
        let change = json!({"tools": [tool("f", strict)], "parallel_tool_calls": false,
            "max_tokens": 2000});
        let said = choice(&rig.say(wrong, &change));
        assert_eq!(said["message"]["content"], "Well.");
        assert_eq!(calls(&said), ["f"]);
    }
    // The same where the model calls before it has ended its reasoning.
    let thinking = json!({"tools": [tool("f", false)], "parallel_tool_calls": false,
        "thinking": {"type": "enabled"}, "max_tokens": 2000});
    let said = choice(&rig.say(wrong, &thinking));
    assert_eq!(said["message"]["reasoning_content"], "Well.");
    assert_eq!(calls(&said), ["f"]);
}

#[test]
fn arguments_of_tools_that_are_not_strict_can_be_left_to_the_model() {
    let rig = Rig::configured(|config| config.tools.constrain_auto = false);
    let call = "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\
        <｜DSML｜parameter name=\"x\" string=\"false\">1</｜DSML｜parameter>\n\
        </｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let said = choice(&rig.say(call, &json!({"tools": [tool("f", false)]})));
    assert_eq!(said["message"]["tool_calls"][0]["function"]["arguments"], "{\"x\": 1}");
}

#[test]
fn an_answer_is_a_call_or_json_where_both_are_possible() {
    let rig = Rig::start();
    let both = with(json_schema(), &json!({"tools": [tool("f", false)], "max_tokens": 2000}));
    let text = choice(&rig.say("{\"ok\": false, \"color\": \"blue\"}", &both));
    assert_eq!(text["finish_reason"], "stop");
    assert_eq!(text["message"]["content"], "{\"ok\": false, \"color\": \"blue\"}");
    let call = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\
        <｜DSML｜parameter name=\"color\" string=\"true\">red</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"ok\" string=\"false\">true</｜DSML｜parameter>\n\
        </｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    assert_eq!(calls(&choice(&rig.say(call, &both))), ["f"]);
    let none = with(both, &json!({"tool_choice": "none"}));
    let said = choice(&rig.say(call, &none));
    assert_eq!(said["finish_reason"], "stop");
}

#[test]
fn structured_outputs_hold_and_conflict_with_other_demands() {
    let rig = Rig::start();
    let say = |structured: Value| {
        let change = json!({"structured_outputs": structured, "max_tokens": 200});
        choice(&rig.say(PROSE, &change))["message"]["content"].as_str().unwrap().to_owned()
    };
    assert!(["yes", "no"].contains(&say(json!({"choice": ["yes", "no"]})).as_str()));
    assert_eq!(say(json!({"regex": "[ab]{3}"})).trim_matches(['a', 'b']), "");
    assert!(follows_schema(&serde_json::from_str(&say(json!({"json": schema()}))).unwrap()));
    let text = schema().to_string();
    assert!(follows_schema(&serde_json::from_str(&say(json!({"json": text}))).unwrap()));
    assert!(["x1", "x2"].contains(&say(json!({"grammar": "start: \"x\" (\"1\"|\"2\")"})).as_str()));
    let gbnf = "root ::= \"x\" digit # one\ndigit ::= [12]";
    assert!(["x1", "x2"].contains(&say(json!({"grammar": gbnf})).as_str()));

    let structured = json!({"structured_outputs": {"choice": ["a"]}});
    let conflict = "conflicting_parameters";
    let format = with(json_schema(), &structured);
    is_bad(&rig.say("json", &format), 400, conflict, "structured_outputs");
    let forced = with(
        structured.clone(),
        &json!({"tools": [tool("f", false)],
        "tool_choice": "required"}),
    );
    is_bad(&rig.say("x", &forced), 400, conflict, "structured_outputs");
    let prefix = with(
        structured,
        &json!({"messages": [{"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "prefix": true}]}),
    );
    is_bad(&rig.say("x", &prefix), 400, conflict, "structured_outputs");
    for (structured, code, param) in [
        (json!({}), "invalid_value", "structured_outputs"),
        (json!({"choice": []}), "empty_array", "structured_outputs.choice"),
        (json!({"choice": ["a", 1]}), "invalid_type", "structured_outputs.choice[1]"),
        (json!({"choice": ["a"], "regex": "a"}), conflict, "structured_outputs.choice"),
        (json!({"regex": "(a"}), "invalid_value", "structured_outputs.regex"),
        (json!({"grammar": "start: x"}), "invalid_value", "structured_outputs.grammar"),
        (json!({"json": "{"}), "invalid_json_schema", "structured_outputs.json"),
        (
            json!({"structural_tag": {}}),
            "unsupported_parameter",
            "structured_outputs.structural_tag",
        ),
    ] {
        let change = json!({ "structured_outputs": structured });
        is_bad(&rig.say("x", &change), 400, code, param);
    }
}

#[test]
fn what_cannot_be_enforced_or_compiled_is_422() {
    let rig = Rig::start();
    let parameters = json!({"type": "object", "properties": {
        "n": {"type": "integer", "minimum": 3, "maximum": 2}}, "required": ["n"],
        "additionalProperties": false});
    let impossible = |strict: bool| {
        let function = json!({"name": "f", "parameters": parameters, "strict": strict});
        json!({"tools": [{"type": "function", "function": function}]})
    };
    let param = "tools[0].function.parameters";
    is_bad(&rig.say("x", &impossible(true)), 422, "unsupported_schema", param);
    // A tool that may be called, but need not: the model does without its schema.
    assert_eq!(rig.say("x", &impossible(false)).status, 200);
    let grammar = "(".repeat(1000);
    let change = json!({"structured_outputs": {"grammar": grammar}});
    let param = "structured_outputs.grammar";
    is_bad(&rig.say("x", &change), 422, "schema_too_complex", param);
}

#[test]
fn a_compilation_has_a_budget() {
    let rig = Rig::configured(|config| config.limits.schema_compile_ms = 1);
    let properties: serde_json::Map<String, Value> = (0..400)
        .map(|i| {
            (format!("p{i}"), json!({"type": "string", "pattern": format!("^(a|b{i}){{2,9}}c+$")}))
        })
        .collect();
    let format = json!({"type": "json_schema", "json_schema": {"name": "s",
        "schema": {"type": "object", "properties": properties}}});
    let response = rig.say("json", &json!({ "response_format": format }));
    let param = "response_format.json_schema.schema";
    is_bad(&response, 422, "schema_too_complex", param);
}

#[test]
fn streams_say_what_whole_answers_say() {
    let rig = Rig::start();
    let change = json!({"tools": [tool("f", true), tool("g", false)], "tool_choice": "required",
        "seed": 5, "max_tokens": 2000, "parallel_tool_calls": false});
    let whole = choice(&rig.say(PROSE, &change));
    let streamed = rig.say(PROSE, &with(change, &json!({"stream": true})));
    let mut arguments = String::new();
    for line in streamed.body.lines().filter_map(|line| line.strip_prefix("data: {")) {
        let chunk: Value = serde_json::from_str(&format!("{{{line}")).unwrap();
        let call = &chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"];
        arguments.push_str(call.as_str().unwrap_or_default());
    }
    assert_eq!(whole["message"]["tool_calls"][0]["function"]["arguments"], arguments.as_str());
    calls(&whole);
}

#[test]
fn the_messages_surface_forces_calls_and_formats_too() {
    let rig = Rig::start();
    let ask = |change: Value| {
        let body = with(
            json!({"model": "deepseek-v4-flash", "max_tokens": 2000,
            "messages": [{"role": "user", "content": PROSE}], "thinking": {"type": "disabled"}}),
            &change,
        );
        let response = rig.post("/v1/messages", &body);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    };
    let tools = json!([{"name": "f", "input_schema": schema(), "strict": true},
        {"name": "g", "input_schema": schema()}]);
    for (tool_choice, only) in [
        (json!({"type": "any", "disable_parallel_tool_use": true}), None),
        (json!({"type": "tool", "name": "g"}), Some("g")),
    ] {
        let answer = ask(json!({"tools": tools, "tool_choice": tool_choice}));
        assert_eq!(answer["stop_reason"], "tool_use", "{answer}");
        let blocks = answer["content"].as_array().unwrap();
        assert_eq!(blocks.len(), 1);
        assert!(follows_schema(&blocks[0]["input"]));
        assert!(only.is_none_or(|name| blocks[0]["name"] == name));
    }
    let answer = ask(json!({"output_config": {"format":
        {"type": "json_schema", "schema": schema()}}}));
    let text = answer["content"][0]["text"].as_str().unwrap();
    assert!(follows_schema(&serde_json::from_str(text).unwrap()), "{text}");
}

#[test]
fn thoughts_without_an_answer_are_counted_and_can_be_ruled_out() {
    let rig = Rig::start();
    let thinking = json!({"thinking": {"type": "enabled"}, "max_tokens": 60});
    let said = choice(&rig.say("only thoughts", &thinking));
    assert_eq!(said["finish_details"]["thought_only"], true);
    assert!(rig.metric("fathom_answers_thought_only_total") > 0.0);
    let plain = choice(&rig.say("Hm.</think>Yes.", &thinking));
    assert!(plain.get("finish_details").is_none());

    let rig = Rig::configured(|config| config.reasoning.require_answer = true);
    let said = choice(&rig.say("only thoughts", &thinking));
    let details = said.get("finish_details");
    assert!(details.is_none_or(|details| details["thought_only"] == false), "{said}");
    assert!(said["finish_reason"] == "length" || said["message"]["content"] != "");
}

#[test]
fn loops_are_reported_and_can_be_stopped() {
    let endless = json!({"max_tokens": 400});
    let rig = Rig::start();
    let said = choice(&rig.say("FOREVER", &endless));
    assert_eq!(said["finish_reason"], "length");
    assert_eq!(said["finish_details"]["token_loop"], json!({"period": 1, "repeats": 400}));
    assert_eq!(rig.metric("fathom_answers_looping_total"), 1.0);

    let rig = Rig::configured(|config| {
        config.loop_detection.action = LoopAction::Stop;
        config.loop_detection.min_tokens = 32;
    });
    let body = saying("FOREVER", &json!({"max_tokens": 4000}));
    let response = rig.chat(&body).json();
    let said = &response["choices"][0];
    assert_eq!(said["finish_reason"], "stop");
    assert_eq!(said["finish_details"]["token_loop"]["repeats"], 32);
    assert_eq!(response["usage"]["completion_tokens"], 32);
    rig.wait_until_idle();
}

#[test]
fn what_an_effort_means_to_the_model_is_the_operators_choice() {
    let n_prompt = |rig: &Rig, effort: &str| {
        let body = json!({"model": "deepseek-v4-flash", "reasoning_effort": effort,
            "messages": [{"role": "user", "content": "Hm.</think>Yes."}]});
        rig.chat(&body).json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let usual = Rig::start();
    // The preview's prompts: only the highest effort says something.
    assert_eq!(n_prompt(&usual, "low"), n_prompt(&usual, "high"));
    assert!(n_prompt(&usual, "max") > n_prompt(&usual, "high"));
    let mapped = Rig::configured(|config| {
        config.reasoning.effort_map.insert(Effort::Xhigh, ModelEffort::Max);
    });
    assert_eq!(n_prompt(&mapped, "xhigh"), n_prompt(&usual, "max"));
    assert_eq!(n_prompt(&mapped, "high"), n_prompt(&usual, "high"));
}
