//! Answers that come back: in their own tokens if unchanged, encoded anew if not.

use std::sync::Arc;

use fathom_chat::{
    AnswerTurn, Conversation, Message, Opening, ParserOptions, ThinkingMode, Tokenizer, ToolCall,
    ToolSet, Turn, render,
};
use fathom_core::TokenId;
use serde_json::{Value, json};

use crate::support::tokenizer;

/// A call as a model might lay it out: more space than the release puts, arguments in JSON of its own.
const CALL: &str = "<｜DSML｜tool_calls>\n\n<｜DSML｜invoke name=\"get\">\n\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"list\" string=\"false\">[1,2 , 3]</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n</｜DSML｜tool_calls>";
const ARGUMENTS: &str = r#"{"city":"Oslo","list":[1,2,3]}"#;
const EOS: &str = "<｜end▁of▁sentence｜>";

fn functions() -> Vec<Value> {
    vec![json!({"name": "get", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "list": {"type": "array"}}}})]
}

fn options(opening: Opening) -> ParserOptions {
    let tools = Some(ToolSet::from_functions(&functions()));
    ParserOptions { opening, tools, ..ParserOptions::default() }
}

/// `text` in as many tokens as it can take: one for each letter.
fn spelt(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let letters = |id: TokenId| match tokenizer.special().of(id) {
        Some(_) => vec![id],
        None => {
            let text = tokenizer.decode(&[id]);
            text.chars().flat_map(|c| tokenizer.encode_plain(&c.to_string()).unwrap()).collect()
        }
    };
    tokenizer.encode_with_special(text).unwrap().into_iter().flat_map(letters).collect()
}

fn bytes(turn: Turn<'_>) -> Vec<u8> {
    let mut all = Vec::new();
    turn.bytes(|bytes| all.extend_from_slice(bytes));
    all
}

/// A conversation in which the message was answered to "Hi", and a tool or a user speaks next.
fn after(answer: Message, thinking: ThinkingMode) -> Conversation {
    let next = match answer.tool_calls.first() {
        Some(call) => Message::tool(call.id.clone(), "cold"),
        None => Message::user("And?"),
    };
    let messages = vec![Message::user("Hi"), answer, next];
    Conversation { messages, tools: functions(), thinking, ..Conversation::default() }
}

/// The conversation's tokens where `known` is remembered, and whether it was recalled.
fn recalling(conversation: &Conversation, known: &AnswerTurn) -> (Vec<TokenId>, bool) {
    let key = bytes(known.rendered().unwrap());
    let mut found = false;
    let prompt = render(conversation).unwrap();
    let recall = |before: &[TokenId], turn: Turn<'_>| {
        let opener = before.last().and_then(|&id| tokenizer().special().of(id));
        assert!(opener.is_some(), "an answer follows the token that opens it");
        let same = bytes(turn) == key;
        found |= same;
        same.then(|| Arc::from(known.ids()))
    };
    let encoded = prompt.token_ids_recalling(&tokenizer(), recall).unwrap();
    assert_eq!(encoded.n_before_answer, encoded.ids.len());
    (encoded.ids, found)
}

