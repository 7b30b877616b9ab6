//! Settings that change what a request may ask for, what it means, and what its client hears: each
//! has an effect. Those about the network are tested beside the network (`transport`, `tls`,
//! `browsers`, `keys`, `traces`).

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use fathom_protocol::openai::Effort;
use fathom_server::ServerConfig;
use fathom_server::config::{
    DefaultMaxTokens, DeveloperRole, KeyConfig, ModelEffort, ThinkingSampling,
};
use serde_json::{Value, json};

use crate::client::{connect, exchange};
use crate::rig::{Options, Rig, saying};

/// Status, code and field of the answer to a non-thinking request.
fn outcome(rig: &Rig, change: &Value) -> (u16, String, String) {
    let response = rig.say("Hi", change);
    let error = &response.json()["error"];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (response.status, text("code"), text("param"))
}

type Change = fn(&mut ServerConfig);

#[test]
fn every_limit_on_a_request_can_be_set() {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let flat = json!({"type": "object", "properties": {}});
    let deep = json!({"type": "object", "properties": {"a": {"type": "array", "items": {}}}});
    let user = json!({"role": "user", "content": "Hi"});
    let rows: [(Change, Value, &str, &str); 8] = [
        (
            |c| c.limits.max_output_tokens = 9,
            json!({"max_tokens": 10}),
            "integer_above_max_value",
            "max_tokens",
        ),
        (|c| c.limits.max_n = 1, json!({"n": 2}), "integer_above_max_value", "n"),
        (|c| c.limits.max_stop = 1, json!({"stop": ["a", "b"]}), "array_above_max_length", "stop"),
        (|c| c.limits.max_stop_bytes = 1, json!({"stop": "ab"}), "string_above_max_length", "stop"),
        (
            |c| c.limits.max_tools = 1,
            json!({"tools": [tool("a", flat.clone()), tool("b", flat)]}),
            "array_above_max_length",
            "tools",
        ),
        (
            |c| c.limits.max_schema_bytes = 20,
            json!({"tools": [tool("a", deep.clone())]}),
            "schema_too_complex",
            "tools[0].function.parameters",
        ),
        (
            |c| c.limits.max_schema_depth = 1,
            json!({"tools": [tool("a", deep)]}),
            "schema_too_complex",
            "tools[0].function.parameters",
        ),
        (
            |c| c.limits.max_messages = 1,
            json!({"messages": [user, user]}),
            "array_above_max_length",
            "messages",
        ),
    ];
    let defaults = Rig::start();
    for (limit, change, code, param) in rows {
        assert_eq!(outcome(&defaults, &change).0, 200, "{change}");
        let (status, got, at) = outcome(&Rig::configured(limit), &change);
        let expected = if code == "schema_too_complex" { 422 } else { 400 };
        assert_eq!((status, got.as_str(), at.as_str()), (expected, code, param), "{change}");
    }
}

#[test]
fn what_the_contract_lets_operators_decide_can_be_decided() {
    let before_hi =
        |message: Value| json!({"messages": [message, {"role": "user", "content": "Hi"}]});
    let developer = before_hi(json!({"role": "developer", "content": "Be brief."}));
    let stray = before_hi(json!({"role": "tool", "tool_call_id": "c", "content": "12"}));
    let prose = json!({"response_format": {"type": "json_object"}});
    let rows: [(Change, &Value, &str, &str); 4] = [
        (|c| c.compat.developer_role = DeveloperRole::Reject, &developer, "", "invalid_value"),
        (|c| c.compat.lenient_tool_history = true, &stray, "invalid_message_sequence", ""),
        (|c| c.compat.reject_unknown = true, &json!({"group": "x"}), "", "unknown_parameter"),
        (
            |c| c.models.legacy_aliases = false,
            &json!({"model": "deepseek-chat"}),
            "",
            "model_not_found",
        ),
    ];
    let defaults = Rig::start();
    for (decision, change, before, after) in rows {
        assert_eq!(outcome(&defaults, change).1, before, "{change}");
        assert_eq!(outcome(&Rig::configured(decision), change).1, after, "{change}");
    }
    assert_eq!(outcome(&defaults, &prose).1, "json_keyword_missing");
    let lax = Rig::configured(|config| config.compat.require_json_keyword = false);
    assert_ne!(outcome(&lax, &prose).1, "json_keyword_missing");
}

#[test]
fn a_default_number_of_tokens_can_be_set() {
    let rig = Rig::configured(|c| c.limits.default_max_tokens = DefaultMaxTokens::Tokens(3));
    let usage = rig.say("FOREVER", &json!({})).json()["usage"].clone();
    assert_eq!(usage["completion_tokens"], 3);
    let usage = rig.say("FOREVER", &json!({"max_tokens": 5})).json()["usage"].clone();
    assert_eq!(usage["completion_tokens"], 5);
}

