//! Bytes that are, and are not, one bounded JSON object.

use fathom_protocol::anthropic::{MessagesRequest, Purpose};
use fathom_protocol::openai::{ChatRequest, Rules};
use fathom_protocol::responses::ResponsesRequest;
use fathom_protocol::{ErrorCode, parse_object};
use proptest::prelude::*;

#[test]
fn what_is_not_one_json_object_is_refused() {
    let nested = |depth: usize| {
        format!(r#"{{"a":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1)).into_bytes()
    };
    let bad: &[&[u8]] = &[
        b"",
        b"  ",
        b"{\"model\": ",
        b"[]",
        b"\"text\"",
        b"{\"a\":\"\xff\"}",
        b"\xef\xbb\xbf{}",
        b"{\"a\":\"\\ud800\"}",
        b"{\"a\":NaN}",
        b"{\"a\":Infinity}",
        b"{} {}",
        b"{\"a\":1,}",
        b"{'a':1}",
        b"{\"a\":01}",
        &nested(129),
        &nested(10_001),
        &b"[".repeat(100_000),
    ];
    for body in bad {
        let error = parse_object(body).expect_err(&String::from_utf8_lossy(body));
        assert_eq!((error.code, error.param), (ErrorCode::InvalidJson, None));
    }
    assert!(parse_object(&nested(128)).is_ok());
}

#[test]
fn brackets_inside_strings_do_not_count_as_nesting() {
    let body = format!(r#"{{"a":"\"{}"}}"#, "[".repeat(1000));
    assert!(parse_object(body.as_bytes()).is_ok());
}

#[test]
fn of_duplicate_keys_the_last_one_wins() {
    let object = parse_object(br#"{"a":1,"b":2,"a":3}"#).unwrap();
    assert_eq!(serde_json::to_string(&object).unwrap(), r#"{"a":3,"b":2}"#);
}

#[test]
fn a_surrogate_pair_is_one_character() {
    let object = parse_object(br#"{"a":"\ud83d\ude00"}"#).unwrap();
    assert_eq!(object["a"], "😀");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_object(&body);
    }

    #[test]
    fn no_value_of_any_field_makes_the_reader_panic(
        field in proptest::sample::select(FIELDS),
        value in proptest::sample::select(VALUES),
        inner in proptest::sample::select(VALUES),
    ) {
        let value = value.replace('$', inner).replace('$', "[]");
        let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}],"{field}":{value}}}"#);
        let object = parse_object(body.as_bytes()).expect("the pieces are valid JSON");
        let _ = ChatRequest::read(&object, &Rules::default());
        let _ = MessagesRequest::read(&object, &Rules::default(), Purpose::Count);
        let input = if field == "input" { "" } else { r#","input":"x""# };
        let body = format!(r#"{{"model":"m"{input},"{field}":{value}}}"#);
        let object = parse_object(body.as_bytes()).expect("the pieces are valid JSON");
        let _ = ResponsesRequest::read(&object, &Rules::default());
    }
}

const FIELDS: &[&str] = &[
    "messages",
    "max_tokens",
    "temperature",
    "stop",
    "n",
    "seed",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "thinking",
    "reasoning",
    "chat_template_kwargs",
    "stream",
    "stream_options",
    "user_id",
    "modalities",
    "top_logprobs",
    "stop_token_ids",
    "top_k",
    "system",
    "metadata",
    "stop_sequences",
    "output_config",
    "input",
    "instructions",
    "include",
    "text",
    "max_output_tokens",
];

const VALUES: &[&str] = &[
    "null",
    "true",
    "0",
    "-1",
    "1e400",
    "-1e400",
    "1.5",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[$]",
    "[[$]]",
    "{\"type\":$}",
    "{\"type\":\"function\",\"function\":$}",
    "[{\"type\":\"function\",\"function\":$}]",
    "[{\"role\":\"assistant\",\"tool_calls\":$}]",
    "[{\"role\":\"user\",\"content\":$}]",
    "[{\"role\":\"assistant\",\"content\":$}]",
    "[{\"type\":$}]",
    "[{\"type\":\"reasoning\",\"content\":$,\"encrypted_content\":$}]",
    "[{\"type\":\"reasoning\",\"encrypted_content\":\"fathom1-ÿ\"}]",
    "[{\"type\":\"function_call\",\"call_id\":\"a\",\"name\":\"b\",\"arguments\":$}]",
    "[{\"type\":\"tool_use\",\"id\":\"a\",\"name\":\"b\",\"input\":$}]",
    "[{\"type\":\"tool_result\",\"tool_use_id\":\"a\",\"content\":$}]",
    "{\"format\":{\"type\":\"json_schema\",\"name\":\"a\",\"schema\":$}}",
    "{\"name\":\"a\",\"parameters\":$}",
    "{\"type\":\"json_schema\",\"json_schema\":$}",
    "{\"name\":\"a\",\"schema\":$}",
    "{\"\":{\"properties\":$}}",
    "99999999999999999999999999999999999999999999999",
];
