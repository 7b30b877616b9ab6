//! The release's strict parser: its goldens, and the places where it looks away.

use fathom_chat::ThinkingMode;
use fathom_chat::parse::strict::{Completion, CompletionError, parse_completion};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::golden_lines;

fn completion(json: &Value) -> Completion {
    let text = |field: &str| json[field].as_str().unwrap().to_owned();
    Completion {
        reasoning: text("reasoning_content"),
        content: text("content"),
        tool_calls: json["tool_calls"]
            .as_array()
            .unwrap()
            .iter()
            .map(|call| fathom_chat::ParsedCall {
                name: call["function"]["name"].as_str().unwrap().to_owned(),
                arguments: call["function"]["arguments"].as_str().unwrap().to_owned(),
            })
            .collect(),
    }
}

#[test]
fn every_parse_golden_gives_the_same_message_or_is_refused() {
    let mut n_refused = 0;
    let lines = golden_lines("encoding.jsonl");
    for golden in lines.iter().filter(|line| line["kind"] == "parse") {
        let mode =
            ThinkingMode::from_name(golden["options"]["thinking_mode"].as_str().unwrap()).unwrap();
        let parsed = parse_completion(golden["text"].as_str().unwrap(), mode);
        match golden.get("output") {
            Some(output) => assert_eq!(parsed, Ok(completion(output)), "{}", golden["id"]),
            None => {
                n_refused += 1;
                assert!(parsed.is_err(), "{} must be refused", golden["id"]);
            }
        }
    }
    assert_eq!(n_refused, 5);
}

const OPEN: &str = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n";
const CLOSE: &str = "</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
const EOS: &str = "<｜end▁of▁sentence｜>";

fn chat(text: &str) -> Result<Completion, CompletionError> {
    parse_completion(text, ThinkingMode::Chat)
}

#[test]
fn the_end_of_sentence_may_be_absent_after_calls_but_not_after_text() {
    assert_eq!(chat(&format!("{OPEN}{CLOSE}")).unwrap().tool_calls[0].arguments, "{}");
    assert_eq!(chat("hello"), Err(CompletionError::MissingEos));
}

#[test]
fn a_call_without_arguments_may_have_an_empty_line() {
    assert_eq!(chat(&format!("{OPEN}{CLOSE}{EOS}")), chat(&format!("{OPEN}\n{CLOSE}{EOS}")));
}

#[test]
fn a_repeated_parameter_is_refused_by_name() {
    let parameter = "<｜DSML｜parameter name=\"x\" string=\"false\">1</｜DSML｜parameter>\n";
    assert_eq!(
        chat(&format!("{OPEN}{parameter}{parameter}{CLOSE}{EOS}")),
        Err(CompletionError::DuplicateParameter { name: "x".into() })
    );
}

#[test]
fn values_may_hold_control_tokens_but_text_may_not() {
    let parameter = "<｜DSML｜parameter name=\"x\" string=\"true\"></think></｜DSML｜parameter>\n";
    let parsed = chat(&format!("{OPEN}{parameter}{CLOSE}{EOS}")).unwrap();
    assert_eq!(parsed.tool_calls[0].arguments, r#"{"x": "</think>"}"#);
    assert_eq!(
        chat(&format!("a ｜DSML｜ b{EOS}")),
        Err(CompletionError::ControlToken { token: "｜DSML｜" })
    );
}

proptest! {
    /// Rendering a call and reading it back gives the same arguments, whatever the strings.
    #[test]
    fn what_the_encoder_writes_the_strict_parser_reads(
        key in "[a-z\"]{1,5}",
        text in "[a-zé中<>/\"\\\\\n ]{0,20}",
        number in any::<i64>(),
    ) {
        use fathom_chat::encode::release::{ReleaseOptions, encode_messages};
        use fathom_chat::{Arguments, Message, ToolCall};
        let arguments = json!({&key: &text, "the number": number, "list": [text, null]});
        let call = ToolCall {
            id: String::new(),
            name: "f".into(),
            arguments: Arguments::Object(arguments.as_object().unwrap().clone()),
        };
        let message = Message::assistant("hi").with_tool_calls(vec![call]);
        let options = ReleaseOptions { add_bos: false, ..ReleaseOptions::new(ThinkingMode::Chat) };
        let prompt = encode_messages(&[message], &options).unwrap();
        let parsed = chat(prompt.as_text()).unwrap();
        prop_assert_eq!(&parsed.content, "hi");
        let read: Value = serde_json::from_str(&parsed.tool_calls[0].arguments).unwrap();
        prop_assert_eq!(read, arguments);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "(</?(｜DSML｜)?(invoke|parameter|tool_calls|think)?( name=\"| string=\"true)?\"?>?\n?|\n\n|a){0,12}") {
        for mode in [ThinkingMode::Chat, ThinkingMode::Thinking] {
            let _ = parse_completion(&text, mode);
        }
    }
}
