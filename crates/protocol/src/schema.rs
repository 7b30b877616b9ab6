//! JSON Schema as requests carry it: is it one at all, and does it keep the rules of strict mode.
//!
//! [`check`] walks every subschema and checks the shape of each keyword it knows; unknown keywords
//! are annotations. [`check_strict`] then asks for what constrained decoding needs: closed objects
//! with every property required, and no keyword that cannot be enforced.
//!
//! Not here: compiling a schema into a grammar.

use fathom_core::json_schema::{FORMATS, LIST, NAMED, ONE};
use serde_json::Value;

use crate::json::Object;

/// Why a schema is refused; `pointer` is a JSON pointer into it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields say what and where")]
pub enum Problem {
    /// It is not a JSON Schema, or breaks a structural rule of strict mode.
    Invalid { pointer: String, what: String },
    /// Its subschemas nest too deep.
    TooDeep { pointer: String },
    /// It is legal, but holds a keyword that cannot be enforced.
    Unsupported { pointer: String, what: String },
}

const TYPES: [&str; 7] = ["object", "string", "number", "integer", "boolean", "array", "null"];
const NUMBERS: [&str; 5] =
    ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const COUNTS: [&str; 8] = [
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
];
const STRINGS: [&str; 5] = ["$ref", "pattern", "format", "title", "description"];
/// Keywords that change what is valid, and that constrained decoding does not enforce.
const NOT_ENFORCED: [&str; 23] = [
    "not",
    "if",
    "then",
    "else",
    "oneOf",
    "allOf",
    "patternProperties",
    "additionalItems",
    "contains",
    "minContains",
    "maxContains",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "unevaluatedItems",
    "uniqueItems",
    "minProperties",
    "maxProperties",
    "prefixItems",
    "$dynamicRef",
    "$recursiveRef",
];

/// Whether the top level of a schema describes objects: it says so, or says nothing about the type.
#[must_use]
pub fn describes_an_object(schema: &Object) -> bool {
    schema.get("type").is_none_or(|kind| has_type(kind, "object"))
}

fn has_type(kind: &Value, name: &str) -> bool {
    match kind {
        Value::String(one) => one == name,
        Value::Array(several) => several.iter().any(|one| one == name),
        _ => false,
    }
}

/// Checks that `schema` is a JSON Schema whose subschemas nest at most `max_depth` deep.
///
/// # Errors
/// [`Problem::Invalid`] or [`Problem::TooDeep`] at the first fault.
pub fn check(schema: &Value, max_depth: usize) -> Result<(), Problem> {
    walk(schema, "", max_depth, &mut |object, pointer| check_keywords(object, pointer))
}

/// Checks the rules of strict mode on a schema that passed [`check`].
///
/// # Errors
/// [`Problem::Invalid`] for an open object, a property that is not required or a reference that
/// leads nowhere; else [`Problem::Unsupported`] for a keyword that cannot be enforced.
pub fn check_strict(schema: &Value) -> Result<(), Problem> {
    // Two walks: a broken rule anywhere comes before an unsupported keyword anywhere.
    walk(schema, "", usize::MAX, &mut |object, pointer| check_closed(object, pointer, schema))?;
    walk(schema, "", usize::MAX, &mut check_enforceable)
}

