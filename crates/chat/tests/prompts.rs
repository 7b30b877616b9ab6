//! What a conversation's prompt looks like: section 9's cases, and the hosted API's rules.

use fathom_chat::encode::release::{ReleaseOptions, encode_messages, message_from_json};
use fathom_chat::{
    Arguments, Content, Conversation, Effort, EffortProfile, EncodeError, Message, Opening, Part,
    Prompt, ResponseFormat, Role, Special, Task, ThinkingMode, ToolCall, render,
};
use serde_json::{Value, json};

fn release(messages: &[Message], mode: ThinkingMode) -> String {
    let prompt = encode_messages(messages, &ReleaseOptions::new(mode)).unwrap();
    after_bos(&prompt)
}

fn after_bos(prompt: &Prompt) -> String {
    prompt.as_text().strip_prefix(Special::Bos.text()).expect("a prompt begins").to_owned()
}

fn chat(messages: Vec<Message>) -> Conversation {
    Conversation { messages, thinking: ThinkingMode::Chat, ..Conversation::default() }
}

fn thinking(messages: Vec<Message>) -> Conversation {
    Conversation { messages, ..Conversation::default() }
}

fn rendered(conversation: &Conversation) -> String {
    after_bos(&render(conversation).unwrap())
}

/// The end of the prompt, from the first user token on.
fn from_user(conversation: &Conversation) -> String {
    let text = rendered(conversation);
    text[text.find(Special::User.text()).unwrap()..].to_owned()
}

