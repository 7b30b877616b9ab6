//! Tools, the choice among them, and the response format.
//!
//! A [`Tool`] keeps the client's `function` object as it came, because that is what the prompt shows
//! the model. Not here: whether this server can enforce a choice or a schema (the server's `lower`).

use serde_json::Value;

use super::{Rules, Structured};
use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{
    Fields, Path, at_most_items, invalid_type, invalid_value, is_identifier, missing,
};
use crate::json::Object;
use crate::schema::{self, Problem};

/// A function the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Unique among the request's tools; `^[a-zA-Z0-9_-]{1,64}$`, up to 128 on the Messages surface.
    pub name: String,
    /// The whole `function` object, in the client's key order.
    pub function: Object,
    /// Whether arguments must satisfy the schema.
    pub strict: bool,
}

impl Tool {
    /// The JSON Schema of the arguments, if the client gave one.
    #[must_use]
    pub fn parameters(&self) -> Option<&Object> {
        self.function.get("parameters").and_then(Value::as_object)
    }
}

/// Which tools the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// None; the tools stay in the prompt.
    None,
    /// As the model decides.
    Auto,
    /// At least one.
    Required,
    /// Exactly one call of this tool.
    Named(String),
    /// As [`ToolChoice::Auto`] or [`ToolChoice::Required`], among these only.
    Allowed {
        /// At least one call.
        required: bool,
        /// Names of the tools that may be called.
        names: Vec<String>,
    },
}

/// What form the answer must have.
#[derive(Debug, Clone, PartialEq)]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// One JSON object.
    JsonObject,
    /// JSON that satisfies a schema.
    JsonSchema {
        /// The client's name for the schema.
        name: String,
        /// The schema.
        schema: Object,
        /// Whether the rules of strict mode apply to it.
        strict: bool,
    },
    /// What `structured_outputs` says, which the prompt does not.
    Structured(Structured),
}

/// Longest name of a function or schema on this surface, in bytes.
pub(crate) const LONGEST_NAME: usize = 64;

/// Reads and checks the elements of `tools`.
pub(crate) fn read_tools(items: &[Value], rules: &Rules) -> Result<Vec<Tool>, ApiError> {
    let list = Path::Root.key("tools");
    let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let path = list.index(i);
        let tool = read_tool(item, &path, rules)?;
        if tools.iter().any(|earlier| earlier.name == tool.name) {
            let function = path.key("function");
            let at = function.key("name");
            let name = quoted(&tool.name);
            return Err(invalid_value(
                &at,
                format!("`{at}` repeats {name}; names must be unique."),
            ));
        }
        tools.push(tool);
    }
    Ok(tools)
}

/// Checks the number of tools; the elements follow with [`read_tools`].
pub(crate) fn check_tool_count(items: &[Value], rules: &Rules) -> Result<(), ApiError> {
    at_most_items(&Path::Root.key("tools"), items.len(), rules.max_tools)
}

fn read_tool(item: &Value, path: &Path<'_>, rules: &Rules) -> Result<Tool, ApiError> {
    let object = item.as_object().ok_or_else(|| invalid_type(path, "an object", item))?;
    let mut fields = Fields::new(object, *path);
    if let Some(kind) = fields.string("type")?
        && kind != "function"
    {
        let at = path.key("type");
        let message = format!("`{at}` is {}, but must be function.", quoted(kind));
        return Err(invalid_value(&at, message));
    }
    fields.required("function")?;
    let object = fields.object("function")?.expect("the field was there");
    let function_path = path.key("function");
    let mut function = Fields::new(object, function_path);
    let name = function.required_string("name")?;
    check_name(name, LONGEST_NAME, &function_path.key("name"))?;
    function.string("description")?;
    let strict = function.boolean("strict")?.unwrap_or(false);
    if let Some(parameters) = function.get("parameters") {
        check_parameters(parameters, strict, &function_path.key("parameters"), rules)?;
    } else if strict {
        let empty = serde_json::json!({"type": "object", "properties": {}});
        check_parameters(&empty, strict, &function_path.key("parameters"), rules)?;
    }
    Ok(Tool { name: name.to_owned(), function: object.clone(), strict })
}

