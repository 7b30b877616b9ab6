//! Tools, the choice among them, and the text format, in the flat form of the Responses surface.
//!
//! All become what the chat surface reads. Tools that run on the hosted API's servers are refused.

use serde_json::Value;

use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, invalid_type, invalid_value};
use crate::flat_tools::{Form, Requires, hosted};
use crate::json::Object;
use crate::openai::tools::{LONGEST_NAME, check_declared, check_name, check_schema};
use crate::openai::{ResponseFormat, Rules, Tool, ToolChoice};

/// How this surface writes a tool.
pub(super) const FORM: Form = Form {
    kind: "function",
    schema: "parameters",
    requires: Requires::Kind,
    longest_name: LONGEST_NAME,
};

/// Reads `tool_choice`, whose default depends on whether there are tools.
pub(super) fn read_tool_choice(
    value: Option<&Value>,
    tools: &[Tool],
) -> Result<ToolChoice, ApiError> {
    let path = Path::Root.key("tool_choice");
    let without_tools = || {
        Err(invalid_value(&path, "`tool_choice` demands a call, but the request has no `tools`."))
    };
    let object = match value {
        None if tools.is_empty() => return Ok(ToolChoice::None),
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => return Ok(ToolChoice::None),
            "auto" => return Ok(ToolChoice::Auto),
            "required" if tools.is_empty() => return without_tools(),
            "required" => return Ok(ToolChoice::Required),
            other => {
                let other = quoted(other);
                let accepted = "none, auto, required or an object that names a tool";
                let message = format!("`tool_choice` is {other}, but must be {accepted}.");
                return Err(invalid_value(&path, message));
            }
        },
        Some(Value::Object(object)) => object,
        Some(other) => return Err(invalid_type(&path, "a string or an object", other)),
    };
    let mut fields = Fields::new(object, path);
    match fields.required_string("type")? {
        "function" | "allowed_tools" if tools.is_empty() => without_tools(),
        "function" => {
            let name = fields.required_string("name")?;
            check_declared(name, tools, &path.key("name"))?;
            Ok(ToolChoice::Named(name.to_owned()))
        }
        "allowed_tools" => read_allowed_tools(&mut fields, path, tools),
        other => Err(hosted(&path.key("type"), other, &FORM)),
    }
}

fn read_allowed_tools(
    fields: &mut Fields<'_>,
    path: Path<'_>,
    tools: &[Tool],
) -> Result<ToolChoice, ApiError> {
    let required = match fields.required_string("mode")? {
        "auto" => false,
        "required" => true,
        other => {
            let (at, other) = (path.key("mode"), quoted(other));
            let message = format!("`{at}` is {other}, but must be auto or required.");
            return Err(invalid_value(&at, message));
        }
    };
    fields.required("tools")?;
    let list = path.key("tools");
    let mut names = Vec::new();
    for (i, item) in fields.array("tools")?.unwrap_or_default().iter().enumerate() {
        let at = list.index(i);
        let object = item.as_object().ok_or_else(|| invalid_type(&at, "an object", item))?;
        let mut entry = Fields::new(object, at);
        let kind = entry.required_string("type")?;
        if kind != "function" {
            return Err(hosted(&at.key("type"), kind, &FORM));
        }
        let name = entry.required_string("name")?;
        check_declared(name, tools, &at.key("name"))?;
        names.push(name.to_owned());
    }
    Ok(ToolChoice::Allowed { required, names })
}

/// Reads `text.format`.
pub(super) fn read_format(
    object: Option<&Object>,
    rules: &Rules,
) -> Result<ResponseFormat, ApiError> {
    let Some(object) = object else { return Ok(ResponseFormat::Text) };
    let text = Path::Root.key("text");
    let path = text.key("format");
    let mut fields = Fields::new(object, path);
    match fields.required_string("type")? {
        "text" => return Ok(ResponseFormat::Text),
        "json_object" => return Ok(ResponseFormat::JsonObject),
        "json_schema" => {}
        other => {
            let (at, other) = (path.key("type"), quoted(other));
            let accepted = "text, json_object or json_schema";
            let message = format!("`{at}` is {other}, but must be {accepted}.");
            return Err(invalid_value(&at, message));
        }
    }
    let name = fields.required_string("name")?.to_owned();
    check_name(&name, LONGEST_NAME, &path.key("name"))?;
    fields.string("description")?;
    let strict = fields.boolean("strict")?.unwrap_or(false);
    let value = fields.required("schema")?;
    let schema = fields.object("schema")?.expect("the field was there").clone();
    check_schema(value, strict, &path.key("schema"), ErrorCode::InvalidJsonSchema, rules)?;
    Ok(ResponseFormat::JsonSchema { name, schema, strict })
}