#[test]
fn fill_in_the_middle_has_a_cap_of_its_own() {
    let rig = Rig::configured(|config| config.fim.max_tokens = 4);
    let ask = |change: &Value| {
        let mut body = json!({"model": "deepseek-v4-flash", "prompt": "abc", "suffix": "xyz"});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        rig.post("/v1/completions", &body)
    };
    assert_eq!(ask(&json!({})).json()["usage"]["completion_tokens"], 4);
    assert_eq!(ask(&json!({"max_tokens": 5})).status, 400);
}

#[test]
fn a_request_that_waits_too_long_is_told_so() {
    let rig = Rig::with(Options {
        max_num_seqs: 1,
        queue_timeout: Duration::from_millis(50),
        max_model_len: 120_000,
        ..Options::default()
    });
    let body = saying("FOREVER", &json!({"stream": true, "max_tokens": 100_000})).to_string();
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {length}\r\n\r\n"
    );
    let mut running = connect(rig.address);
    running.write_all((head + &body).as_bytes()).unwrap();
    running.read_exact(&mut [0; 500]).unwrap();
    let response = rig.say("Hi", &json!({}));
    assert_eq!(
        (response.status, response.json()["error"]["code"].as_str()),
        (503, Some("queue_timeout"))
    );
    assert!(response.header("retry-after").is_some());
}

#[test]
fn a_body_that_trickles_for_too_long_times_out() {
    let rig = Rig::configured(|config| config.limits.body_total_s = 1);
    let began = Instant::now();
    let mut connection = connect(rig.address);
    connection
        .write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 1000\r\n\r\n")
        .unwrap();
    connection.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut first = [0; 12];
    while connection.read_exact(&mut first).is_err() {
        assert!(began.elapsed() < Duration::from_secs(10), "no answer");
        connection.write_all(b" ").unwrap();
    }
    assert_eq!(&first, b"HTTP/1.1 408");
}

#[test]
fn metrics_can_be_kept_to_those_with_a_key() {
    let rig = Rig::configured(|config| {
        config.server.protect_metrics = true;
        config.keys = vec![KeyConfig::plain("k")];
    });
    assert_eq!((rig.get("/metrics").status, rig.get("/health").status), (401, 200));
    let with_key = exchange(rig.address, "GET /metrics HTTP/1.1\r\nx-api-key: k", b"");
    assert_eq!(with_key.status, 200);
}