fn f_tool() -> Value {
    json!({"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}})
}

#[test]
fn the_release_encoder_gives_the_outputs_of_its_own_run() {
    use ThinkingMode::{Chat, Thinking};
    let user = Message::user;
    let assistant = Message::assistant;
    assert_eq!(release(&[user("hi")], Chat), "<｜User｜>hi<｜Assistant｜></think>");
    assert_eq!(
        release(
            &[Message::system("S"), user("hi"), assistant("yo").with_reasoning("R1"), user("2")],
            Thinking
        ),
        "S<｜User｜>hi<｜Assistant｜></think>yo<｜end▁of▁sentence｜><｜User｜>2<｜Assistant｜><think>"
    );
    assert_eq!(release(&[user("a"), user("b")], Chat), "<｜User｜>a\n\nb<｜Assistant｜></think>");
    let open = Message { wo_eos: true, ..assistant("x").with_reasoning("R") };
    assert_eq!(
        release(&[user("a"), open], Thinking),
        "<｜User｜>a<｜Assistant｜><think>R</think>x"
    );
    let title = Message { task: Some(Task::Title), ..assistant("x") };
    assert_eq!(
        release(&[user("a"), title], Chat),
        "<｜User｜>a<｜Assistant｜></think>x<｜end▁of▁sentence｜><｜title｜>"
    );
    let action = Message { task: Some(Task::Action), ..user("a") };
    assert_eq!(release(&[action], Thinking), "<｜User｜>a<｜Assistant｜><think><｜action｜>");
    let max = ReleaseOptions { effort: Some(Effort::Max), ..ReleaseOptions::new(Thinking) };
    assert_eq!(
        after_bos(&encode_messages(&[user("a")], &max).unwrap()),
        format!("{}<｜User｜>a<｜Assistant｜><think>", EffortProfile::Preview.prompt(Effort::Max))
    );
}

#[test]
fn a_tool_round_of_the_release_is_rendered_to_the_byte() {
    let call = ToolCall::new("1", "f", r#"{"a":1,"s":"x\ny","l":[1,2],"f":1e20}"#);
    let text = release(
        &[
            Message { tools: vec![f_tool()], ..Message::system("") },
            Message::user("a"),
            Message::assistant("").with_tool_calls(vec![call]),
            Message::tool("1", "ok"),
            Message::user("go"),
        ],
        ThinkingMode::Thinking,
    );
    assert!(text.starts_with("\n\n## Tools\n"));
    let schema =
        r#"{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}"#;
    assert!(text.contains(&format!("### Available Tool Schemas\n\n{schema}\n\nYou MUST")));
    assert!(text.ends_with(concat!(
        "to invoke tool calls.\n<｜User｜>a<｜Assistant｜><think></think>\n\n",
        "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n",
        "<｜DSML｜parameter name=\"a\" string=\"false\">1</｜DSML｜parameter>\n",
        "<｜DSML｜parameter name=\"s\" string=\"true\">x\ny</｜DSML｜parameter>\n",
        "<｜DSML｜parameter name=\"l\" string=\"false\">[1, 2]</｜DSML｜parameter>\n",
        "<｜DSML｜parameter name=\"f\" string=\"false\">1e+20</｜DSML｜parameter>\n",
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>",
        "<｜User｜><tool_result>ok</tool_result>\n\ngo<｜Assistant｜><think>"
    )));
}

#[test]
fn a_format_that_python_takes_for_false_is_not_stated() {
    for (format, is_stated) in [
        (json!(null), false),
        (json!(0), false),
        (json!(0.0), false),
        (json!(""), false),
        (json!([]), false),
        (json!({}), false),
        (json!(false), false),
        (json!([0]), true),
        (json!({"type": "object"}), true),
    ] {
        let json = json!({"role": "system", "content": "S", "response_format": format});
        let message = message_from_json(&json).unwrap();
        let text = release(&[message], ThinkingMode::Chat);
        assert_eq!(text.contains("## Response Format"), is_stated, "{format}");
    }
}

#[test]
fn the_release_refuses_an_empty_developer_message_and_a_low_preview_effort() {
    let developer = Message::new(Role::Developer, "");
    let options = ReleaseOptions::new(ThinkingMode::Chat);
    assert_eq!(
        encode_messages(&[developer], &options),
        Err(EncodeError::EmptyDeveloper { index: 0 })
    );
    let low = ReleaseOptions { effort: Some(Effort::Low), ..options };
    assert!(matches!(
        encode_messages(&[Message::user("a")], &low),
        Err(EncodeError::EffortNotInProfile { .. })
    ));
}

#[test]
fn system_messages_are_collected_at_the_front() {
    let conversation = chat(vec![
        Message::system("S1"),
        Message::user("a"),
        Message::system(""),
        Message::new(Role::Developer, "S2"),
        Message::user("b"),
        Message::system("S3"),
    ]);
    assert_eq!(rendered(&conversation), "S1\n\nS2\n\nS3<｜User｜>a\n\nb<｜Assistant｜></think>");
}

#[test]
fn a_trailing_assistant_message_is_closed_and_a_new_turn_begins() {
    let messages = vec![Message::user("a"), Message::assistant("x").with_reasoning("R")];
    assert_eq!(
        rendered(&thinking(messages.clone())),
        "<｜User｜>a<｜Assistant｜></think>x<｜end▁of▁sentence｜><｜Assistant｜><think>"
    );
    // With tools all reasoning is kept.
    assert_eq!(
        from_user(&Conversation { tools: vec![f_tool()], ..thinking(messages) }),
        "<｜User｜>a<｜Assistant｜><think>R</think>x<｜end▁of▁sentence｜><｜Assistant｜><think>"
    );
}

#[test]
fn a_prefix_is_continued_after_its_reasoning_or_without_any() {
    let continued = |last: Message| Conversation {
        continue_final: true,
        ..thinking(vec![Message::user("a"), last])
    };
    let closed = render(&continued(Message::assistant("x").with_reasoning("R"))).unwrap();
    assert_eq!(after_bos(&closed), "<｜User｜>a<｜Assistant｜><think>R</think>x");
    assert_eq!(closed.opening(), Opening::Content);
    let bare = render(&continued(Message::assistant("x"))).unwrap();
    assert_eq!(after_bos(&bare), "<｜User｜>a<｜Assistant｜></think>x");
    assert_eq!(bare.opening(), Opening::Content);
    // With tools too, where reasoning is shown everywhere else.
    let with_tools = Conversation { tools: vec![f_tool()], ..continued(Message::assistant("x")) };
    assert_eq!(from_user(&with_tools), "<｜User｜>a<｜Assistant｜></think>x");
    assert_eq!(
        render(&Conversation { continue_final: true, ..chat(vec![Message::user("a")]) }),
        Err(EncodeError::NothingToContinue)
    );
}

#[test]
fn reasoning_that_a_client_did_not_send_back_renders_as_empty() {
    let call = || vec![ToolCall::new("1", "f", r#"{"a": 1}"#)];
    let with = |answer: Message| Conversation {
        tools: vec![f_tool()],
        ..thinking(vec![Message::user("a"), answer, Message::tool("1", "ok")])
    };
    let missing = from_user(&with(Message::assistant("").with_tool_calls(call())));
    assert!(
        missing.starts_with("<｜User｜>a<｜Assistant｜><think></think>\n\n<｜DSML｜tool_calls>")
    );
    let empty = Message::assistant("").with_reasoning("").with_tool_calls(call());
    assert_eq!(missing, from_user(&with(empty)));
}

#[test]
fn tools_and_the_answer_format_follow_the_system_text() {
    let with = |format| Conversation {
        response_format: format,
        ..chat(vec![Message::system("S"), Message::user("a")])
    };
    assert_eq!(
        rendered(&with(ResponseFormat::JsonObject)),
        "S\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\n\
         Reply with JSON object ONLY.<｜User｜>a<｜Assistant｜></think>"
    );
    assert_eq!(
        rendered(&with(ResponseFormat::JsonSchema(json!({"type": "object", "n": 1})))),
        "S\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n\
         {\"type\": \"object\", \"n\": 1}<｜User｜>a<｜Assistant｜></think>"
    );
    assert_eq!(rendered(&with(ResponseFormat::Text)), "S<｜User｜>a<｜Assistant｜></think>");
    let tools_only = Conversation { tools: vec![f_tool()], ..chat(vec![Message::user("a")]) };
    assert!(rendered(&tools_only).starts_with("\n\n## Tools\n"));
}

#[test]
fn effort_speaks_before_everything_else_and_only_in_thinking_mode() {
    for (profile, effort, prefix) in [
        (EffortProfile::Preview, Effort::High, ""),
        (EffortProfile::Preview, Effort::Max, "Reasoning Effort: Absolute maximum"),
        (EffortProfile::Official0731, Effort::Low, ""),
        (EffortProfile::Official0731, Effort::High, "Reasoning Effort: Absolute maximum"),
        (EffortProfile::Official0731, Effort::Max, "Reasoning Effort: Beyond maximum"),
    ] {
        let messages = vec![Message::system("S"), Message::user("a")];
        let conversation = Conversation { profile, effort, ..thinking(messages) };
        let text = rendered(&conversation);
        assert!(text.starts_with(prefix), "{profile:?} {effort:?}");
        assert!(text.ends_with("S<｜User｜>a<｜Assistant｜><think>"));
        assert_eq!(text.starts_with("S<"), prefix.is_empty());
        let chat = Conversation { thinking: ThinkingMode::Chat, ..conversation };
        assert!(rendered(&chat).starts_with("S<｜User｜>"));
    }
}

#[test]
fn a_forced_call_opens_the_block_in_chat_mode_only() {
    let forced = Conversation {
        tools: vec![f_tool()],
        open_tool_block: true,
        ..chat(vec![Message::user("a")])
    };
    let prompt = render(&forced).unwrap();
    assert!(prompt.as_text().ends_with("<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n"));
    assert_eq!(prompt.opening(), Opening::ToolBlock);
    assert_eq!(
        render(&Conversation { thinking: ThinkingMode::Thinking, ..forced.clone() }),
        Err(EncodeError::ForcedCallWhileThinking)
    );
    assert_eq!(
        render(&Conversation { tools: Vec::new(), ..forced }),
        Err(EncodeError::ForcedCallWithoutTools)
    );
}

#[test]
fn content_parts_are_joined_by_a_blank_line_in_every_role() {
    let parts =
        || Content::Parts(vec![Part::Text("p".into()), Part::Unsupported("image_url".into())]);
    let joined = "p\n\n[Unsupported image_url]";
    let conversation = chat(vec![
        Message::system(parts()),
        Message::user(parts()),
        Message::assistant(parts()).with_tool_calls(vec![ToolCall::new("1", "f", "{}")]),
        Message::tool("1", parts()),
    ]);
    let text = rendered(&conversation);
    assert!(
        text.starts_with(&format!(
            "{joined}<｜User｜>{joined}<｜Assistant｜></think>{joined}\n\n<"
        ))
    );
    assert!(text.ends_with(&format!(
        "<｜User｜><tool_result>{joined}</tool_result><｜Assistant｜></think>"
    )));
}

#[test]
fn arguments_given_as_an_object_do_not_nest_when_replayed() {
    let render_with = |arguments: Arguments| {
        let call = ToolCall { id: "1".into(), name: "f".into(), arguments };
        let assistant = Message::assistant("").with_tool_calls(vec![call]);
        rendered(&chat(vec![Message::user("a"), assistant, Message::tool("1", "ok")]))
    };
    let object = json!({"a": {"b": 1}, "s": "t"});
    let parsed = render_with(Arguments::Object(object.as_object().unwrap().clone()));
    assert_eq!(parsed, render_with(Arguments::Text(object.to_string())));
    assert!(!parsed.contains("name=\"arguments\""));
    assert!(parsed.contains("name=\"a\" string=\"false\">{\"b\": 1}<"));
}

#[test]
fn arguments_that_are_no_object_become_one_parameter() {
    for text in ["[1,2]", "5", "not json {", "\"s\"", ""] {
        let call = ToolCall::new("1", "f", text);
        let assistant = Message::assistant("").with_tool_calls(vec![call]);
        let text_out = rendered(&chat(vec![Message::user("a"), assistant]));
        assert!(
            text_out.contains(&format!(
                "<｜DSML｜parameter name=\"arguments\" string=\"true\">{text}</｜DSML｜parameter>"
            )),
            "{text_out}"
        );
    }
}

#[test]
fn tool_results_follow_the_order_of_the_calls_and_texts_keep_their_places() {
    let calls = ["c1", "c2", "c3"].map(|id| ToolCall::new(id, "f", "{}")).to_vec();
    let conversation = chat(vec![
        Message::user("a"),
        Message::assistant("").with_tool_calls(calls),
        Message::tool("c3", "r3"),
        Message::tool("c1", "r1"),
        Message::user("u"),
        Message::tool("c2", "r2"),
    ]);
    assert!(rendered(&conversation).ends_with(
        "<｜User｜><tool_result>r1</tool_result>\n\n<tool_result>r2</tool_result>\n\nu\n\n\
         <tool_result>r3</tool_result><｜Assistant｜></think>"
    ));
}

#[test]
fn a_reminder_stands_before_the_user_turn_it_came_with() {
    let reminder = Message::new(Role::LatestReminder, "today");
    let conversation = thinking(vec![Message::user("a"), Message::user("b"), reminder]);
    assert_eq!(
        rendered(&conversation),
        "<｜latest_reminder｜>today<｜User｜>a\n\nb<｜Assistant｜><think>"
    );
}

#[test]
fn a_conversation_without_a_user_still_opens_an_answer() {
    assert_eq!(rendered(&thinking(Vec::new())), "<｜Assistant｜><think>");
    assert_eq!(rendered(&chat(vec![Message::system("S")])), "S<｜Assistant｜></think>");
    assert_eq!(
        rendered(&chat(vec![Message::assistant("x")])),
        "<｜Assistant｜></think>x<｜end▁of▁sentence｜><｜Assistant｜></think>"
    );
}
