//! Our constants against the release's own strings.

use fathom_chat::encode::strings;
use fathom_chat::{Effort, EffortProfile, Special, Task};
use serde_json::Value;

fn release() -> Value {
    serde_json::from_str(include_str!("data/encoding_strings.json")).unwrap()
}

#[test]
fn control_tokens_are_spelled_as_in_the_release() {
    let release = release();
    let tokens = &release["special_tokens"];
    for (special, name) in [
        (Special::Bos, "bos"),
        (Special::Eos, "eos"),
        (Special::User, "user"),
        (Special::Assistant, "assistant"),
        (Special::LatestReminder, "latest_reminder"),
        (Special::ThinkStart, "think_start"),
        (Special::ThinkEnd, "think_end"),
        (Special::Dsml, "dsml"),
        (Special::ExtractedUrl, "extracted_url"),
        (Special::FimBegin, "fim_begin"),
        (Special::FimHole, "fim_hole"),
        (Special::FimEnd, "fim_end"),
    ] {
        assert_eq!(tokens[name], special.text(), "{name}");
    }
    let tasks = tokens["tasks"].as_object().unwrap();
    assert_eq!(tasks.len(), Task::ALL.len());
    for task in Task::ALL {
        assert_eq!(tasks[task.name()], Special::Task(task).text());
    }
}

#[test]
fn templates_are_the_bytes_of_the_release() {
    let release = release();
    for (ours, name) in [
        (strings::TOOLS_TEMPLATE, "tools_template"),
        (strings::TOOL_SCHEMA_SEPARATOR, "tool_schema_separator"),
        (strings::RESPONSE_FORMAT_TEMPLATE, "response_format_template"),
        (strings::RESPONSE_FORMAT_JSON_OBJECT, "response_format_json_object"),
        (strings::SECTION_SEPARATOR, "section_separator"),
        (strings::SECTION_SEPARATOR, "content_block_separator"),
        (strings::UNSUPPORTED_BLOCK, "unsupported_block_template"),
        (strings::TOOL_CALLS_BLOCK_PREFIX, "tool_calls_block_prefix"),
        (strings::CALL_SEPARATOR, "invoke_separator"),
        (strings::CALL_SEPARATOR, "parameter_separator"),
    ] {
        assert_eq!(release[name], ours, "{name}");
    }
    let joined = |parts: &[&str]| parts.concat();
    for (ours, name) in [
        (
            joined(&[strings::TOOL_RESULT_OPEN, "{content}", strings::TOOL_RESULT_CLOSE]),
            "tool_result_template",
        ),
        (
            joined(&[strings::TOOL_CALLS_OPEN, "{tool_calls}", strings::TOOL_CALLS_CLOSE]),
            "tool_calls_block_template",
        ),
        (
            joined(&[
                strings::INVOKE_OPEN,
                "{name}",
                strings::INVOKE_NAME_END,
                "{arguments}",
                strings::INVOKE_CLOSE,
            ]),
            "invoke_template",
        ),
        (
            joined(&[
                strings::PARAMETER_OPEN,
                "{key}",
                strings::PARAMETER_NAME_END,
                "{is_str}",
                strings::PARAMETER_KIND_END,
                "{value}",
                strings::PARAMETER_CLOSE,
            ]),
            "parameter_template",
        ),
        (
            joined(&[strings::TOOL_CALLS_BLOCK_PREFIX, strings::TOOL_CALLS_OPEN]),
            "tool_choice_required_prompt_suffix",
        ),
    ] {
        assert_eq!(release[name], ours, "{name}");
    }
}

#[test]
fn effort_prompts_are_the_bytes_of_the_release() {
    let release = release();
    let profiles = &release["reasoning_effort_profiles"];
    for (profile, name) in
        [(EffortProfile::Preview, "preview"), (EffortProfile::Official0731, "official_0731")]
    {
        assert_eq!(EffortProfile::from_name(name), Some(profile));
        for (effort, value) in profiles[name]["prompts"].as_object().unwrap() {
            let effort = Effort::from_api(effort).unwrap();
            assert_eq!(profile.prompt(effort), value, "{name}");
        }
    }
    for (alias, effort) in profiles["official_0731"]["aliases_hosted_api"].as_object().unwrap() {
        if alias != "unset" {
            assert_eq!(Effort::from_api(alias), Effort::from_api(effort.as_str().unwrap()));
        }
    }
    // Where the preview has no low, low renders as high.
    assert_eq!(EffortProfile::Preview.prompt(Effort::Low), "");
}

#[test]
fn the_profile_is_read_off_the_bundled_encoder() {
    assert_eq!(EffortProfile::detect("REASONING_EFFORT_MAX = (\n"), Some(EffortProfile::Preview));
    assert_eq!(
        EffortProfile::detect("REASONING_EFFORT_PROMPTS = {\n"),
        Some(EffortProfile::Official0731)
    );
    assert_eq!(EffortProfile::detect("def encode_messages():\n"), None);
}
