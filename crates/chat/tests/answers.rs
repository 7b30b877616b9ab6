//! How answers are read: one test per situation that models are known to produce.

use fathom_chat::{
    AnswerEnd, Delta, End, Opening, OutputParser, ParsedMessage, ParserOptions, Phase, Summary,
    TextParser, ToolSet,
};
use serde_json::{Value, json};

use crate::support::tokenizer;

/// Two tools: weather with declared parameters of several types, noop without any.
pub(crate) fn tools() -> ToolSet {
    ToolSet::from_functions(&[
        json!({"name": "weather", "parameters": {"type": "object", "properties": {
            "location": {"type": "string"},
            "days": {"type": "integer"},
            "options": {"type": "object"},
            "note": {"type": ["string", "null"]},
        }}}),
        json!({"name": "noop"}),
    ])
}

fn options(opening: Opening) -> ParserOptions {
    ParserOptions { opening, tools: Some(tools()), ..ParserOptions::default() }
}

/// Reads a whole answer in text.
fn read_with(options: ParserOptions, text: &str, end: End) -> (ParsedMessage, Summary) {
    TextParser::parse(options, text, end)
}

fn read(text: &str) -> (ParsedMessage, Summary) {
    read_with(options(Opening::Content), text, End::Stop)
}

/// Writes tags as models do: `<D` and `</D` stand for the marker in its brackets.
fn dsml(text: &str) -> String {
    text.replace("</D", "</｜DSML｜").replace("<D", "<｜DSML｜")
}

/// The calls of an answer, arguments parsed.
fn calls(message: &ParsedMessage) -> Vec<(String, Value)> {
    message
        .tool_calls
        .iter()
        .map(|call| (call.name.clone(), serde_json::from_str(&call.arguments).unwrap()))
        .collect()
}

fn block(invokes: &str) -> String {
    dsml(&format!("\n\n<Dtool_calls>\n{invokes}\n</Dtool_calls>"))
}

fn weather(parameters: &str) -> String {
    format!("<Dinvoke name=\"weather\">\n{parameters}\n</Dinvoke>")
}

/// The only call of `text`, which must have no other content.
fn only_call(text: &str) -> Value {
    let (message, summary) = read(text);
    assert_eq!(message.content, "", "of {text:?}");
    assert_eq!(summary.end, AnswerEnd::ToolCalls);
    let calls = calls(&message);
    assert_eq!(calls.len(), 1, "of {text:?}");
    calls[0].1.clone()
}

#[test]
fn a_well_formed_answer_is_taken_apart() {
    let text = format!(
        "Why.</think>Let me see.{}<｜end▁of▁sentence｜>",
        block(&weather(concat!(
            "<Dparameter name=\"location\" string=\"true\"> Paris\n</Dparameter>\n",
            "<Dparameter name=\"days\" string=\"false\">3</Dparameter>"
        )))
    );
    let (message, summary) = read_with(options(Opening::Reasoning), &text, End::Stop);
    assert_eq!(message.reasoning, "Why.");
    assert_eq!(message.content, "Let me see.");
    // Spaces and newlines of a text value are kept.
    assert_eq!(message.tool_calls[0].arguments, r#"{"location": " Paris\n", "days": 3}"#);
    assert_eq!(summary.end, AnswerEnd::ToolCalls);
    assert!(!summary.dropped_call);
}

#[test]
fn the_answer_begins_where_the_prompt_left_off() {
    let (message, _) = read_with(options(Opening::Reasoning), "a</think>b", End::Stop);
    assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("a", "b"));
    let (message, _) = read_with(options(Opening::Content), "a</think>b", End::Stop);
    assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("", "ab"));
    let inside = dsml(&format!("{}\n</Dtool_calls>", weather("")));
    let (message, _) = read_with(options(Opening::ToolBlock), &inside, End::Stop);
    assert_eq!(message.tool_calls.len(), 1);
}

#[test]
fn repeated_think_tokens_are_absorbed() {
    let text = "<think>a<think>b</think>c<think>d</think>e";
    let (message, _) = read_with(options(Opening::Reasoning), text, End::Stop);
    assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("ab", "cde"));
}

