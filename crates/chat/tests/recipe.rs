//! Our prompts against those of DeepSeek's own library, on random conversations.
//!
//! The library is what the hosted API uses. It and the release's encoder disagree in places where
//! we follow the release; the generators below leave exactly those out:
//!
//! - calls without arguments (an empty line more in the release), and numbers whose spelling
//!   Python changes;
//! - tools with other keys than name, description and parameters, in that order;
//! - empty user messages, which the library leaves out of a joined turn;
//! - calls whose ids are not in order (the library sorts calls by id), and results without calls;
//! - reasoning in chat mode, or none on a thinking turn, where the library's callers fill it in;
//! - a continued message without text.

use deepseek_recipe_core::conversation::{
    Conversation as TheirConversation, ReasoningEffort, ResponseFormat as TheirFormat,
};
use deepseek_recipe_core::messages::{InputMessage, ToolCall as TheirCall};
use deepseek_recipe_core::prompt::Prompt as TheirPrompt;
use deepseek_recipe_core::tools::{ToolChoice, ToolDefinition};
use deepseek_recipe_encoding::dsv4::DeepseekV4Encoding;
use deepseek_recipe_encoding::{PromptEncoding, PromptTokenizer};
use fathom_chat::{
    Conversation, Effort, EffortProfile, Message, ResponseFormat, Role, ThinkingMode, ToolCall,
    render,
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::support::{nano_json, tokenizer};

/// Text without the library's grounding tokens, which it makes control tokens in answers.
fn text(min: usize) -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z0-9 .,!?]{1,10}",
        1 => "[\n\t\"\\\\/<>{}]{1,3}",
        1 => "[一-龥ぁ-んé😀]{1,3}",
        1 => prop::sample::select(vec!["<｜User｜>", "</think>", "｜DSML｜", "\n\n", "<tool_result>"])
            .prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, min..5).prop_map(|pieces| pieces.concat())
}

/// JSON whose numbers Python would write as they are.
fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1000i32..1000).prop_map(|n| json!(f64::from(n) + 0.5)),
        text(0).prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec(("[a-z]{1,4}", inner), 0..3)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// Whether `text` is `{}`, with or without white space anywhere in it.
fn is_empty_object(text: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(text).is_ok_and(|entries| entries.is_empty())
}

fn arguments() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::collection::vec(("[a-z]{1,5}", json_value()), 1..4).prop_map(|entries| {
            Value::Object(entries.into_iter().collect()).to_string()
        }),
        1 => text(1).prop_filter("a call without arguments", |text| !is_empty_object(text)),
        1 => prop::collection::vec(json_value(), 0..3)
            .prop_map(|items| Value::from(items).to_string()),
    ]
}

/// One turn of a conversation.
#[derive(Debug, Clone)]
enum Turn {
    System(String),
    User(String),
    Assistant {
        content: String,
        reasoning: String,
    },
    /// Calls with their results, and the order in which the results come.
    Tools {
        content: String,
        reasoning: String,
        calls: Vec<(String, String, String)>,
        backwards: bool,
    },
}

fn turn() -> impl Strategy<Value = Turn> {
    let call = ("[a-z_]{1,6}", arguments(), text(0));
    prop_oneof![
        1 => text(0).prop_map(Turn::System),
        3 => text(1).prop_map(Turn::User),
        2 => (text(0), text(0))
            .prop_map(|(content, reasoning)| Turn::Assistant { content, reasoning }),
        2 => (text(0), text(0), prop::collection::vec(call, 1..4), any::<bool>()).prop_map(
            |(content, reasoning, calls, backwards)| Turn::Tools {
                content, reasoning, calls, backwards
            }
        ),
    ]
}

/// How a random conversation is asked.
#[derive(Debug, Clone)]
struct Setting {
    thinking: bool,
    effort: Option<ReasoningEffort>,
    tools: Vec<(String, String, Value)>,
    format: Option<Option<Value>>,
    /// Text of a last message that is continued.
    prefix: Option<String>,
    forced: bool,
}

fn setting() -> impl Strategy<Value = Setting> {
    use ReasoningEffort::{High, Low, Max, Xhigh};
    let tool = ("[a-z]{1,6}", text(0), json_value());
    (
        any::<bool>(),
        prop::sample::select(vec![None, Some(Low), Some(High), Some(Xhigh), Some(Max)]),
        prop::collection::vec(tool, 0..3),
        prop_oneof![
            3 => Just(None),
            1 => Just(Some(None)),
            1 => json_value().prop_map(|schema| Some(Some(schema))),
        ],
        prop::option::weighted(0.3, text(1)),
        any::<bool>(),
    )
        .prop_map(|(thinking, effort, tools, format, prefix, forced)| {
            // Only in chat mode, and only one way of saying how the answer begins.
            let forced = forced && !thinking && !tools.is_empty() && prefix.is_none();
            Setting { thinking, effort, tools, format, prefix, forced }
        })
}