pub(crate) fn check_name(name: &str, longest: usize, at: &Path<'_>) -> Result<(), ApiError> {
    if is_identifier(name, longest) {
        return Ok(());
    }
    let name = quoted(name);
    let message = format!("`{at}` is {name}, but must match ^[a-zA-Z0-9_-]{{1,{longest}}}$.");
    Err(invalid_value(at, message))
}

pub(crate) fn check_parameters(
    parameters: &Value,
    strict: bool,
    at: &Path<'_>,
    rules: &Rules,
) -> Result<(), ApiError> {
    let code = ErrorCode::InvalidFunctionParameters;
    let is_object_schema = parameters.as_object().is_some_and(schema::describes_an_object);
    if !is_object_schema {
        let message = format!("`{at}` must be a JSON Schema whose top level has the type object.");
        return Err(ApiError::at(code, at, message));
    }
    check_schema(parameters, strict, at, code, rules)
}

pub(crate) fn check_schema(
    value: &Value,
    strict: bool,
    at: &Path<'_>,
    invalid: ErrorCode,
    rules: &Rules,
) -> Result<(), ApiError> {
    let size = serde_json::to_string(value).map_or(usize::MAX, |text| text.len());
    if size > rules.max_schema_bytes {
        let max = rules.max_schema_bytes;
        let message = format!("`{at}` is {size} bytes of JSON, but at most {max} are allowed.");
        return Err(ApiError::at(ErrorCode::SchemaTooComplex, at, message));
    }
    let checked = schema::check(value, rules.max_schema_depth);
    let checked = if strict { checked.and_then(|()| schema::check_strict(value)) } else { checked };
    checked.map_err(|problem| {
        let (code, pointer, what) = match problem {
            Problem::Invalid { pointer, what } => (invalid, pointer, what),
            Problem::TooDeep { pointer } => {
                let max = rules.max_schema_depth;
                let what = format!("schemas may nest at most {max} deep");
                (ErrorCode::SchemaTooComplex, pointer, what)
            }
            Problem::Unsupported { pointer, what } => (ErrorCode::UnsupportedSchema, pointer, what),
        };
        ApiError::at(code, at, format!("`{at}` is not accepted: at {}, {what}.", quoted(&pointer)))
    })
}

/// Reads `tool_choice`, whose default depends on whether there are tools.
pub(crate) fn read_tool_choice(
    value: Option<&Value>,
    tools: &[Tool],
) -> Result<ToolChoice, ApiError> {
    let path = Path::Root.key("tool_choice");
    let without_tools = || {
        Err(invalid_value(&path, "`tool_choice` demands a call, but the request has no `tools`."))
    };
    let Some(value) = value else {
        return Ok(if tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto });
    };
    let object = match value {
        Value::String(word) => match word.as_str() {
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
        Value::Object(object) => object,
        other => return Err(invalid_type(&path, "a string or an object", other)),
    };
    let mut fields = Fields::new(object, path);
    match fields.required_string("type")? {
        _ if tools.is_empty() => without_tools(),
        "function" => {
            let name = read_choice_name(&mut fields, path)?;
            let function = path.key("function");
            check_declared(name, tools, &function.key("name"))?;
            Ok(ToolChoice::Named(name.to_owned()))
        }
        "allowed_tools" => read_allowed_tools(&mut fields, path, tools),
        other => {
            let (at, other) = (path.key("type"), quoted(other));
            let message = format!("`{at}` is {other}, but must be function or allowed_tools.");
            Err(invalid_value(&at, message))
        }
    }
}