#[test]
fn reasoning_without_an_end_stays_reasoning_and_leaks_no_end_of_sentence() {
    let text = "only thoughts\n\n<｜end▁of▁sentence｜>";
    let (message, summary) = read_with(options(Opening::Reasoning), text, End::Stop);
    assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("only thoughts\n\n", ""));
    assert_eq!(summary.end, AnswerEnd::Stop);
    let copying = ParserOptions { copy_reasoning: true, ..options(Opening::Reasoning) };
    let (message, _) = read_with(copying.clone(), text, End::Stop);
    assert_eq!(message.content, "only thoughts\n\n");
    // Not if it was cut: more reasoning was to come.
    assert_eq!(read_with(copying.clone(), text, End::Length).0.content, "");
    // Nor if there was an answer.
    assert_eq!(read_with(copying, "t</think>a", End::Stop).0.content, "a");
}

#[test]
fn a_block_inside_reasoning_ends_it() {
    let text = format!("thinking{}", block(&weather("")));
    let (message, summary) = read_with(options(Opening::Reasoning), &text, End::Stop);
    assert_eq!(message.reasoning, "thinking");
    assert_eq!(message.content, "");
    assert_eq!(message.tool_calls.len(), 1);
    assert_eq!(summary.end, AnswerEnd::ToolCalls);
}

#[test]
fn an_opener_that_is_only_mentioned_opens_nothing() {
    let text = dsml("I must write <Dtool_calls> first, then stop.</think>Done.");
    let (message, summary) = read_with(options(Opening::Reasoning), &text, End::Stop);
    assert_eq!(message.reasoning, "I must write  first, then stop.");
    assert_eq!(message.content, "Done.");
    assert_eq!(summary.end, AnswerEnd::Stop);
}

#[test]
fn variants_of_the_opener_are_accepted() {
    for opener in ["tool_calls", "toolcalls", "tool"] {
        let text = dsml(&format!("hi\n\n<D{opener}>\n{}\n</D{opener}>", weather("")));
        let (message, _) = read(&text);
        assert_eq!(message.content, "hi");
        assert_eq!(message.tool_calls.len(), 1, "{opener}");
    }
}

#[test]
fn calls_without_a_block_are_accepted_if_tools_are_on_offer() {
    let text = dsml(&format!("hi\n\n{0}\n{0}", weather("")));
    let (message, _) = read(&text);
    assert_eq!(message.content, "hi");
    assert_eq!(message.tool_calls.len(), 2);
}

#[test]
fn without_tools_on_offer_blocks_are_removed_and_nothing_is_called() {
    let parameter = "<Dparameter name=\"location\" string=\"true\">Paris</Dparameter>";
    let no_tools = ParserOptions { tools: None, ..options(Opening::Content) };
    for text in [
        format!("hi{}", block(&weather(parameter))),
        dsml(&format!("hi\n\n{}", weather(parameter))),
    ] {
        let (message, summary) = read_with(no_tools.clone(), &text, End::Stop);
        assert_eq!(message.content, "hi");
        assert!(message.tool_calls.is_empty());
        assert_eq!(summary.end, AnswerEnd::Stop);
        // What follows is the answer still: there was no call to wait for.
        let (message, _) = read_with(no_tools.clone(), &format!("{text} there"), End::Stop);
        assert_eq!(message.content, "hi there");
    }
    // Reasoning goes on too.
    let reasoning = ParserOptions { tools: None, ..options(Opening::Reasoning) };
    let text = format!("a{} b</think>c", block(&weather(parameter)));
    let (message, _) = read_with(reasoning, &text, End::Stop);
    assert_eq!((message.reasoning.as_str(), message.content.as_str()), ("a b", "c"));
}

#[test]
fn without_the_string_attribute_a_value_is_json_unless_only_text_is_declared() {
    for (name, value, expected) in [
        ("days", "3", json!(3)),
        ("days", "three", json!("three")),
        ("location", "3", json!("3")),
        ("location", "Paris", json!("Paris")),
        ("note", "null", json!(null)),
        ("note", "5", json!("5")),
        ("undeclared", "[1]", json!([1])),
        ("undeclared", "x y", json!("x y")),
    ] {
        for attribute in ["", " string=\"maybe\""] {
            let parameter = format!("<Dparameter name=\"{name}\"{attribute}>{value}</Dparameter>");
            let arguments = only_call(&block(&weather(&parameter)));
            assert_eq!(arguments, json!({name: expected}), "{name} {value}");
        }
    }
}

