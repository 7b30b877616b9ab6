//! What is read does not depend on where the answer was cut, and never shows a tag.

use fathom_chat::{
    Delta, End, Opening, OutputParser, ParsedMessage, ParserOptions, Summary, TextParser,
};
use proptest::prelude::*;

use crate::answers::tools;
use crate::support::tokenizer;

/// Answers in every state of disrepair: pieces of well-formed ones, in any order.
fn any_answer() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "<｜DSML｜tool_calls>\n",
        "</｜DSML｜tool_calls>",
        "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n",
        "<｜DSML｜toolcalls>",
        "<｜DSML｜invoke name=\"weather\">\n",
        "<｜DSML｜invoke name=\"noop\"/>",
        "<｜DSML｜invoke name=\"no\"op\">",
        "<｜DSML｜invoke nam",
        "\n</｜DSML｜invoke>\n",
        "</｜DSML｜invoke",
        "<｜DSML｜parameter name=\"location\" string=\"true\">",
        "<｜DSML｜parameter name=\"days\" string=\"false\">",
        "<｜DSML｜parameter name=\"arguments\">",
        "<｜DSML｜parameter name=\"options\" string=\"fal",
        "</｜DSML｜parameter>\n",
        "</｜DSML｜parameter",
        "{\"days\": 3}",
        "12",
        "\"",
        "｜DSML｜",
        "<｜DSML｜",
        "</｜DSML｜",
        "<｜DSML｜unknown tag>",
        "<",
        "</",
        "/>",
        ">",
        "<think>",
        "</think>",
        "<｜User｜>",
        "<｜end▁of▁sentence｜>",
        "\n",
        "\n\n",
        " ",
        "ST",
        "STOP",
        "OP",
        "text",
        "中文😀",
        "name=\"",
        " string=\"true\">",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// A block whose parts are all there, with random values; one part may be missing.
fn nearly_well_formed() -> impl Strategy<Value = String> {
    let value = "[a-z<>/｜\n\"{} ]{0,12}|2>&1|\\{\"a\": \\[1, 2\\]\\}|null";
    let key = prop::sample::select(vec!["location", "days", "options", "input", "x\"y"]);
    let string = prop::sample::select(vec![" string=\"true\"", " string=\"false\"", ""]);
    let parameter = (key, string, value).prop_map(|(key, string, value)| {
        format!("<｜DSML｜parameter name=\"{key}\"{string}>{value}</｜DSML｜parameter>\n")
    });
    let call = prop::collection::vec(parameter, 0..4).prop_map(|parameters| {
        format!("<｜DSML｜invoke name=\"weather\">\n{}</｜DSML｜invoke>\n", parameters.concat())
    });
    let calls = prop::collection::vec(call, 1..3);
    ("[a-z\n]{0,6}", calls, any::<Option<prop::sample::Index>>()).prop_map(
        |(before, calls, cut)| {
            let mut text = format!(
                "{before}</think>{before}\n\n<｜DSML｜tool_calls>\n{}</｜DSML｜tool_calls>",
                calls.concat()
            );
            if let Some(cut) = cut {
                let from = text.floor_char_boundary(cut.index(text.len()));
                let to = text.ceil_char_boundary((from + 7).min(text.len()));
                text.replace_range(from..to, "");
            }
            text
        },
    )
}

fn answers() -> impl Strategy<Value = String> {
    prop_oneof![any_answer(), nearly_well_formed()]
}

fn any_options() -> impl Strategy<Value = ParserOptions> {
    (
        prop::sample::select(vec![Opening::Reasoning, Opening::Content, Opening::ToolBlock]),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(opening, offered, stops, copy_reasoning)| ParserOptions {
            opening,
            // A block that the prompt opened was opened because there are tools.
            tools: (offered || opening == Opening::ToolBlock).then(tools),
            stop: if stops { vec!["STOP".into(), "\nt".into()] } else { Vec::new() },
            copy_reasoning,
        })
}

