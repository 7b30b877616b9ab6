//! The release's own outputs: `encoding.jsonl` and `tokenizer.jsonl` of the nano checkpoint.

use fathom_chat::encode::release::{ReleaseOptions, encode_messages, message_from_json};
use fathom_chat::{Effort, EncodeError, Message, Prompt, Segment, Special, ThinkingMode};
use serde_json::Value;

use crate::support::{golden_lines, ids, tokenizer};

fn messages(json: &Value) -> Result<Vec<Message>, EncodeError> {
    json.as_array().unwrap().iter().map(message_from_json).collect()
}

/// What the golden asks for; `None` if the mode does not exist.
fn encode(golden: &Value) -> Option<Result<Prompt, EncodeError>> {
    let options = &golden["options"];
    let mode = ThinkingMode::from_name(options["thinking_mode"].as_str().unwrap())?;
    let run = || {
        let release = ReleaseOptions {
            context: options.get("context").map_or(Ok(Vec::new()), messages)?,
            drop_thinking: options["drop_thinking"].as_bool().unwrap_or(true),
            add_bos: options["add_default_bos_token"].as_bool().unwrap_or(true),
            effort: options["reasoning_effort"].as_str().and_then(Effort::from_api),
            ..ReleaseOptions::new(mode)
        };
        encode_messages(&messages(&golden["messages"])?, &release)
    };
    Some(run())
}

fn lines(kind: &str) -> Vec<Value> {
    let lines: Vec<Value> =
        golden_lines("encoding.jsonl").into_iter().filter(|line| line["kind"] == kind).collect();
    assert!(lines.len() >= 12, "the golden file has {} lines of kind {kind}", lines.len());
    lines
}

#[test]
fn every_encode_golden_renders_to_the_same_text_and_ids() {
    let tokenizer = tokenizer();
    for golden in lines("encode") {
        let id = &golden["id"];
        if golden.get("error").is_some() {
            assert!(!matches!(encode(&golden), Some(Ok(_))), "{id} must be refused");
            continue;
        }
        let prompt = encode(&golden).unwrap().unwrap();
        assert_eq!(prompt.as_text(), golden["output"].as_str().unwrap(), "{id}");
        let expected = ids(&golden["token_ids"]);
        assert_eq!(prompt.raw_token_ids(&tokenizer).unwrap(), expected, "{id}");
        // Only this case has control tokens in a message's text; there we differ on purpose.
        if id != "special_in_content" {
            assert_eq!(prompt.token_ids(&tokenizer).unwrap(), expected, "{id}");
        }
    }
}

#[test]
fn control_tokens_spelled_by_a_user_stay_text() {
    let tokenizer = tokenizer();
    let golden =
        lines("encode").into_iter().find(|line| line["id"] == "special_in_content").unwrap();
    let prompt = encode(&golden).unwrap().unwrap();
    let controls: Vec<Special> = prompt
        .token_ids(&tokenizer)
        .unwrap()
        .into_iter()
        .filter_map(|id| tokenizer.special().of(id))
        .collect();
    assert_eq!(
        controls,
        [Special::Bos, Special::User, Special::Assistant, Special::ThinkEnd],
        "the message spells <think>, </think> and <｜User｜>"
    );
    assert_eq!(tokenizer.decode(&prompt.token_ids(&tokenizer).unwrap()), prompt.as_text());
}

#[test]
fn segments_concatenate_to_the_text() {
    for golden in lines("encode") {
        let Some(Ok(prompt)) = encode(&golden) else { continue };
        let mut text = String::new();
        let mut previous_was_text = false;
        for segment in prompt.segments() {
            match segment {
                Segment::Text(plain) => {
                    assert!(!previous_was_text, "adjacent texts are one segment");
                    text.push_str(plain);
                }
                Segment::Control(special) => text.push_str(special.text()),
            }
            previous_was_text = matches!(segment, Segment::Text(_));
        }
        assert_eq!(text, prompt.as_text());
    }
}

#[test]
fn every_tokenizer_golden_encodes_and_decodes() {
    let tokenizer = tokenizer();
    for golden in golden_lines("tokenizer.jsonl") {
        let text = golden["text"].as_str().unwrap();
        let expected = ids(&golden["ids"]);
        assert_eq!(tokenizer.encode_with_special(text).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected), golden["decoded"], "{text:?}");
        assert_eq!(tokenizer.decode_skip_special(&expected), golden["decoded_skip_special"]);
        if expected.iter().all(|&id| id < 1007 && id > 2) {
            assert_eq!(tokenizer.encode_plain(text).unwrap(), expected, "{text:?}");
        }
    }
}
