//! Coding agents: recorded sessions replayed, and sessions that go on with what the server said.
//!
//! A transcript holds what an agent sends: path, headers, body and the messages that each turn
//! adds. The scripted model repeats the last user turn, so tool results with markup in them become
//! answers with markup in them, which must not come out.

use serde_json::{Value, json};

use crate::client::Response;
use crate::rig::{Options, Rig};

/// Tokens that a look-up may miss of a prefix: what is no whole KV block, and the one before it
/// where the state was saved.
const MISSED: u64 = 2 * 256;
/// Longest answer in a replay: the scripted model repeats all that it was told.
const LONGEST: u32 = 300;

/// Room for a session, and for the tens of thousands of tokens that agents ask for.
fn roomy() -> Rig {
    Rig::with(Options { max_model_len: 100_000, ..Options::default() })
}

struct Transcript {
    path: String,
    headers: String,
    /// The bodies of all turns, each with the messages so far.
    bodies: Vec<Value>,
}

impl Transcript {
    fn parse(json: &str) -> Self {
        let recorded: Value = serde_json::from_str(json).unwrap();
        let list = recorded["list"].as_str().unwrap();
        let mut messages = Vec::new();
        let bodies = recorded["turns"].as_array().unwrap().iter().map(|turn| {
            messages.extend(turn.as_array().unwrap().iter().cloned());
            let mut body = recorded["body"].clone();
            body[list] = json!(messages);
            body
        });
        let bodies = bodies.collect();
        let headers = recorded["headers"].as_object().unwrap().iter();
        let headers = headers.map(|(name, value)| format!("{name}: {}", value.as_str().unwrap()));
        let headers: Vec<String> =
            headers.chain(["content-type: application/json".to_owned()]).collect();
        let path = recorded["path"].as_str().unwrap().to_owned();
        Self { path, headers: headers.join("\r\n"), bodies }
    }

    fn send(&self, rig: &Rig, body: &Value) -> Response {
        let response = rig.post_raw(&self.path, &self.headers, body.to_string().as_bytes());
        assert_eq!(response.status, 200, "{}", response.body);
        assert!(response.complete);
        response
    }
}

/// The JSON of all events, whatever the surface.
fn events(response: &Response) -> Vec<Value> {
    let data = response.body.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[track_caller]
fn shows_no_markup(text: &str) {
    for mark in ["｜DSML｜", "<think>", "</think>", "<｜end"] {
        assert!(!text.contains(mark), "{mark} in {text}");
    }
}

/// Each turn finds in the cache what the turn before had in its prompt.
#[track_caller]
fn grows(sizes: &[(u64, u64)]) {
    assert!(sizes.len() > 2);
    for pair in sizes.windows(2) {
        let ((before, _), (_, cached)) = (pair[0], pair[1]);
        assert!(cached + MISSED > before, "{sizes:?}");
    }
}

fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or_else(|| panic!("no {name} in {object}"))
}

/// Prompt and cached tokens of a chat usage, whose identities must hold.
#[track_caller]
fn chat_usage(usage: &Value) -> (u64, u64) {
    let (prompt, cached) =
        (number(usage, "prompt_tokens"), number(usage, "prompt_cache_hit_tokens"));
    let completion = number(usage, "completion_tokens");
    assert_eq!(number(usage, "total_tokens"), prompt + completion);
    assert_eq!(cached + number(usage, "prompt_cache_miss_tokens"), prompt);
    assert_eq!(number(&usage["prompt_tokens_details"], "cached_tokens"), cached);
    assert!(number(&usage["completion_tokens_details"], "reasoning_tokens") <= completion);
    (prompt, cached)
}

/// The same of a usage of the Messages surface.
#[track_caller]
fn messages_usage(usage: &Value) -> (u64, u64) {
    let cached = number(usage, "cache_read_input_tokens");
    assert_eq!(number(usage, "cache_creation_input_tokens"), 0);
    assert!(number(usage, "input_tokens") > 0);
    let thought = number(&usage["output_tokens_details"], "thinking_tokens");
    assert!(thought <= number(usage, "output_tokens"));
    (number(usage, "input_tokens") + cached, cached)
}