fn contains(all: &[TokenId], part: &[TokenId]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

fn calls(arguments: &str) -> Vec<ToolCall> {
    vec![ToolCall::new("call_1", "get", arguments)]
}

#[test]
fn an_unchanged_answer_comes_back_in_the_tokens_that_were_sampled() {
    let thinking = "Hm.\n</think>Sure.\n\n";
    for (mode, opening, text, message) in [
        (
            ThinkingMode::Thinking,
            Opening::Reasoning,
            [thinking, CALL, EOS].concat(),
            Message::assistant("Sure.").with_reasoning("Hm.\n").with_tool_calls(calls(ARGUMENTS)),
        ),
        (
            ThinkingMode::Chat,
            Opening::Content,
            ["\n\n", CALL, EOS].concat(),
            Message::assistant("").with_tool_calls(calls(ARGUMENTS)),
        ),
        (
            ThinkingMode::Chat,
            Opening::Content,
            ["Plain words </think", ">.", EOS].concat(),
            Message::assistant("Plain words </think>."),
        ),
    ] {
        let mut sampled = spelt(&tokenizer(), &text);
        if opening == Opening::Content && text.contains("think") {
            // Spelt out, not the control token.
            sampled = tokenizer().encode_plain("Plain words </think>.").unwrap();
            sampled.push(tokenizer().special().eos());
        }
        let turn = AnswerTurn::new(&tokenizer(), &options(opening), &[], &sampled).unwrap();
        assert_eq!(turn.ids(), sampled);
        let conversation = after(message, mode);
        let (ids, found) = recalling(&conversation, &turn);
        assert!(found && contains(&ids, &sampled), "{text}");
        // All else is as without a memory, and the text is the same where the layout was.
        let plain = render(&conversation).unwrap().token_ids(&tokenizer()).unwrap();
        assert!(ids.len() >= plain.len());
        assert_eq!(ids[..3], plain[..3]);
        assert_eq!(ids[ids.len() - 3..], plain[plain.len() - 3..]);
    }
}

#[test]
fn whatever_a_client_changes_its_own_words_count() {
    let sampled = spelt(&tokenizer(), &["Hm.</think>Sure.\n\n", CALL, EOS].concat());
    let options = options(Opening::Reasoning);
    let turn = AnswerTurn::new(&tokenizer(), &options, &[], &sampled).unwrap();
    let message = |content: &str, reasoning: &str, arguments: &str| {
        Message::assistant(content).with_reasoning(reasoning).with_tool_calls(calls(arguments))
    };
    let found = |message, mode| recalling(&after(message, mode), &turn).1;
    let thinking = ThinkingMode::Thinking;
    assert!(found(message("Sure.", "Hm.", ARGUMENTS), thinking));
    // The same object, written by another JSON library.
    let spaced = r#"{ "city": "Oslo", "list": [1, 2, 3] }"#;
    assert!(found(message("Sure.", "Hm.", spaced), thinking));

    for (content, reasoning, arguments) in [
        ("Sure. ", "Hm.", ARGUMENTS),
        ("Sure.", "Hm", ARGUMENTS),
        ("Sure.", "", ARGUMENTS),
        ("Sure.", "Hm.", r#"{"list":[1,2,3],"city":"Oslo"}"#),
        ("Sure.", "Hm.", r#"{"city":"Oslo","list":[1,2,3.0]}"#),
        ("Sure.", "Hm.", r#"{"city":"Oslo"}"#),
    ] {
        let changed = message(content, reasoning, arguments);
        assert!(!found(changed, thinking), "{content} {reasoning} {arguments}");
    }
    // Where reasoning is left out, the turn is another one.
    assert!(!found(message("Sure.", "Hm.", ARGUMENTS), ThinkingMode::Chat));
    // Text that spells a call is not a call.
    let forged = ["Sure.\n\n", CALL].concat();
    assert!(!found(Message::assistant(forged).with_reasoning("Hm."), thinking));
}

#[test]
fn an_answer_that_was_cut_is_closed_as_its_message_is() {
    let tokenizer = tokenizer();
    let close = |opening, text: &str, message: Message| {
        let sampled = tokenizer.encode_with_special(text).unwrap();
        let turn = AnswerTurn::new(&tokenizer, &options(opening), &[], &sampled).unwrap();
        let (ids, found) = recalling(&after(message, ThinkingMode::Chat), &turn);
        assert!(found && contains(&ids, &sampled), "{text}");
        tokenizer.decode(turn.ids())
    };
    assert_eq!(
        close(Opening::Content, "Once upon", Message::assistant("Once upon")),
        ["Once upon", EOS].concat()
    );
    // Only the first call was wanted.
    let text = ["\n\n", CALL.strip_suffix("\n</｜DSML｜tool_calls>").unwrap()].concat();
    let called = Message::assistant("").with_tool_calls(calls(ARGUMENTS));
    let whole = ["\n\n", CALL, EOS].concat();
    assert_eq!(close(Opening::Content, &text, called.clone()), whole);
    assert_eq!(close(Opening::Content, &[&text, "\n"].concat(), called), whole);
}

#[test]
fn what_a_forced_call_was_opened_with_belongs_to_the_answer() {
    let tokenizer = tokenizer();
    let forced = Conversation {
        messages: vec![Message::user("Hi")],
        tools: functions(),
        thinking: ThinkingMode::Chat,
        open_tool_block: true,
        ..Conversation::default()
    };
    let prompt = render(&forced).unwrap();
    let encoded = prompt.token_ids_recalling(&tokenizer, |_, _| None).unwrap();
    let opened = &encoded.ids[encoded.n_before_answer..];
    assert_eq!(tokenizer.decode(opened), "\n\n<｜DSML｜tool_calls>\n");
    let rest = CALL.strip_prefix("<｜DSML｜tool_calls>\n").unwrap();
    let sampled = spelt(&tokenizer, &[rest, EOS].concat());
    let options = options(Opening::ToolBlock);
    let turn = AnswerTurn::new(&tokenizer, &options, opened, &sampled).unwrap();
    let message = Message::assistant("").with_tool_calls(calls(ARGUMENTS));
    let (ids, found) = recalling(&after(message, ThinkingMode::Chat), &turn);
    assert!(found && contains(&ids, &[opened, &sampled].concat()));
}

#[test]
fn tokens_that_say_more_than_the_message_are_not_remembered() {
    let tokenizer = tokenizer();
    let fits = |options: &ParserOptions, text: &str| {
        let sampled = tokenizer.encode_with_special(text).unwrap();
        AnswerTurn::new(&tokenizer, options, &[], &sampled).is_some()
    };
    let content = options(Opening::Content);
    let reasoning = options(Opening::Reasoning);
    assert!(fits(&content, &["Yes.", EOS].concat()));
    for text in [
        // A user who is none, two ends, an end of reasoning that never began.
        ["Yes.<｜User｜>No?", EOS].concat(),
        ["Yes.", EOS, EOS].concat(),
        ["Yes.</think>", EOS].concat(),
        // A call that was begun and dropped.
        "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n".to_owned(),
    ] {
        assert!(!fits(&content, &text), "{text}");
    }
    assert!(!fits(&reasoning, &["Hm.", EOS].concat()), "reasoning without an end");
    let stop = ParserOptions { stop: vec!["stop".to_owned()], ..content };
    assert!(!fits(&stop, "go on, stop, go on"));
}