/// Visits every subschema that is an object, parents first.
fn walk(
    schema: &Value,
    pointer: &str,
    depth_left: usize,
    visit: &mut impl FnMut(&Object, &str) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let object = match schema {
        Value::Bool(_) => return Ok(()),
        Value::Object(object) => object,
        _ => return Err(invalid(pointer, "a schema must be an object or a boolean")),
    };
    let Some(depth_left) = depth_left.checked_sub(1) else {
        return Err(Problem::TooDeep { pointer: pointer.to_owned() });
    };
    visit(object, pointer)?;
    for (keyword, value) in object {
        let at = |name: &str| format!("{pointer}/{}/{}", escape(keyword), escape(name));
        let keyword = keyword.as_str();
        match value {
            // Before draft 2020-12 `items` could also be a list.
            Value::Array(list) if LIST.contains(&keyword) || keyword == "items" => {
                for (i, one) in list.iter().enumerate() {
                    walk(one, &at(&i.to_string()), depth_left, visit)?;
                }
            }
            Value::Object(named) if NAMED.contains(&keyword) => {
                for (name, one) in named {
                    walk(one, &at(name), depth_left, visit)?;
                }
            }
            one if ONE.contains(&keyword) => {
                walk(one, &format!("{pointer}/{}", escape(keyword)), depth_left, visit)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_keywords(object: &Object, pointer: &str) -> Result<(), Problem> {
    for (keyword, value) in object {
        let keyword = keyword.as_str();
        let (ok, expected) = match keyword {
            "type" => (is_type(value), "one of the seven JSON types or an array of them"),
            "required" => (is_strings(value), "an array of strings"),
            "enum" => (value.as_array().is_some_and(|list| !list.is_empty()), "a non-empty array"),
            _ if NAMED.contains(&keyword) => (value.is_object(), "an object of schemas"),
            _ if LIST.contains(&keyword) => {
                (value.as_array().is_some_and(|list| !list.is_empty()), "a non-empty array")
            }
            _ if NUMBERS.contains(&keyword) => (is_bound(keyword, value), "a number"),
            _ if COUNTS.contains(&keyword) => (is_count(value), "a whole number, at least 0"),
            _ if STRINGS.contains(&keyword) => (value.is_string(), "a string"),
            _ => (true, ""),
        };
        if !ok {
            let at = format!("{pointer}/{}", escape(keyword));
            return Err(invalid(&at, &format!("the value must be {expected}")));
        }
    }
    Ok(())
}

fn is_type(value: &Value) -> bool {
    let known = |one: &Value| one.as_str().is_some_and(|name| TYPES.contains(&name));
    match value {
        Value::Array(several) => !several.is_empty() && several.iter().all(known),
        one => known(one),
    }
}

fn is_strings(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(Value::is_string))
}

/// In draft 4 the exclusive bounds were booleans that qualify the plain ones.
fn is_bound(keyword: &str, value: &Value) -> bool {
    match crate::fields::number(value) {
        Some(number) => keyword != "multipleOf" || number > 0.0,
        None => keyword.starts_with("exclusive") && value.is_boolean(),
    }
}

fn is_count(value: &Value) -> bool {
    crate::fields::integer(value).is_some_and(|count| count >= 0)
}

fn check_closed(object: &Object, pointer: &str, root: &Value) -> Result<(), Problem> {
    if let Some(Value::String(target)) = object.get("$ref")
        && let Some(local) = target.strip_prefix('#')
        && root.pointer(local).is_none()
    {
        return Err(invalid(pointer, "`$ref` points to nothing in the schema"));
    }
    let properties = object.get("properties").and_then(Value::as_object);
    let is_object = object.get("type").is_some_and(|kind| has_type(kind, "object"));
    if !is_object && properties.is_none() {
        return Ok(());
    }
    if object.get("additionalProperties") != Some(&Value::Bool(false)) {
        return Err(invalid(pointer, "strict mode requires `additionalProperties: false`"));
    }
    let required = object.get("required").and_then(Value::as_array);
    for name in properties.into_iter().flatten().map(|(name, _)| name) {
        if !required.is_some_and(|required| required.iter().any(|one| one == name.as_str())) {
            let at = format!("{pointer}/properties/{}", escape(name));
            return Err(invalid(&at, "strict mode requires every property in `required`"));
        }
    }
    Ok(())
}

fn check_enforceable(object: &Object, pointer: &str) -> Result<(), Problem> {
    let unsupported =
        |what: String| Err(Problem::Unsupported { pointer: pointer.to_owned(), what });
    for (keyword, value) in object {
        match (keyword.as_str(), value) {
            (name, _) if NOT_ENFORCED.contains(&name) => {
                return unsupported(format!("the keyword `{name}` cannot be enforced"));
            }
            ("format", Value::String(format)) if !FORMATS.contains(&format.as_str()) => {
                let known = FORMATS.join(", ");
                return unsupported(format!("only the formats {known} can be enforced"));
            }
            ("$ref", Value::String(target)) if !target.starts_with('#') => {
                return unsupported("only references within the schema can be followed".into());
            }
            _ => {}
        }
    }
    Ok(())
}

fn invalid(pointer: &str, what: &str) -> Problem {
    Problem::Invalid { pointer: pointer.to_owned(), what: what.to_owned() }
}

/// A name as a segment of a JSON pointer.
fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
