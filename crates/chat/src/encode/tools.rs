//! Tools in a prompt: their schemas, the calls of earlier turns, and stated answer formats.
//!
//! Not here: reading calls out of generated text (`parse::tool_calls`).

use serde_json::{Map, Value};

use super::json::to_python_json;
use super::prompt::Prompt;
use super::strings;
use crate::conversation::{Arguments, ResponseFormat, ToolCall};

/// Appends the tools section: the fixed instructions around one schema per line.
pub(super) fn push_tools(prompt: &mut Prompt, functions: &[Value]) {
    let (before, after) = strings::TOOLS_TEMPLATE
        .split_once("{tool_schemas}")
        .expect("the template has one place for the schemas");
    let schemas: Vec<String> = functions.iter().map(to_python_json).collect();
    prompt.push_template(before);
    prompt.push_text(&schemas.join(strings::TOOL_SCHEMA_SEPARATOR));
    prompt.push_template(after);
}

/// Appends the statement of an answer format. Nothing for free text.
pub(super) fn push_response_format(prompt: &mut Prompt, format: &ResponseFormat) {
    match format {
        ResponseFormat::Text => {}
        ResponseFormat::JsonObject => prompt.push_text(strings::RESPONSE_FORMAT_JSON_OBJECT),
        ResponseFormat::JsonSchema(schema) => {
            prompt.push_text(
                &strings::RESPONSE_FORMAT_TEMPLATE.replace("{schema}", &to_python_json(schema)),
            );
        }
    }
}

/// Appends the tool-call block of an assistant message, with the blank line before it.
pub(super) fn push_tool_calls(prompt: &mut Prompt, calls: &[ToolCall]) {
    prompt.push_text(strings::TOOL_CALLS_BLOCK_PREFIX);
    prompt.push_template(strings::TOOL_CALLS_OPEN);
    for (i, call) in calls.iter().enumerate() {
        if i > 0 {
            prompt.push_text(strings::CALL_SEPARATOR);
        }
        prompt.push_template(strings::INVOKE_OPEN);
        prompt.push_text(&call.name);
        prompt.push_text(strings::INVOKE_NAME_END);
        push_parameters(prompt, &parameters(&call.arguments));
        prompt.push_template(strings::INVOKE_CLOSE);
    }
    prompt.push_template(strings::TOOL_CALLS_CLOSE);
}

fn push_parameters(prompt: &mut Prompt, parameters: &Map<String, Value>) {
    for (i, (key, value)) in parameters.iter().enumerate() {
        if i > 0 {
            prompt.push_text(strings::CALL_SEPARATOR);
        }
        prompt.push_template(strings::PARAMETER_OPEN);
        prompt.push_text(key);
        prompt.push_text(strings::PARAMETER_NAME_END);
        prompt.push_text(if value.is_string() { "true" } else { "false" });
        prompt.push_text(strings::PARAMETER_KIND_END);
        match value {
            Value::String(text) => prompt.push_text(text),
            other => prompt.push_text(&to_python_json(other)),
        }
        prompt.push_template(strings::PARAMETER_CLOSE);
    }
}

/// The parameters of a call. Text that is no JSON object becomes one parameter `arguments`, so
/// that nothing the model once wrote is lost.
fn parameters(arguments: &Arguments) -> Map<String, Value> {
    match arguments {
        Arguments::Object(object) => object.clone(),
        Arguments::Text(text) => match serde_json::from_str(text) {
            Ok(Value::Object(object)) => object,
            _ => Map::from_iter([("arguments".to_owned(), Value::String(text.clone()))]),
        },
    }
}