fn read_choice_name<'a>(fields: &mut Fields<'a>, path: Path<'_>) -> Result<&'a str, ApiError> {
    fields.required("function")?;
    let object = fields.object("function")?.expect("the field was there");
    let at = path.key("function");
    match object.get("name") {
        Some(Value::String(name)) => Ok(name),
        None | Some(Value::Null) => Err(missing(&at.key("name"))),
        Some(other) => Err(invalid_type(&at.key("name"), "a string", other)),
    }
}

pub(crate) fn check_declared(name: &str, tools: &[Tool], at: &Path<'_>) -> Result<(), ApiError> {
    if tools.iter().any(|tool| tool.name == name) {
        return Ok(());
    }
    Err(invalid_value(
        at,
        format!("`{at}` is {}, but `tools` declares no such tool.", quoted(name)),
    ))
}

fn read_allowed_tools(
    fields: &mut Fields<'_>,
    path: Path<'_>,
    tools: &[Tool],
) -> Result<ToolChoice, ApiError> {
    fields.required("allowed_tools")?;
    let object = fields.object("allowed_tools")?.expect("the field was there");
    let allowed_path = path.key("allowed_tools");
    let mut allowed = Fields::new(object, allowed_path);
    let required = match allowed.required_string("mode")? {
        "auto" => false,
        "required" => true,
        other => {
            let (at, other) = (allowed_path.key("mode"), quoted(other));
            let message = format!("`{at}` is {other}, but must be auto or required.");
            return Err(invalid_value(&at, message));
        }
    };
    allowed.required("tools")?;
    let items = allowed.array("tools")?.expect("the field was there");
    let list = allowed_path.key("tools");
    let mut names = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let at = list.index(i);
        let object = item.as_object().ok_or_else(|| invalid_type(&at, "an object", item))?;
        let mut entry = Fields::new(object, at);
        let name = read_choice_name(&mut entry, at)?;
        let function = at.key("function");
        check_declared(name, tools, &function.key("name"))?;
        names.push(name.to_owned());
    }
    if required && names.is_empty() {
        return Err(invalid_value(&list, format!("`{list}` must name at least one tool.")));
    }
    Ok(ToolChoice::Allowed { required, names })
}

/// The response format's `type`, checked, with the object that the rest is read from.
pub(crate) fn check_format_type(object: Option<&Object>) -> Result<(), ApiError> {
    let Some(object) = object else { return Ok(()) };
    let path = Path::Root.key("response_format");
    match Fields::new(object, path).required_string("type")? {
        "text" | "json_object" | "json_schema" => Ok(()),
        other => {
            let (at, other) = (path.key("type"), quoted(other));
            let accepted = "text, json_object or json_schema";
            Err(invalid_value(&at, format!("`{at}` is {other}, but must be {accepted}.")))
        }
    }
}

/// Reads a `response_format` whose type was checked.
pub(crate) fn read_format(
    object: Option<&Object>,
    rules: &Rules,
) -> Result<ResponseFormat, ApiError> {
    let Some(object) = object else { return Ok(ResponseFormat::Text) };
    let path = Path::Root.key("response_format");
    let mut fields = Fields::new(object, path);
    match fields.required_string("type")? {
        "json_object" => return Ok(ResponseFormat::JsonObject),
        "json_schema" => {}
        _ => return Ok(ResponseFormat::Text),
    }
    fields.required("json_schema")?;
    let object = fields.object("json_schema")?.expect("the field was there");
    let spec_path = path.key("json_schema");
    let mut spec = Fields::new(object, spec_path);
    let name = spec.required_string("name")?.to_owned();
    check_name(&name, LONGEST_NAME, &spec_path.key("name"))?;
    spec.string("description")?;
    let strict = spec.boolean("strict")?.unwrap_or(false);
    let value = spec.required("schema")?;
    let schema = spec.object("schema")?.expect("the field was there").clone();
    let at = spec_path.key("schema");
    check_schema(value, strict, &at, ErrorCode::InvalidJsonSchema, rules)?;
    Ok(ResponseFormat::JsonSchema { name, schema, strict })
}
