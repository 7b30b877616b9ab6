//! Text and fill-in-the-middle completions.

use async_openai::types::completions::CreateCompletionResponse;
use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::client::Response;
use crate::rig::{Options, Rig, STORY, normalised, tokenizer};

const PATH: &str = "/v1/completions";

fn complete(rig: &Rig, change: &Value) -> Response {
    let mut body = json!({"model": "deepseek-v4-flash", "prompt": "Once upon", "max_tokens": 50});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    rig.post(PATH, &body)
}

#[track_caller]
fn answer(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.body);
    let typed: CreateCompletionResponse = serde_json::from_str(&response.body).unwrap();
    assert_eq!(typed.object, "text_completion");
    response.json()
}

#[test]
fn a_text_is_continued() {
    let rig = Rig::start();
    let response = complete(&rig, &json!({}));
    let json = answer(&response);
    assert_eq!(json["choices"][0]["text"], STORY.strip_prefix("Once upon").unwrap());
    assert_snapshot!(normalised(&response.body), @r#"{"id":"cmpl-…","object":"text_completion","created":…,"model":"deepseek-v4-flash","system_fingerprint":"fp_0123abcd","choices":[{"index":0,"text":" a time there was a 世界.","logprobs":null,"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":6,"completion_tokens":15,"total_tokens":21,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0},"prompt_cache_hit_tokens":0,"prompt_cache_miss_tokens":6}}"#);
    for path in ["/completions", "/beta/completions", "/beta/v1/completions"] {
        let body = json!({"model": "deepseek-chat", "prompt": ["Once upon"], "max_tokens": 50});
        assert_eq!(answer(&rig.post(path, &body))["choices"], json["choices"], "{path}");
    }
}

#[test]
fn a_prompt_may_be_token_ids() {
    let ids = tokenizer().encode_plain("Once upon").unwrap();
    let json = answer(&complete(&Rig::start(), &json!({"prompt": ids, "echo": true})));
    assert_eq!(json["choices"][0]["text"], STORY);
    assert_eq!(json["usage"]["prompt_tokens"], ids.len());
}

#[test]
fn sixteen_tokens_unless_told_otherwise() {
    let json = answer(&complete(&Rig::start(), &json!({"prompt": "O", "max_tokens": null})));
    assert_eq!(json["usage"]["completion_tokens"], 16);
    assert_eq!(json["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_gap_is_filled_in_even_before_an_empty_suffix() {
    let rig = Rig::start();
    for (suffix, filled) in [("end", "[Once upon|end]"), ("", "[Once upon|]")] {
        let json = answer(&complete(&rig, &json!({"suffix": suffix, "max_tokens": null})));
        assert_eq!(json["choices"][0]["text"], filled);
    }
}

#[test]
fn a_text_ends_before_its_stop_string() {
    let json = answer(&complete(&Rig::start(), &json!({"stop": [" there"]})));
    assert_eq!(json["choices"][0]["text"], " a time");
    assert_eq!(json["choices"][0]["stop_reason"], " there");
}

#[test]
fn logprobs_are_parallel_lists() {
    let json = answer(&complete(&Rig::start(), &json!({"logprobs": 2})));
    let logprobs = &json["choices"][0]["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap();
    let tokens: Vec<&str> = list("tokens").iter().map(|token| token.as_str().unwrap()).collect();
    assert!(tokens.len() > 5);
    for name in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), tokens.len(), "{name}");
    }
    let text = json["choices"][0]["text"].as_str().unwrap();
    let mut n_chars = 0;
    for (token, offset) in tokens.iter().zip(list("text_offset")) {
        if token.contains('\u{fffd}') {
            break;
        }
        assert_eq!(offset.as_u64(), Some(n_chars));
        assert!(text.chars().skip(n_chars as usize).collect::<String>().starts_with(token));
        n_chars += token.chars().count() as u64;
    }
    assert!(n_chars > 15);
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let rig = Rig::start();
    for change in
        [json!({}), json!({"echo": true, "n": 2}), json!({"max_tokens": 3, "logprobs": 1})]
    {
        let whole = answer(&complete(&rig, &change));
        let mut streamed = change;
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let mut chunks = complete(&rig, &streamed).chunks();
        let last = chunks.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        for choice in whole["choices"].as_array().unwrap() {
            let own: Vec<&Value> = chunks
                .iter()
                .map(|c| &c["choices"][0])
                .filter(|c| c["index"] == choice["index"])
                .collect();
            let text: String = own.iter().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(text, choice["text"]);
            let (end, before) = own.split_last().unwrap();
            assert_eq!(end["finish_reason"], choice["finish_reason"]);
            assert!(before.iter().all(|c| c["finish_reason"].is_null()));
            let offsets = own.iter().filter_map(|c| c["logprobs"]["text_offset"].as_array());
            let offsets: Vec<&Value> = offsets.flatten().collect();
            let expected =
                choice["logprobs"]["text_offset"].as_array().cloned().unwrap_or_default();
            assert_eq!(json!(offsets), json!(expected));
        }
    }
}

#[test]
fn each_bad_request_names_its_field() {
    let rig = Rig::start();
    for (id, change, code, param) in [
        ("E76", json!({"prompt": null}), "missing_required_parameter", "prompt"),
        ("E77", json!({"logprobs": 21}), "integer_above_max_value", "logprobs"),
        ("E78", json!({"suffix": 5}), "invalid_type", "suffix"),
        ("type", json!({"prompt": 5}), "invalid_type", "prompt"),
        ("mixed", json!({"prompt": [1, "a"]}), "invalid_type", "prompt"),
        ("second", json!({"prompt": ["a", 5]}), "invalid_type", "prompt[1]"),
        ("many", json!({"prompt": vec!["a"; 257]}), "array_above_max_length", "prompt"),
        ("texts", json!({"prompt": vec!["a"; 129], "n": 2}), "conflicting_parameters", "n"),
        ("gaps", json!({"suffix": "x", "prompt": ["a", "b"]}), "conflicting_parameters", "suffix"),
        (
            "long one",
            json!({"prompt": ["a", "word ".repeat(5000)]}),
            "context_length_exceeded",
            "prompt",
        ),
        (
            "choice",
            json!({"structured_outputs": {"choice": []}}),
            "empty_array",
            "structured_outputs.choice",
        ),
        (
            "regex",
            json!({"structured_outputs": {"regex": "(a"}}),
            "invalid_value",
            "structured_outputs.regex",
        ),
        ("empty", json!({"prompt": []}), "empty_array", "prompt"),
        ("id", json!({"prompt": [99_999]}), "invalid_value", "prompt"),
        ("echo", json!({"suffix": "x", "echo": true}), "conflicting_parameters", "suffix"),
        ("ids", json!({"suffix": "x", "prompt": [5]}), "conflicting_parameters", "suffix"),
        (
            "cap",
            json!({"suffix": "x", "max_tokens": 4097}),
            "integer_above_max_value",
            "max_tokens",
        ),
        ("both", json!({"logprobs": 1, "echo": true}), "unsupported_parameter", "logprobs"),
        ("long", json!({"prompt": "word ".repeat(5000)}), "context_length_exceeded", "prompt"),
    ] {
        let response = complete(&rig, &change);
        let error = &response.json()["error"];
        let got = (response.status, error["code"].as_str(), error["param"].as_str());
        assert_eq!(got, (400, Some(code), Some(param)), "{id}: {}", response.body);
    }
    assert_eq!(rig.get(PATH).status, 405);
}

#[test]
fn several_prompts_are_answered_one_after_the_other() {
    let rig = Rig::start();
    let ids = tokenizer().encode_plain("Once upon a time").unwrap();
    let alone = |change: &Value| answer(&complete(&rig, change));
    let (first, second) = (json!({"prompt": "Once"}), json!({"prompt": ids}));
    let (first, second) = (alone(&first), alone(&second));
    // Text and ids may be mixed, as nobody forbids it; each prompt's answers follow one another.
    let change = json!({"prompt": ["Once", ids], "n": 2, "echo": true, "seed": 7});
    let both = answer(&complete(&rig, &change));
    let choices = both["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices.iter().map(|one| one["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert!(choices.iter().all(|one| one["text"] == STORY), "{both}");
    let count = |one: &Value, name: &str| one["usage"][name].as_u64().unwrap();
    let prompts = count(&first, "prompt_tokens") + count(&second, "prompt_tokens");
    assert_eq!(count(&both, "prompt_tokens"), prompts);
    let said = count(&first, "completion_tokens") + count(&second, "completion_tokens");
    assert_eq!(count(&both, "completion_tokens"), 2 * said);

    let mut streamed = change;
    streamed["stream"] = json!(true);
    let chunks = complete(&rig, &streamed).chunks();
    for index in 0..4 {
        let own = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|c| c["index"] == index);
        let text: String = own.map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(text, STORY, "choice {index}");
    }
    rig.wait_until_idle();
}

#[test]
fn what_was_cached_of_several_prompts_is_counted_for_each() {
    let rig = Rig::with(Options { max_model_len: 4096, ..Options::default() });
    let prompts = json!({"prompt": ["a ".repeat(900), "b ".repeat(900)], "max_tokens": 1});
    let cached = |answer: Value| answer["usage"]["prompt_cache_hit_tokens"].as_u64().unwrap();
    assert_eq!(cached(answer(&complete(&rig, &prompts))), 0);
    let one = json!({"prompt": "a ".repeat(900), "max_tokens": 1});
    let of_one = cached(answer(&complete(&rig, &one)));
    assert!(of_one > 0);
    assert!(cached(answer(&complete(&rig, &prompts))) > of_one);
}

#[test]
fn a_text_can_be_held_to_a_schema_an_expression_a_choice_or_a_language() {
    let rig = Rig::start();
    let text = |structured: Value| {
        let said = answer(&complete(&rig, &json!({"structured_outputs": structured})));
        assert_eq!(said["choices"][0]["finish_reason"], "stop", "{said}");
        said["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"], "additionalProperties": false});
    let value: Value = serde_json::from_str(&text(json!({"json": schema}))).unwrap();
    assert!(value["ok"].is_boolean());
    assert!(["yes", "no"].contains(&text(json!({"choice": ["yes", "no"]})).as_str()));
    let digits = text(json!({"regex": "[0-9]{4}"}));
    assert!(digits.len() == 4 && digits.bytes().all(|byte| byte.is_ascii_digit()), "{digits}");
    assert_eq!(text(json!({"grammar": "start: \"ab\" \"c\""})), "abc");
    let gap = json!({"structured_outputs": {"choice": ["x = 1"]}, "suffix": "end"});
    assert_eq!(answer(&complete(&rig, &gap))["choices"][0]["text"], "x = 1");
}

#[test]
fn usage_is_on_every_chunk_if_asked_for() {
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let change = json!({"stream": true, "stream_options": options, "n": 2});
    let chunks = complete(&Rig::start(), &change).chunks();
    let used = |chunk: &Value| chunk["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(chunks.iter().map(used).is_sorted());
    assert!(used(&chunks[0]) >= 1 && used(chunks.last().unwrap()) == 30);
}