fn ours(turns: &[Turn], setting: &Setting) -> Conversation {
    let mut messages = Vec::new();
    let answer = |content: &str, reasoning: &str| {
        let message = Message::assistant(content);
        if setting.thinking { message.with_reasoning(reasoning) } else { message }
    };
    for (n, turn) in turns.iter().enumerate() {
        match turn {
            Turn::System(content) => {
                // Developer messages are system messages to the API.
                let role = if n % 2 == 0 { Role::System } else { Role::Developer };
                messages.push(Message::new(role, content.as_str()));
            }
            Turn::User(content) => messages.push(Message::user(content.as_str())),
            Turn::Assistant { content, reasoning } => messages.push(answer(content, reasoning)),
            Turn::Tools { content, reasoning, calls, backwards } => {
                let numbered = calls.iter().enumerate().map(|(i, call)| (format!("c{i}"), call));
                let calls = numbered.clone().map(|(id, (name, arguments, _))| {
                    ToolCall::new(id, name.as_str(), arguments.as_str())
                });
                messages.push(answer(content, reasoning).with_tool_calls(calls.collect()));
                let mut results: Vec<Message> =
                    numbered.map(|(id, (.., result))| Message::tool(id, result.as_str())).collect();
                if *backwards {
                    results.reverse();
                }
                messages.extend(results);
            }
        }
    }
    if let Some(prefix) = &setting.prefix {
        messages.push(answer(prefix, "r"));
    }
    Conversation {
        messages,
        tools: setting
            .tools
            .iter()
            .map(|(name, description, parameters)| {
                json!({"name": name, "description": description, "parameters": parameters})
            })
            .collect(),
        response_format: match &setting.format {
            None => ResponseFormat::Text,
            Some(None) => ResponseFormat::JsonObject,
            Some(Some(schema)) => ResponseFormat::JsonSchema(schema.clone()),
        },
        thinking: if setting.thinking { ThinkingMode::Thinking } else { ThinkingMode::Chat },
        effort: match setting.effort {
            Some(ReasoningEffort::Low) => Effort::Low,
            Some(ReasoningEffort::Max) => Effort::Max,
            None | Some(ReasoningEffort::High | ReasoningEffort::Xhigh) => Effort::High,
        },
        profile: EffortProfile::Official0731,
        continue_final: setting.prefix.is_some(),
        open_tool_block: setting.forced,
        ..Conversation::default()
    }
}

fn theirs(turns: &[Turn], setting: &Setting) -> TheirConversation {
    let mut messages = Vec::new();
    let answer = |content: &str, reasoning: &str, tool_calls, prefix| InputMessage::Assistant {
        content: content.to_owned(),
        reasoning_content: setting.thinking.then(|| reasoning.to_owned()),
        tool_calls,
        prefix,
    };
    let plain = |text: &str| TheirPrompt::plain(text);
    for turn in turns {
        match turn {
            Turn::System(content) => messages.push(InputMessage::System {
                content: plain(content),
                image_sources: Vec::new(),
                tools: None,
            }),
            Turn::User(content) => messages
                .push(InputMessage::User { content: plain(content), image_sources: Vec::new() }),
            Turn::Assistant { content, reasoning } => {
                messages.push(answer(content, reasoning, None, false));
            }
            Turn::Tools { content, reasoning, calls, backwards } => {
                let numbered = calls.iter().enumerate().map(|(i, call)| (format!("c{i}"), call));
                let calls = numbered.clone().map(|(id, (name, arguments, _))| TheirCall {
                    id,
                    name: name.clone(),
                    arguments: arguments.clone(),
                });
                messages.push(answer(content, reasoning, Some(calls.collect()), false));
                let mut results: Vec<InputMessage> = numbered
                    .map(|(id, (.., result))| InputMessage::Tool {
                        content: plain(result),
                        image_sources: Vec::new(),
                        tool_call_id: Some(id),
                    })
                    .collect();
                if *backwards {
                    results.reverse();
                }
                messages.extend(results);
            }
        }
    }
    if let Some(prefix) = &setting.prefix {
        messages.push(answer(prefix, "r", None, true));
    }
    TheirConversation {
        messages,
        thinking_mode: setting.thinking,
        tools: setting
            .tools
            .iter()
            .map(|(name, description, parameters)| ToolDefinition {
                name: name.clone(),
                description: Some(description.clone()),
                parameters: parameters.clone(),
                strict: None,
                defer_loading: false,
            })
            .collect(),
        tool_choice: if setting.forced { ToolChoice::Required } else { ToolChoice::Auto },
        reasoning_effort: setting.effort,
        response_format: match &setting.format {
            None => TheirFormat::Text,
            Some(None) => TheirFormat::JsonObject,
            Some(Some(schema)) => TheirFormat::JsonSchema(schema.clone()),
        },
    }
}

fn library() -> DeepseekV4Encoding {
    let tokenizer = tokenizers::Tokenizer::from_bytes(nano_json()).unwrap();
    DeepseekV4Encoding::new().with_tokenizer(PromptTokenizer::new(&tokenizer))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn prompts_and_their_ids_equal_those_of_the_hosted_apis_library(
        turns in prop::collection::vec(turn(), 0..8),
        setting in setting(),
    ) {
        thread_local! {
            static LIBRARY: DeepseekV4Encoding = library();
        }
        let ours = render(&ours(&turns, &setting)).unwrap();
        let theirs = theirs(&turns, &setting);
        let (text, ids) = LIBRARY.with(|library| {
            (library.render_conversation(&theirs).prompt, library.encode(&theirs).unwrap())
        });
        prop_assert_eq!(ours.as_text(), text);
        prop_assert_eq!(ours.token_ids(&tokenizer()).unwrap(), ids);
    }
}
