//! Tools as the Messages and Responses surfaces write them: flat, without a `function` around them.
//!
//! Both become what the chat surface reads, so that one tool renders to one prompt. Tools that run
//! on the hosted API's servers are refused by name.

use serde_json::Value;

use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, invalid_type, invalid_value};
use crate::json::Object;
use crate::openai::tools::{check_name, check_parameters};
use crate::openai::{Rules, Tool};

/// How a surface writes a tool.
pub(crate) struct Form {
    /// The `type` of tools that the client runs.
    pub(crate) kind: &'static str,
    /// The field of the schema.
    pub(crate) schema: &'static str,
    /// Whether `type` and the schema must be there: one of them, on either surface.
    pub(crate) requires: Requires,
    /// Longest name, in bytes.
    pub(crate) longest_name: usize,
}

/// What a tool must have besides its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Requires {
    /// Its `type`.
    Kind,
    /// The schema of its arguments.
    Schema,
}

/// Reads and checks the elements of `tools`.
pub(crate) fn read_tools(
    items: &[Value],
    form: &Form,
    rules: &Rules,
) -> Result<Vec<Tool>, ApiError> {
    let list = Path::Root.key("tools");
    let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let path = list.index(i);
        let Some(tool) = read_tool(item, &path, form, rules)? else { continue };
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
fn read_tool(
    item: &Value,
    path: &Path<'_>,
    form: &Form,
    rules: &Rules,
) -> Result<Option<Tool>, ApiError> {
    let object = item.as_object().ok_or_else(|| invalid_type(path, "an object", item))?;
    let mut fields = Fields::new(object, *path);
    let kind = match form.requires {
        Requires::Kind => fields.required_string("type")?,
        Requires::Schema => fields.string("type")?.unwrap_or(form.kind),
    };
    if kind != form.kind {
        let refused = hosted(&path.key("type"), kind, form);
        return if rules.ignore_hosted_tools { Ok(None) } else { Err(refused) };
    }
    let name = fields.required_string("name")?;
    check_name(name, form.longest_name, &path.key("name"))?;
    let description = fields.string("description")?;
    let strict = fields.boolean("strict")?.unwrap_or(false);
    let mut function = Object::new();
    function.insert("name".into(), name.into());
    if let Some(description) = description {
        function.insert("description".into(), description.into());
    }
    let at = path.key(form.schema);
    if form.requires == Requires::Schema {
        fields.required(form.schema)?;
    }
    if let Some(schema) = fields.get(form.schema) {
        check_parameters(schema, strict, &at, rules)?;
        function.insert("parameters".into(), schema.clone());
    } else if strict {
        let empty = serde_json::json!({"type": "object", "properties": {}});
        check_parameters(&empty, strict, &at, rules)?;
    }
    Ok(Some(Tool { name: name.to_owned(), function, strict }))
}

/// The refusal of a tool of this `kind`, which is not the client's.
pub(crate) fn hosted(at: &Path<'_>, kind: &str, form: &Form) -> ApiError {
    let (kind, own) = (quoted(kind), form.kind);
    let message = format!("`{at}` is {kind}, but this server runs no tools: use {own} ones.");
    ApiError::at(ErrorCode::UnsupportedParameter, at, message)
}