#[test]
fn a_session_as_claude_code_sends_it_is_served() {
    let transcript = Transcript::parse(include_str!("transcripts/claude_code.json"));
    let rig = roomy();
    let mut sizes = Vec::new();
    for body in &transcript.bodies {
        assert_eq!(body["tools"].as_array().unwrap().len(), 30);
        let mut body = body.clone();
        body["max_tokens"] = json!(LONGEST);
        let events = events(&transcript.send(&rig, &body));
        assert_eq!(events[0]["message"]["model"], body["model"]);
        assert_eq!(events.last().unwrap()["type"], "message_stop");
        for event in &events {
            for field in ["text", "thinking", "partial_json"] {
                shows_no_markup(event["delta"][field].as_str().unwrap_or_default());
            }
        }
        let usage = messages_usage(&events[events.len() - 2]["usage"]);
        let counted = rig.post("/v1/messages/count_tokens?beta=true", &body).json();
        assert_eq!(counted, json!({"input_tokens": usage.0}));
        sizes.push(usage);
    }
    grows(&sizes);
}

/// Replays a session of chat completions.
fn replay_chat(json: &str) {
    let transcript = Transcript::parse(json);
    let rig = roomy();
    let mut sizes = Vec::new();
    for body in &transcript.bodies {
        let mut body = body.clone();
        body["stream_options"] = json!({"include_usage": true});
        body["max_tokens"] = json!(LONGEST);
        let response = transcript.send(&rig, &body);
        assert!(response.body.ends_with("data: [DONE]\n\n"));
        let mut events = events(&response);
        sizes.push(chat_usage(&events.pop().unwrap()["usage"]));
        assert!(events.last().unwrap()["choices"][0]["finish_reason"].is_string());
        for event in &events {
            for field in ["content", "reasoning_content"] {
                let text = event["choices"][0]["delta"][field].as_str();
                shows_no_markup(text.unwrap_or_default());
            }
        }
    }
    grows(&sizes);
}

#[test]
fn a_session_as_opencode_sends_it_is_served() {
    replay_chat(include_str!("transcripts/opencode.json"));
}

#[test]
fn a_session_as_codex_sent_it_to_chat_completions_is_served() {
    replay_chat(include_str!("transcripts/codex_chat.json"));
}

#[test]
fn a_session_as_codex_sends_it_to_responses_is_served() {
    let transcript = Transcript::parse(include_str!("transcripts/codex.json"));
    let rig = roomy();
    let mut sizes = Vec::new();
    for body in &transcript.bodies {
        let mut body = body.clone();
        body["max_output_tokens"] = json!(LONGEST);
        let events = events(&transcript.send(&rig, &body));
        let last = events.last().unwrap();
        let ends = ["response.completed", "response.incomplete"];
        assert!(ends.contains(&last["type"].as_str().unwrap()), "{last}");
        for event in &events {
            shows_no_markup(event["delta"].as_str().unwrap_or_default());
        }
        let usage = &last["response"]["usage"];
        let prompt = number(usage, "input_tokens");
        assert_eq!(number(usage, "total_tokens"), prompt + number(usage, "output_tokens"));
        sizes.push((prompt, number(&usage["input_tokens_details"], "cached_tokens")));
    }
    grows(&sizes);
}