/// A request that says nothing about thinking.
fn silent(rig: &Rig, change: &Value) -> Value {
    let mut change = change.clone();
    change["thinking"] = Value::Null;
    let response = rig.say("a</think>b", &change);
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

#[test]
fn thinking_can_be_off_by_default() {
    let rig = Rig::configured(|config| config.thinking.default = false);
    let thinks = |change: Value| {
        silent(&rig, &change)["choices"][0]["message"]["reasoning_content"].is_string()
    };
    assert!(!thinks(json!({})));
    assert!(thinks(json!({"reasoning_effort": "low"})));
    assert!(thinks(json!({"model": "deepseek-reasoner"})));
}

#[test]
fn sampling_parameters_can_be_honoured_while_thinking() {
    let rig = Rig::configured(|c| c.thinking.sampling = ThinkingSampling::Honor);
    let greedy = json!({"temperature": 0, "thinking": {"type": "enabled"}});
    assert_eq!(rig.say("a</think>b", &greedy).header("x-ignored-params"), None);
    let ignoring = Rig::start().say("a</think>b", &greedy);
    assert_eq!(ignoring.header("x-ignored-params"), Some("temperature"));
}

#[test]
fn efforts_and_budgets_can_be_mapped_and_ignored() {
    let prompt = |rig: &Rig, effort: &str| {
        silent(rig, &json!({"reasoning_effort": effort}))["usage"]["prompt_tokens"].clone()
    };
    let defaults = Rig::start();
    let mapped = Rig::configured(|config| {
        config.reasoning.effort_map.insert(Effort::Xhigh, ModelEffort::Max);
        config.reasoning.honor_budget = false;
    });
    assert_eq!(prompt(&defaults, "xhigh"), prompt(&defaults, "high"));
    assert_eq!(prompt(&mapped, "xhigh"), prompt(&defaults, "max"));
    assert_ne!(prompt(&mapped, "xhigh"), prompt(&mapped, "high"));
    let change = json!({"thinking_token_budget": 2, "thinking": null});
    let reasoning = |rig: &Rig| {
        let answer = rig.say("a long thought</think>b", &change).json();
        answer["choices"][0]["message"]["reasoning_content"].clone()
    };
    assert_eq!(reasoning(&mapped), "a long thought");
    assert_ne!(reasoning(&defaults), "a long thought");
}

#[test]
fn names_of_the_messages_surface_can_be_mapped() {
    let rig = Rig::configured(|config| {
        config.anthropic.model_map = [("gpt-*".to_owned(), "deepseek-v4-flash".to_owned())].into();
    });
    let ask = |model: &str| {
        let messages = json!([{"role": "user", "content": "Hi"}]);
        rig.post("/v1/messages", &json!({"model": model, "max_tokens": 8, "messages": messages}))
            .status
    };
    assert_eq!((ask("gpt-5"), ask("claude-opus-5")), (200, 404));
}

#[test]
fn users_share_cached_prompts_only_if_the_server_is_told_so() {
    let cached = |rig: &Rig| {
        let long = "shared words ".repeat(150);
        let mut counts = Vec::new();
        for user in ["a", "b"] {
            let usage = rig.say(&long, &json!({"user_id": user})).json()["usage"].clone();
            counts.push(usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
            rig.wait_until_idle();
        }
        counts
    };
    assert_eq!(cached(&Rig::start()), [false, false]);
    assert_eq!(cached(&Rig::configured(|c| c.cache.isolate_by_user = false)), [false, true]);
}

#[test]
fn whole_answers_can_be_waited_for_with_line_ends() {
    let rig = Rig::configured(|config| {
        config.compat.nonstream_keepalive = true;
        config.sse.keepalive_s = 1;
    });
    let waited = rig.say("PAUSE", &json!({}));
    assert!(waited.body.starts_with('\n'), "{:?}", waited.body);
    assert_eq!(waited.header("content-type"), Some("application/json"));
    assert_eq!(waited.json()["choices"][0]["message"]["content"], "PAUSE");
    let prompt = json!({"model": "deepseek-v4-flash", "prompt": "Once", "max_tokens": 2});
    assert_eq!(rig.post("/v1/completions", &prompt).json()["object"], "text_completion");
    // The status went out before anything could fail.
    let failed = rig.say("NAN", &json!({}));
    assert_eq!(
        (failed.status, failed.json()["error"]["code"].as_str()),
        (200, Some("internal_error"))
    );
    // What is refused before the wait still has its status.
    assert_eq!(rig.say("Hi", &json!({"temperature": 9})).status, 400);
    let silent = Rig::configured(|config| config.sse.keepalive_s = 1).say("PAUSE", &json!({}));
    assert!(silent.body.starts_with('{'));
}

#[test]
fn tools_of_the_hosted_apis_can_be_left_out() {
    let rig = Rig::configured(|config| config.compat.ignore_hosted_tools = true);
    let input = json!({"model": "deepseek-v4-flash", "input": "a</think>b",
        "tools": [{"type": "web_search"}, {"type": "function", "name": "f"}]});
    let messages = json!([{"role": "user", "content": "a</think>b"}]);
    let blocks = json!({"model": "deepseek-v4-flash", "max_tokens": 20, "messages": messages,
        "tools": [{"type": "web_search_20250305", "name": "web_search"}]});
    for (path, body) in [("/v1/responses", input), ("/v1/messages", blocks)] {
        assert_eq!(rig.post(path, &body).status, 200, "{path}");
        let refused = Rig::start().post(path, &body);
        assert_eq!(refused.status, 400, "{path}: {}", refused.body);
    }
}

#[test]
fn control_tokens_in_text_are_text_unless_the_server_is_told_otherwise() {
    let tokens = |rig: &Rig| {
        let usage = rig.say("<｜User｜>", &json!({"max_tokens": 1})).json()["usage"].clone();
        usage["prompt_tokens"].as_u64().unwrap()
    };
    let raw = Rig::configured(|config| config.encoding.allow_special_in_content = true);
    assert!(tokens(&raw) < tokens(&Rig::start()));
}

#[test]
fn the_encodings_own_roles_are_accepted_if_the_server_is_told_so() {
    let rig = Rig::configured(|config| config.encoding.extended_roles = true);
    let reminded = json!({"messages": [
        {"role": "latest_reminder", "content": "It is Monday."},
        {"role": "user", "content": "Hi"}]});
    let answer = rig.say("", &reminded);
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "Hi");
    let refused = outcome(&Rig::start(), &reminded);
    assert_eq!((refused.0, refused.2.as_str()), (400, "messages[0].role"));

    let task = |task: &str| json!({"messages": [{"role": "user", "content": "Hi", "task": task}]});
    let count = |rig: &Rig, body: &Value| {
        let mut body = body.clone();
        body["model"] = json!("deepseek-v4-flash");
        rig.post("/tokenize", &body).json()["count"].clone()
    };
    assert_ne!(count(&rig, &task("title")), count(&Rig::start(), &task("title")));
    assert_eq!(outcome(&rig, &task("juggling")).2, "messages[0].task");
}