/// The order that streams promise, and what every text and fragment must be.
fn check_stream(deltas: &[Delta]) {
    let mut stage = 0;
    let mut open = None;
    let mut n_calls = 0;
    for delta in deltas {
        let (at_least, text) = match delta {
            Delta::Reasoning(text) => (0, text.as_str()),
            Delta::Content(text) => (1, text.as_str()),
            Delta::ToolCallStart { index, name } => {
                assert_eq!((open, *index), (None, n_calls));
                open = Some(*index);
                (2, name.as_str())
            }
            Delta::ToolCallArguments { index, fragment } => {
                assert_eq!(open, Some(*index));
                (2, fragment.as_str())
            }
            Delta::ToolCallEnd { index } => {
                assert_eq!(open.take(), Some(*index));
                n_calls += 1;
                (2, "-")
            }
        };
        assert!(at_least >= stage, "{deltas:?}");
        stage = at_least;
        assert!(!text.is_empty(), "{deltas:?}");
    }
}

fn check_message(message: &ParsedMessage, summary: &Summary) {
    for text in [&message.reasoning, &message.content] {
        for marker in ["｜DSML｜", "<think>", "</think>", "<｜User｜>", "<｜end▁of▁sentence｜>"]
        {
            assert!(!text.contains(marker), "{text:?} shows {marker}");
        }
    }
    assert_eq!(message.tool_calls.len(), summary.n_calls as usize);
    for call in &message.tool_calls {
        let arguments: Result<serde_json::Map<_, _>, _> = serde_json::from_str(&call.arguments);
        assert!(arguments.is_ok(), "{:?}", call.arguments);
    }
}

fn collect(deltas: Vec<Delta>) -> ParsedMessage {
    check_stream(&deltas);
    let mut message = ParsedMessage::default();
    message.extend(deltas);
    message
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn cuts_do_not_matter(
        text in answers(),
        options in any_options(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        length in any::<bool>(),
    ) {
        let end = if length { End::Length } else { End::Stop };
        let (whole, summary) = TextParser::parse(options.clone(), &text, end);
        check_message(&whole, &summary);

        let mut cuts: Vec<usize> =
            cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect();
        cuts.sort_unstable();
        cuts.push(text.len());
        let mut parser = TextParser::new(options);
        let mut deltas = Vec::new();
        let mut from = 0;
        for cut in cuts {
            deltas.extend(parser.push(&text[from..cut]));
            from = cut;
        }
        let (rest, cut_summary) = parser.finish(end);
        deltas.extend(rest);
        prop_assert_eq!(collect(deltas), whole);
        prop_assert_eq!(cut_summary, summary);
    }

    #[test]
    fn one_character_at_a_time_gives_the_same(text in answers(), options in any_options()) {
        let (whole, summary) = TextParser::parse(options.clone(), &text, End::Stop);
        let mut parser = TextParser::new(options);
        let mut deltas = Vec::new();
        for character in text.chars() {
            deltas.extend(parser.push(character.encode_utf8(&mut [0; 4])));
        }
        let (rest, cut_summary) = parser.finish(End::Stop);
        deltas.extend(rest);
        prop_assert_eq!(collect(deltas), whole);
        prop_assert_eq!(cut_summary, summary);
    }

    #[test]
    fn token_ids_give_the_same_as_their_text(text in answers(), options in any_options()) {
        let (whole, summary) = TextParser::parse(options.clone(), &text, End::Stop);
        let tokenizer = tokenizer();
        let mut parser = OutputParser::new(&tokenizer, options);
        let mut deltas = Vec::new();
        for id in tokenizer.encode_with_special(&text).unwrap() {
            deltas.extend(parser.push(id));
        }
        let (rest, mut token_summary) = parser.finish(End::Stop);
        deltas.extend(rest);
        prop_assert_eq!(collect(deltas), whole);
        token_summary.reasoning_tokens = 0;
        prop_assert_eq!(token_summary, summary);
    }

    #[test]
    fn any_token_ids_at_all_are_read(
        ids in prop::collection::vec(prop_oneof![0u32..1030, 1010u32..1016], 0..60),
        options in any_options(),
    ) {
        let tokenizer = tokenizer();
        let mut parser = OutputParser::new(&tokenizer, options);
        let mut deltas = Vec::new();
        for &id in &ids {
            deltas.extend(parser.push(id));
        }
        let (rest, summary) = parser.finish(End::Length);
        deltas.extend(rest);
        check_message(&collect(deltas), &summary);
        prop_assert!(summary.reasoning_tokens as usize <= ids.len());
    }
}