/// What the model says in turn `i`: two calls at once, after a thought and a word.
fn step(i: usize) -> String {
    format!(
        "Think {i}.</think>Step {i}.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"read\">\n\
         <｜DSML｜parameter name=\"path\" string=\"true\">src/{i}.rs</｜DSML｜parameter>\n\
         </｜DSML｜invoke>\n<｜DSML｜invoke name=\"test\">\n\
         <｜DSML｜parameter name=\"n\" string=\"false\">{i}</｜DSML｜parameter>\n\
         </｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
}

/// A session of `n_turns` with two calls each. If `live`, the model makes the calls and its own
/// messages go back, as those of an agent do; otherwise the calls are recorded, which is quicker.
fn session(n_turns: usize, live: bool) {
    let rig = roomy();
    let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
    let tools = json!([tool("read"), tool("test")]);
    let mut messages = vec![json!({"role": "system", "content": "Rules. ".repeat(200)})];
    let mut sizes = Vec::new();
    for i in 0..n_turns {
        let asked = if live { step(i) } else { format!("Go {i}.") };
        messages.push(json!({"role": "user", "content": asked}));
        let body = json!({"model": "deepseek-v4-flash", "messages": messages, "tools": tools});
        let response = rig.chat(&body);
        assert_eq!(response.status, 200, "turn {i}: {}", response.body);
        let answer = response.json();
        sizes.push(chat_usage(&answer["usage"]));
        let message = if live { called(&answer["choices"][0], i) } else { recorded(i) };
        messages.push(message.clone());
        // In the wrong order, as results of parallel calls come.
        for call in message["tool_calls"].as_array().unwrap().iter().rev() {
            let id = &call["id"];
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": "ok"}));
        }
    }
    grows(&sizes);
    let (first, last) = (sizes[0], sizes[n_turns - 1]);
    assert!(last.0 > 2 * first.0 && last.1 + MISSED > last.0, "{sizes:?}");
    rig.wait_until_idle();
    assert_eq!(rig.engine.stats().kv.blocks_used, 0);
}

/// The message of a choice, which must hold what the model was told to say in turn `i`.
fn called(choice: &Value, i: usize) -> Value {
    assert_eq!(choice["finish_reason"], "tool_calls", "turn {i}: {choice}");
    let message = &choice["message"];
    // The results of the turn before are part of the user's turn, which the model repeats.
    assert!(message["reasoning_content"].as_str().unwrap().ends_with(&format!("Think {i}.")));
    assert_eq!(message["content"], format!("Step {i}."));
    let calls = message["tool_calls"].as_array().unwrap();
    let arguments: Vec<&str> =
        calls.iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(arguments, [format!("{{\"path\": \"src/{i}.rs\"}}"), format!("{{\"n\": {i}}}")]);
    message.clone()
}

/// What the model might have said in turn `i`.
fn recorded(i: usize) -> Value {
    let call = |name: &str, arguments: String| {
        json!({"id": format!("call_{name}_{i}"), "type": "function",
            "function": {"name": name, "arguments": arguments}})
    };
    let calls = [
        call("read", format!("{{\"path\": \"src/{i}.rs\"}}")),
        call("test", format!("{{\"n\": {i}}}")),
    ];
    json!({"role": "assistant", "reasoning_content": format!("Think {i}."),
        "content": format!("Step {i}."), "tool_calls": calls})
}

#[test]
fn a_live_session_finds_all_but_the_last_turn_in_the_cache() {
    session(12, true);
}

#[test]
fn a_hundred_turns_find_all_but_the_last_in_the_cache() {
    session(100, false);
}

#[test]
fn blocks_of_an_answer_go_back_as_they_came() {
    let rig = roomy();
    let schema = json!({"type": "object"});
    let tools = json!([{"name": "read", "input_schema": schema},
                       {"name": "test", "input_schema": schema}]);
    let mut messages = Vec::new();
    let mut results: Vec<Value> = Vec::new();
    let mut sizes = Vec::new();
    for i in 0..12 {
        let mut content = std::mem::take(&mut results);
        content
            .push(json!({"type": "text", "text": step(i), "cache_control": {"type": "ephemeral"}}));
        messages.push(json!({"role": "user", "content": content}));
        let body = json!({"model": "claude-sonnet-4-5", "max_tokens": 32_000, "tools": tools,
            "messages": messages, "thinking": {"type": "enabled", "budget_tokens": 31_999}});
        let response = rig.post("/v1/messages", &body);
        assert_eq!(response.status, 200, "turn {i}: {}", response.body);
        let answer = response.json();
        sizes.push(messages_usage(&answer["usage"]));
        assert_eq!(answer["stop_reason"], "tool_use");
        let blocks = answer["content"].as_array().unwrap();
        let kinds: Vec<&str> = blocks.iter().map(|block| block["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["thinking", "text", "tool_use", "tool_use"]);
        assert_eq!(blocks[3]["input"], json!({ "n": i }));
        messages.push(json!({"role": "assistant", "content": blocks}));
        for call in [&blocks[3], &blocks[2]] {
            let text = json!([{"type": "text", "text": "ok"}]);
            results
                .push(json!({"type": "tool_result", "tool_use_id": call["id"], "content": text}));
        }
    }
    grows(&sizes);
}

/// Both names of reasoning render alike, its absence is no error, and what is sent back whole makes
/// the prompt that the answer was sampled from.
#[test]
fn reasoning_comes_back_under_either_name_or_not_at_all() {
    let rig = roomy();
    let tools = json!([{"type": "function", "function": {"name": "read"}}]);
    let prompt = |reasoning: Value| {
        let mut assistant = json!({"role": "assistant", "content": "Hm.", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "read", "arguments": "{}"}}]});
        assistant.as_object_mut().unwrap().extend(reasoning.as_object().unwrap().clone());
        let messages = json!([{"role": "user", "content": "x"}, assistant,
            {"role": "tool", "tool_call_id": "a", "content": "y"}]);
        let body = json!({"model": "deepseek-v4-flash", "messages": messages, "tools": tools});
        let response = rig.post("/tokenize", &body);
        assert_eq!(response.status, 200, "{}", response.body);
        assert_eq!(rig.chat(&body).status, 200);
        response.json()["tokens"].clone()
    };
    let named = prompt(json!({"reasoning_content": "because"}));
    assert_eq!(prompt(json!({"reasoning": "because"})), named);
    let both = json!({"reasoning_content": "because", "reasoning": "other"});
    assert_eq!(prompt(both), named);
    let absent = prompt(json!({}));
    assert_ne!(absent, named);
    for empty in [json!({"reasoning_content": ""}), json!({"reasoning_content": null})] {
        assert_eq!(prompt(empty), absent);
    }
}