#[test]
fn a_value_that_is_no_json_becomes_text() {
    let parameter = "<Dparameter name=\"options\" string=\"false\">{\"a\": </Dparameter>";
    assert_eq!(only_call(&block(&weather(parameter))), json!({"options": "{\"a\": "}));
    // NaN is a word of Python's, not of JSON's.
    let parameter = "<Dparameter name=\"days\" string=\"false\">NaN</Dparameter>";
    assert_eq!(only_call(&block(&weather(parameter))), json!({"days": "NaN"}));
}

#[test]
fn json_values_are_passed_on_unchanged() {
    let parameter =
        "<Dparameter name=\"options\" string=\"false\">{\"a\":1E5,  \"b\":[ ]}</Dparameter>";
    let (message, _) = read(&block(&weather(parameter)));
    assert_eq!(message.tool_calls[0].arguments, r#"{"options": {"a":1E5,  "b":[ ]}}"#);
}

#[test]
fn the_next_tag_closes_a_parameter_whose_close_is_missing() {
    let open = "<Dparameter name=\"location\" string=\"true\">Paris";
    let days = "<Dparameter name=\"days\" string=\"false\">3";
    for text in [
        format!("<Dtool_calls>\n{}\n</Dtool_calls>", weather(&format!("{open}\n{days}"))),
        format!("<Dtool_calls>\n<Dinvoke name=\"weather\">\n{open}\n{days}\n</Dtool_calls>"),
    ] {
        assert_eq!(only_call(&dsml(&text)), json!({"location": "Paris", "days": 3}));
    }
    let two = format!("<Dinvoke name=\"weather\">\n{open}\n{}", weather(days));
    let (message, _) = read(&dsml(&two));
    assert_eq!(calls(&message)[0].1, json!({"location": "Paris"}));
    assert_eq!(calls(&message)[1].1, json!({"days": 3}));
}

#[test]
fn a_self_closing_call_has_no_arguments() {
    for slash in ["/", " /"] {
        let text = block(&format!("<Dinvoke name=\"noop\"{slash}>"));
        assert_eq!(only_call(&text), json!({}));
    }
}

#[test]
fn a_call_without_arguments_may_have_an_empty_line() {
    for body in ["\n", "\n\n", ""] {
        let text = block(&format!("<Dinvoke name=\"noop\">{body}</Dinvoke>"));
        assert_eq!(only_call(&text), json!({}));
    }
}

#[test]
fn a_json_object_may_stand_for_the_parameters() {
    let text = block(&weather("{\"location\": \"Paris\",\n \"days\": 3}"));
    assert_eq!(only_call(&text), json!({"location": "Paris", "days": 3}));
    assert_eq!(only_call(&block(&weather("not json"))), json!({}));
    assert_eq!(only_call(&block(&weather("[1]"))), json!({}));
}

#[test]
fn a_wrapper_is_unwrapped_if_the_schema_says_it_is_one() {
    let wrapped = |name: &str, string: &str, value: &str| {
        let parameter = format!("<Dparameter name=\"{name}\"{string}>{value}</Dparameter>");
        only_call(&block(&weather(&parameter)))
    };
    let object = r#"{"location": "Paris", "days": 3}"#;
    for name in ["arguments", "input"] {
        for string in ["", " string=\"true\"", " string=\"false\""] {
            let inner: Value = serde_json::from_str(object).unwrap();
            assert_eq!(wrapped(name, string, object), inner, "{name}{string}");
        }
        // A key that is not declared: it is a parameter after all.
        assert_eq!(
            wrapped(name, " string=\"false\"", r#"{"planet": 1}"#),
            json!({name: {"planet": 1}})
        );
        assert_eq!(wrapped(name, " string=\"true\"", "text"), json!({name: "text"}));
    }
    // Not if it has company.
    let both = concat!(
        "<Dparameter name=\"arguments\" string=\"false\">{\"days\": 1}</Dparameter>\n",
        "<Dparameter name=\"days\" string=\"false\">3</Dparameter>"
    );
    assert_eq!(only_call(&block(&weather(both))), json!({"arguments": {"days": 1}, "days": 3}));
    // Nor if nothing is known about the tool.
    let unknown = block(concat!(
        "<Dinvoke name=\"other\">\n",
        "<Dparameter name=\"input\" string=\"false\">{}</Dparameter>\n</Dinvoke>"
    ));
    assert_eq!(only_call(&unknown), json!({"input": {}}));
}

#[test]
fn the_first_of_two_values_for_a_key_wins() {
    let parameter =
        |value| format!("<Dparameter name=\"days\" string=\"false\">{value}</Dparameter>");
    let (message, summary) = read(&block(&weather(&format!("{}\n{}", parameter(1), parameter(2)))));
    assert_eq!(message.tool_calls[0].arguments, r#"{"days": 1}"#);
    assert_eq!(summary.n_duplicate_parameters, 1);
}

#[test]
fn a_call_that_is_not_closed_is_dropped() {
    let complete = weather("<Dparameter name=\"days\" string=\"false\">1</Dparameter>");
    for cut in [
        "<Dinvoke name=\"weather\">\n<Dparameter name=\"location\" string=\"true\">Par",
        "<Dinvoke name=\"weather\">\n<Dparameter name=\"location\" string=\"true\">Paris</Dparameter>",
        "<Dinvoke name=\"weather\">\n<Dparameter name=\"location\" string=\"true\">Paris</Dparam",
        "<Dinvoke name=\"weather\">\n",
    ] {
        for (end, ended) in [(End::Length, AnswerEnd::Length), (End::Stop, AnswerEnd::Stop)] {
            let text = dsml(&format!("hi\n\n<Dtool_calls>\n{cut}"));
            let (message, summary) = read_with(options(Opening::Content), &text, end);
            assert_eq!(message.content, "hi");
            assert!(message.tool_calls.is_empty());
            assert_eq!(summary.end, ended);
            assert!(summary.dropped_call);
        }
        // The one before it stays.
        let text = dsml(&format!("\n\n<Dtool_calls>\n{complete}\n{cut}"));
        let (message, summary) = read(&text);
        assert_eq!(message.tool_calls.len(), 1);
        assert_eq!(summary.end, AnswerEnd::ToolCalls);
        let (_, summary) = read_with(options(Opening::Content), &text, End::Length);
        assert_eq!(summary.end, AnswerEnd::Length);
    }
}

#[test]
fn an_answer_cut_inside_a_tag_shows_nothing_of_it() {
    let whole = dsml("hi\n\n<Dtool_calls>\n<Dinvoke name=\"weather\">\n");
    let marker = whole.find('｜').unwrap() + "｜DSML｜".len();
    for end in (marker..=whole.len()).filter(|&end| whole.is_char_boundary(end)) {
        let (message, _) = read_with(options(Opening::Content), &whole[..end], End::Length);
        assert_eq!(message.content, "hi", "cut at {end}");
    }
}

#[test]
fn text_after_the_block_is_dropped() {
    let text = format!("hi{} and more", block(&weather("")));
    let (message, _) = read(&text);
    assert_eq!(message.content, "hi");
    assert_eq!(message.tool_calls.len(), 1);
}

#[test]
fn exactly_one_blank_line_before_the_block_is_removed() {
    for (before, content) in
        [("a\n\n\n", "a\n"), ("a\n\n", "a"), ("a\n", "a\n"), ("a", "a"), ("\n\n", ""), ("", "")]
    {
        let text = dsml(&format!("{before}<Dtool_calls>\n{}\n</Dtool_calls>", weather("")));
        assert_eq!(read(&text).0.content, content, "{before:?}");
    }
    assert_eq!(read("a\n\n").0.content, "a\n\n", "without a block it stays");
}

#[test]
fn several_calls_keep_their_order() {
    let text = block(&format!(
        "{}\n<Dinvoke name=\"noop\">\n\n</Dinvoke>",
        weather("<Dparameter name=\"days\" string=\"false\">1</Dparameter>")
    ));
    let (message, summary) = read(&text);
    let names: Vec<&str> = message.tool_calls.iter().map(|call| call.name.as_str()).collect();
    assert_eq!(names, ["weather", "noop"]);
    assert_eq!(summary.n_calls, 2);
}

// What users reported about other servers.

#[test]
fn a_value_that_ends_near_an_angle_bracket_leaks_no_closing_tag() {
    for value in ["cmd 2>&1", "a <", "a </", "</", "<<<", "a < b </ c", "x｜", "</｜DSM"] {
        let parameter =
            format!("<Dparameter name=\"location\" string=\"true\">{value}</Dparameter>");
        let text = block(&weather(&parameter));
        let mut parser = TextParser::new(options(Opening::Content));
        let mut message = ParsedMessage::default();
        for character in text.chars() {
            let deltas = parser.push(character.encode_utf8(&mut [0; 4]));
            for delta in &deltas {
                if let Delta::ToolCallArguments { fragment, .. } = delta {
                    assert!(!fragment.contains("DSML"), "{fragment}");
                }
            }
            message.extend(deltas);
        }
        message.extend(parser.finish(End::Stop).0);
        assert_eq!(calls(&message), [("weather".to_owned(), json!({"location": value}))]);
    }
}

#[test]
fn a_malformed_block_leaks_no_tag_into_the_content() {
    for text in [
        "hi\n\n<Dtool_calls>\n<Dparameter name=\"x\" string=\"true\">v</Dparameter>\n</Dtool_calls>",
        "hi\n\n<Dtool_calls>\n<Dinvoke nam=\"weather\">\n</Dinvoke>\n</Dtool_calls>",
        "hi\n\n<Dtool_calls>\n<Dinvoke name=\"\">\n</Dinvoke>\n</Dtool_calls>",
        "hi\n\n<Dtool_calls></Dtool_calls>",
        "hi</Dtool_calls>",
        "hi</Dinvoke>",
        "hi<Dfunction name=\"f\">",
        "hi<Dtool_calls",
        "hi<D",
        "hi<Dparameter name=\"x\" str",
    ] {
        let (message, summary) = read(&dsml(text));
        assert_eq!(message.content, "hi", "{text}");
        assert!(message.tool_calls.is_empty());
        assert_eq!(summary.end, AnswerEnd::Stop);
    }
}

#[test]
fn text_around_the_bare_marker_is_kept() {
    let (message, _) = read("the ｜DSML｜ marker, <｜DSML｜ alone");
    assert_eq!(message.content, "the  marker,  alone");
}

#[test]
fn an_ascii_spelling_of_the_marker_is_text() {
    let text = "<|DSML|tool_calls>\n<|DSML|invoke name=\"weather\">\n</|DSML|invoke>";
    let (message, _) = read(text);
    assert_eq!(message.content, text);
    assert!(message.tool_calls.is_empty());
}

#[test]
fn a_spelled_out_control_token_is_text_where_there_are_ids() {
    let tokenizer = tokenizer();
    let mut parser = OutputParser::new(&tokenizer, options(Opening::Reasoning));
    let mut message = ParsedMessage::default();
    let spelled = "say </think> and <｜DSML｜tool_calls>";
    for id in tokenizer.encode_plain(spelled).unwrap() {
        message.extend(parser.push(id));
    }
    message.extend(parser.push(tokenizer.special().think_end()));
    let (deltas, _) = parser.finish(End::Stop);
    message.extend(deltas);
    assert_eq!(message.reasoning, spelled);
    assert_eq!(message.content, "");
}

#[test]
fn control_tokens_inside_a_value_belong_to_it() {
    let value = "a <think> b </think> <｜User｜> ｜DSML｜ <｜DSML｜x> <｜DSML｜tool_calls>";
    let parameter = format!("<Dparameter name=\"location\" string=\"true\">{value}</Dparameter>");
    assert_eq!(only_call(&block(&weather(&parameter))), json!({"location": value}));
}

// Streams.

#[test]
fn a_text_value_is_handed_out_as_it_comes_and_a_name_at_its_header() {
    let mut parser = TextParser::new(options(Opening::Content));
    let header = dsml("\n\n<Dtool_calls>\n<Dinvoke name=\"weather\">");
    assert_eq!(parser.push(&header), [Delta::ToolCallStart { index: 0, name: "weather".into() }]);
    let fragment = |text: &str| Delta::ToolCallArguments { index: 0, fragment: text.into() };
    assert_eq!(
        parser.push(&dsml("\n<Dparameter name=\"location\" string=\"true\">Par")),
        [fragment("{\"location\": \"Par")]
    );
    assert_eq!(parser.push("is\n"), [fragment("is")]);
    assert_eq!(parser.push("is"), [fragment("\\nis")]);
    assert_eq!(parser.push("<"), []);
    assert_eq!(parser.push("/｜DSM"), []);
    assert_eq!(parser.push("L｜parameter"), []);
    assert_eq!(parser.push(">"), [fragment("\"")]);
}

#[test]
fn phases_follow_the_answer() {
    let tokenizer = tokenizer();
    let mut parser = OutputParser::new(&tokenizer, options(Opening::Reasoning));
    let text = format!("a</think>b{}", block(&weather("")));
    let mut phases = vec![parser.phase()];
    for id in tokenizer.encode_with_special(&text).unwrap() {
        let _ = parser.push(id);
        if phases.last() != Some(&parser.phase()) {
            phases.push(parser.phase());
        }
    }
    assert_eq!(phases, [Phase::Reasoning, Phase::Content, Phase::ToolCalls]);
}

#[test]
fn reasoning_tokens_are_those_before_the_end_of_reasoning() {
    let tokenizer = tokenizer();
    let eos = tokenizer.special().eos();
    let thoughts = tokenizer.encode_plain("two plus two is four").unwrap();
    let n_thoughts = u32::try_from(thoughts.len()).unwrap();
    let run = |opening, ids: &[u32], end| {
        let mut parser = OutputParser::new(&tokenizer, options(opening));
        for &id in ids {
            let _ = parser.push(id);
        }
        let phase = parser.phase();
        (parser.finish(end).1.reasoning_tokens, phase)
    };
    let closed =
        [&thoughts[..], &[tokenizer.special().think_end()], &thoughts[..], &[eos]].concat();
    assert_eq!(run(Opening::Reasoning, &closed, End::Stop), (n_thoughts, Phase::Content));
    assert_eq!(run(Opening::Content, &closed, End::Stop), (0, Phase::Content));
    assert_eq!(run(Opening::Reasoning, &thoughts, End::Length), (n_thoughts, Phase::Reasoning));
    let ended = [&thoughts[..], &[eos]].concat();
    assert_eq!(run(Opening::Reasoning, &ended, End::Stop), (n_thoughts, Phase::Reasoning));
    // A block ends reasoning too; the angle bracket of its opener is the last token before it.
    let block = tokenizer.encode_with_special(&block(&weather(""))).unwrap();
    let called = [&thoughts[..], &block].concat();
    let n_before = block.iter().position(|&id| id == tokenizer.special().dsml()).unwrap();
    let expected = n_thoughts + u32::try_from(n_before).unwrap();
    assert_eq!(run(Opening::Reasoning, &called, End::Stop), (expected, Phase::ToolCalls));
}

#[test]
fn stop_strings_end_the_answer_text_and_nothing_else() {
    let stopping =
        |stop: &str| ParserOptions { stop: vec![stop.to_owned()], ..options(Opening::Reasoning) };
    let (message, summary) =
        read_with(stopping("END"), "an END in thought</think>one E\n\nEND two", End::Stop);
    assert_eq!(message.reasoning, "an END in thought");
    assert_eq!(message.content, "one E\n\n");
    assert_eq!(summary.stop.as_deref(), Some("END"));
    assert_eq!(summary.end, AnswerEnd::Stop);
    // A call's markup and arguments are no answer text, nor is the blank line before a block.
    for stop in ["\n\n", "Paris", "tool_calls"] {
        let parameter = "<Dparameter name=\"location\" string=\"true\">Paris</Dparameter>";
        let text = format!("t</think>hi{}", block(&weather(parameter)));
        let (message, summary) = read_with(stopping(stop), &text, End::Stop);
        assert_eq!(message.content, "hi");
        assert_eq!(message.tool_calls.len(), 1, "{stop:?}");
        assert_eq!(summary.stop, None);
    }
    // Text held for a stop string is released before the calls.
    let text = format!("t</think>E{}", block(&weather("")));
    assert_eq!(read_with(stopping("END"), &text, End::Stop).0.content, "E");
    // After a stop string nothing is called any more.
    let text = format!("t</think>END{}", block(&weather("")));
    let (message, summary) = read_with(stopping("END"), &text, End::Stop);
    assert!(message.tool_calls.is_empty());
    assert_eq!((message.content.as_str(), summary.end), ("", AnswerEnd::Stop));
    // Not even if the stop string is settled only by the block.
    let text = format!("t</think>a\n{}", dsml(&format!("<Dtool_calls>\n{}", weather(""))));
    let (message, summary) = read_with(stopping("a\n"), &text, End::Stop);
    assert_eq!((message.content.as_str(), summary.n_calls), ("", 0));
}
