//! A model's answer: any text is read, however it is cut.

use fathom_chat::parse::strict::parse_completion;
use fathom_chat::{End, Opening, ParsedMessage, ParserOptions, TextParser, ThinkingMode, ToolSet};
use serde_json::{Map, Value, json};

const SHORTHAND: [(char, &str); 6] = [
    ('\u{1}', "｜DSML｜"),
    ('\u{2}', "<think>"),
    ('\u{3}', "</think>"),
    ('\u{4}', "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n"),
    ('\u{5}', "<｜DSML｜parameter name=\"p\" string=\"true\">"),
    ('\u{6}', "</｜DSML｜parameter>\n"),
];

/// No tool-call tag is shown, complete calls hold one JSON object each, cuts do not matter.
///
/// The first bytes choose the options and the cuts. In the rest, control bytes stand for what a
/// mutator would hardly find: markers of tags and thinking, and well-formed beginnings of calls.
///
/// # Panics
/// If one of these does not hold.
pub fn output_parser(data: &[u8]) {
    let [flags, step, rest @ ..] = data else { return };
    let mut text = String::from_utf8_lossy(rest).into_owned();
    for (byte, meaning) in SHORTHAND {
        text = text.replace(byte, meaning);
    }
    let tools = [json!({"name": "f", "parameters": {"properties": {"p": {"type": "string"}}}})];
    let options = ParserOptions {
        opening: match flags & 3 {
            0 => Opening::Reasoning,
            1 => Opening::ToolBlock,
            _ => Opening::Content,
        },
        tools: (flags & 4 != 0).then(|| ToolSet::from_functions(&tools)),
        stop: if flags & 8 != 0 { vec!["stop".to_owned()] } else { Vec::new() },
        copy_reasoning: flags & 16 != 0,
    };
    let end = if flags & 32 != 0 { End::Length } else { End::Stop };

    let (whole, summary) = TextParser::parse(options.clone(), &text, end);
    // With half a marker around, dropping what stands between can make a whole one: that is text.
    if !text.replace("｜DSML｜", "").contains('｜') {
        for prose in [&whole.reasoning, &whole.content] {
            assert!(!prose.contains('｜'), "a tag is shown");
        }
    }
    for call in &whole.tool_calls {
        serde_json::from_str::<Map<String, Value>>(&call.arguments).expect("an object");
    }

    let mut parser = TextParser::new(options);
    let mut message = ParsedMessage::default();
    let mut left = text.as_str();
    while !left.is_empty() {
        let cut = left.ceil_char_boundary(usize::from(step % 16) + 1);
        message.extend(parser.push(&left[..cut]));
        left = &left[cut..];
    }
    let (deltas, cut_summary) = parser.finish(end);
    message.extend(deltas);
    assert_eq!((message, cut_summary), (whole, summary), "a cut matters");

    for mode in [ThinkingMode::Chat, ThinkingMode::Thinking] {
        let _ = parse_completion(&text, mode);
    }
}