#[test]
fn a_call_before_the_end_of_reasoning_is_a_call_on_both_surfaces() {
    let rig = roomy();
    let text = step(7).replace("</think>Step 7.", "");
    let tool = json!({"name": "read", "input_schema": {"type": "object"}});
    let other = json!({"name": "test", "input_schema": {"type": "object"}});
    let messages = json!([{"role": "user", "content": text}]);
    let body = json!({"model": "deepseek-v4-flash", "messages": messages, "max_tokens": 900,
        "tools": [tool, other]});
    let blocks = rig.post("/v1/messages", &body).json();
    let kinds: Vec<&str> =
        blocks["content"].as_array().unwrap().iter().map(|b| b["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["thinking", "tool_use", "tool_use"]);
    assert_eq!(blocks["stop_reason"], "tool_use");

    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    let body = json!({"model": "deepseek-v4-flash", "messages": messages,
        "tools": [function("read"), function("test")]});
    let choice = rig.chat(&body).json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["reasoning_content"], "Think 7.");
    assert_eq!(choice["message"]["content"], Value::Null);
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 2);
}

#[test]
fn reasoning_that_fills_the_limit_says_so_on_both_surfaces() {
    let rig = roomy();
    let body = json!({"model": "deepseek-v4-flash", "max_tokens": 9,
        "messages": [{"role": "user", "content": "FOREVER"}]});
    let choice = rig.chat(&body).json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["content"], "");
    assert_eq!(choice["message"]["reasoning_content"], "a".repeat(9));
    let message = rig.post("/v1/messages", &body).json();
    assert_eq!(message["stop_reason"], "max_tokens");
    assert_eq!(message["content"].as_array().unwrap().len(), 1);
    assert_eq!(message["content"][0]["thinking"], "a".repeat(9));
}
