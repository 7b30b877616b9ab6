//! Tools and the choice among them, in the form of the Messages surface.

use crate::error::{ApiError, quoted};
use crate::fields::{Fields, Path, invalid_value};
use crate::flat_tools::{Form, Requires};
use crate::json::Object;
use crate::openai::tools::check_declared;
use crate::openai::{Tool, ToolChoice};

/// How this surface writes a tool. Names are twice as long as on the chat surface, as at Anthropic:
/// agents put the names of a plugin and its server in front of those of their tools.
pub(super) const FORM: Form =
    Form { kind: "custom", schema: "input_schema", requires: Requires::Schema, longest_name: 128 };

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
