//! `structured_outputs`: vLLM's way to say what an answer must be.
//!
//! Unlike `response_format` it adds nothing to the prompt. Not here: whether an expression or a
//! grammar is well formed, which only its compiler can tell.

use serde_json::Value;

use super::Rules;
use super::tools::check_schema;
use crate::error::{ApiError, ErrorCode};
use crate::fields::{Fields, Path, invalid_type, invalid_value};
use crate::json::Object;

/// What the answer must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Structured {
    /// JSON that follows a schema.
    Json(Object),
    /// Some JSON object.
    JsonObject,
    /// A text that matches all of a regular expression.
    Regex(String),
    /// One of these texts; at least one.
    Choice(Vec<String>),
    /// A text of the language that this grammar defines.
    Grammar(String),
}

impl Structured {
    /// The field that says it.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Json(_) => "structured_outputs.json",
            Self::JsonObject => "structured_outputs.json_object",
            Self::Regex(_) => "structured_outputs.regex",
            Self::Choice(_) => "structured_outputs.choice",
            Self::Grammar(_) => "structured_outputs.grammar",
        }
    }
}

const FIELDS: [&str; 5] = ["json", "json_object", "regex", "choice", "grammar"];

/// Reads `structured_outputs`.
pub(crate) fn read_structured(
    object: &Object,
    rules: &Rules,
    unknown: &mut Vec<String>,
) -> Result<Structured, ApiError> {
    let path = Path::Root.key("structured_outputs");
    let mut fields = Fields::new(object, path);
    if fields.get("structural_tag").is_some() {
        let at = path.key("structural_tag");
        let message = format!("`{at}` is not supported: use `tools`.");
        return Err(ApiError::at(ErrorCode::UnsupportedParameter, at, message));
    }
    let json = fields.get("json");
    let json_object = fields.boolean("json_object")?.filter(|asked| *asked);
    let regex = fields.string("regex")?;
    let choice = fields.array("choice")?;
    let grammar = fields.string("grammar")?;
    fields.report_unknown(unknown);
    let given = [
        json.is_some(),
        json_object.is_some(),
        regex.is_some(),
        choice.is_some(),
        grammar.is_some(),
    ];
    let mut given = FIELDS.iter().zip(given).filter(|(_, given)| *given).map(|(name, _)| *name);
    let Some(name) = given.next() else {
        let names = FIELDS.join(", ");
        return Err(invalid_value(&path, format!("`{path}` must hold one of {names}.")));
    };
    if let Some(second) = given.next() {
        let at = path.key(second);
        let message = format!("`{at}` cannot be combined with `{}`.", path.key(name));
        return Err(ApiError::at(ErrorCode::ConflictingParameters, at, message));
    }
    let at = path.key(name);
    if let Some(json) = json {
        return read_schema(json, &at, rules).map(Structured::Json);
    }
    if let Some(texts) = choice {
        return read_choice(texts, &at, rules).map(Structured::Choice);
    }
    let source = |text: &str| match text.len() {
        0 => Err(invalid_value(&at, format!("`{at}` must not be empty."))),
        len if len > rules.max_schema_bytes => Err(too_long(&at, len, rules)),
        _ => Ok(text.to_owned()),
    };
    match (regex, grammar) {
        (Some(regex), _) => source(regex).map(Structured::Regex),
        (_, Some(grammar)) => source(grammar).map(Structured::Grammar),
        _ => Ok(Structured::JsonObject),
    }
}

/// A schema, or its text, which vLLM accepts too.
fn read_schema(value: &Value, at: &Path<'_>, rules: &Rules) -> Result<Object, ApiError> {
    let parsed: Value;
    let value = match value {
        Value::String(text) => {
            parsed = serde_json::from_str(text).map_err(|_| {
                let message = format!("`{at}` is a text that is no JSON.");
                ApiError::at(ErrorCode::InvalidJsonSchema, at, message)
            })?;
            &parsed
        }
        value => value,
    };
    let Value::Object(schema) = value else {
        return Err(invalid_type(at, "an object", value));
    };
    check_schema(value, false, at, ErrorCode::InvalidJsonSchema, rules)?;
    Ok(schema.clone())
}

fn read_choice(texts: &[Value], at: &Path<'_>, rules: &Rules) -> Result<Vec<String>, ApiError> {
    if texts.is_empty() {
        let message = format!("`{at}` must hold at least one text.");
        return Err(ApiError::at(ErrorCode::EmptyArray, at, message));
    }
    let mut choice = Vec::with_capacity(texts.len());
    for (i, value) in texts.iter().enumerate() {
        let Value::String(text) = value else {
            return Err(invalid_type(&at.index(i), "a string", value));
        };
        if text.is_empty() {
            let at = at.index(i);
            return Err(invalid_value(&at, format!("`{at}` must not be empty.")));
        }
        choice.push(text.clone());
    }
    let len = choice.iter().map(String::len).sum();
    if len > rules.max_schema_bytes { Err(too_long(at, len, rules)) } else { Ok(choice) }
}

fn too_long(at: &Path<'_>, len: usize, rules: &Rules) -> ApiError {
    let max = rules.max_schema_bytes;
    let message = format!("`{at}` has {len} bytes, but at most {max} are allowed.");
    ApiError::at(ErrorCode::SchemaTooComplex, at, message)
}
