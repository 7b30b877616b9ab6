//! Tools and the choice among them, in the form of the Messages surface.
//!
//! Both become what the chat surface reads, so that one tool renders to one prompt. Tools that run
//! on the hosted API's servers are refused by name.

use serde_json::Value;

use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, invalid_type, invalid_value};
use crate::json::Object;
use crate::openai::tools::{check_declared, check_name, check_parameters};
use crate::openai::{Rules, Tool, ToolChoice};

/// Longest name of a tool, in bytes. Twice that of the chat surface, as at Anthropic: agents put the
/// names of a plugin and its server in front of those of their tools.
const LONGEST_NAME: usize = 128;

/// Reads and checks the elements of `tools`.
pub(super) fn read_tools(items: &[Value], rules: &Rules) -> Result<Vec<Tool>, ApiError> {
    let list = Path::Root.key("tools");
    let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let path = list.index(i);
        let Some(tool) = read_tool(item, &path, rules)? else { continue };
        if tools.iter().any(|earlier| earlier.name == tool.name) {
            let at = path.key("name");
            let name = quoted(&tool.name);
            let message = format!("`{at}` repeats {name}; names must be unique.");
            return Err(invalid_value(&at, message));
        }
        tools.push(tool);
    }
    Ok(tools)
}

/// A tool; `None` if it is one of the hosted API's own and the rules leave those out.
fn read_tool(item: &Value, path: &Path<'_>, rules: &Rules) -> Result<Option<Tool>, ApiError> {
    let object = item.as_object().ok_or_else(|| invalid_type(path, "an object", item))?;
    let mut fields = Fields::new(object, *path);
    if let Some(kind) = fields.string("type")?
        && kind != "custom"
    {
        if rules.ignore_hosted_tools {
            return Ok(None);
        }
        let at = path.key("type");
        let kind = quoted(kind);
        let message = format!("`{at}` is {kind}, but this server runs no tools: use custom ones.");
        return Err(ApiError::at(ErrorCode::UnsupportedParameter, at, message));
    }
    let name = fields.required_string("name")?;
    check_name(name, LONGEST_NAME, &path.key("name"))?;
    let description = fields.string("description")?;
    let strict = fields.boolean("strict")?.unwrap_or(false);
    let schema = fields.required("input_schema")?;
    check_parameters(schema, strict, &path.key("input_schema"), rules)?;
    let mut function = Object::new();
    function.insert("name".into(), name.into());
    if let Some(description) = description {
        function.insert("description".into(), description.into());
    }
    function.insert("parameters".into(), schema.clone());
    Ok(Some(Tool { name: name.to_owned(), function, strict }))
}

/// Reads `tool_choice`, and whether one message may hold several calls.
pub(super) fn read_tool_choice(
    object: Option<&Object>,
    tools: &[Tool],
) -> Result<(ToolChoice, bool), ApiError> {
    let Some(object) = object else {
        let choice = if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto };
        return Ok((choice, true));
    };
    let path = Path::Root.key("tool_choice");
    let mut fields = Fields::new(object, path);
    let parallel = !fields.boolean("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = match fields.required_string("type")? {
        "none" => ToolChoice::None,
        "auto" => ToolChoice::Auto,
        "any" if tools.is_empty() => {
            let message = "`tool_choice` demands a call, but the request has no `tools`.";
            return Err(invalid_value(&path, message));
        }
        "any" => ToolChoice::Required,
        "tool" => {
            let name = fields.required_string("name")?;
            check_declared(name, tools, &path.key("name"))?;
            ToolChoice::Named(name.to_owned())
        }
        other => {
            let (at, other) = (path.key("type"), quoted(other));
            let message = format!("`{at}` is {other}, but must be one of auto, any, tool, none.");
            return Err(invalid_value(&at, message));
        }
    };
    Ok((choice, parallel))
}
