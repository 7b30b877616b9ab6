//! JSON Schemas on their way to the mask engine: as documents of their own, with our options.
//!
//! A document is what the engine compiles: a schema whose references can be followed inside it.
//! Parameters of a tool become documents one by one, so the schema they come from travels along
//! under a key that is no keyword, and references lead there.
//!
//! Not here: strings as plain text (`text`), and which schemas are refused (`protocol`).

use fathom_core::json_schema::{LIST, NAMED, ONE};
use serde_json::{Map, Value, json};

use super::{formats, text};

/// Between two tokens of JSON: nothing, a space, or a line break with its indent. Bounded, so that
/// a forced object ends however much the model likes white space.
const WHITESPACE: &str = r"\x20|\n[\x20\t]{0,32}";

/// Where a document keeps the schema that it is a part of. No draft knows the keyword.
const ROOT: &str = "x-fathom-root";

/// Keywords that say nothing about which values are valid.
const ANNOTATIONS: [&str; 11] = [
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$schema",
    "$id",
];

/// The schema of some JSON object.
pub(super) fn any_object() -> Value {
    json!({"type": "object"})
}

/// The schema of any value that is no string.
pub(super) fn any_but_text() -> Value {
    json!({"type": ["object", "array", "number", "boolean", "null"]})
}

/// `part` of `root` as a document; without references, only the part.
pub(super) fn document(part: &Value, root: &Value) -> Value {
    let mut document = match part {
        Value::Object(object) => object.clone(),
        Value::Bool(false) => Map::from_iter([("not".to_owned(), json!({}))]),
        _ => Map::new(),
    };
    if has_references(part) {
        let mut rebased = Value::Object(document);
        rebase(&mut rebased);
        let mut home = root.clone();
        rebase(&mut home);
        let Value::Object(mut object) = rebased else { return any_object() };
        object.insert(ROOT.to_owned(), home);
        document = object;
    }
    let mut document = Value::Object(document);
    tidy(&mut document);
    document
}

/// A document as the engine takes it.
pub(super) fn with_options(document: &Value, strict: bool) -> Value {
    let mut object = document.as_object().cloned().unwrap_or_default();
    let options = json!({"whitespace_pattern": WHITESPACE, "lenient": !strict});
    object.insert("x-guidance".to_owned(), options);
    Value::Object(object)
}

/// A document without what the engine may not be able to state. Only for schemas that need not be
/// enforced in full.
pub(super) fn relaxed(document: &Value) -> Value {
    let mut document = document.clone();
    walk(&mut document, &mut |object| {
        object.retain(|key, _| key != "pattern" && key != "patternProperties");
    });
    document
}

/// Whether a schema says something else than annotations besides `keyword`.
pub(super) fn says_only(object: &Map<String, Value>, keywords: &[&str]) -> bool {
    object.keys().all(|key| keywords.contains(&key.as_str()) || is_annotation(key))
}

fn is_annotation(key: &str) -> bool {
    ANNOTATIONS.contains(&key)
}

/// What a local reference leads to in `root`.
pub(super) fn resolve<'a>(reference: &str, root: &'a Value) -> Option<&'a Value> {
    root.pointer(reference.strip_prefix('#')?)
}

fn has_references(schema: &Value) -> bool {
    match schema {
        Value::Object(object) => object.contains_key("$ref") || object.values().any(has_references),
        Value::Array(list) => list.iter().any(has_references),
        _ => false,
    }
}

/// Calls `change` on every subschema that is an object, and on `schema` itself, parents first.
fn walk(schema: &mut Value, change: &mut impl FnMut(&mut Map<String, Value>)) {
    let Value::Object(object) = schema else { return };
    change(object);
    for (key, value) in object.iter_mut() {
        let key = key.as_str();
        match value {
            Value::Array(list) if LIST.contains(&key) || key == "items" => {
                list.iter_mut().for_each(|one| walk(one, change));
            }
            Value::Object(named) if NAMED.contains(&key) => {
                named.values_mut().for_each(|one| walk(one, change));
            }
            one if ONE.contains(&key) || key == ROOT => walk(one, change),
            _ => {}
        }
    }
}

/// Leads local references to where the root is kept.
fn rebase(schema: &mut Value) {
    walk(schema, &mut |object| {
        if let Some(Value::String(target)) = object.get_mut("$ref")
            && let Some(path) = target.strip_prefix('#')
        {
            *target = format!("#/{ROOT}{path}");
        }
    });
}

/// Drops what has no meaning for values, so that equal schemas are equal, and what clients must not
/// set; states formats as patterns.
fn tidy(schema: &mut Value) {
    walk(schema, &mut |object| {
        object.retain(|key, _| !is_annotation(key) && key != "x-guidance");
        // The engine looks for anchors at the two ends of a pattern only.
        let whole = object.get("pattern").and_then(Value::as_str).and_then(text::whole);
        if let Some(whole) = whole {
            object.insert("pattern".to_owned(), format!("^(?:{whole})$").into());
        }
        let pattern = object
            .get("format")
            .and_then(Value::as_str)
            .and_then(formats::lookup)
            .map(|pattern| format!("^(?:{pattern})$"));
        if let Some(pattern) = pattern {
            object.remove("format");
            if object.contains_key("pattern") {
                let rule = json!({"type": "string", "pattern": pattern});
                // Another type than a string has no format.
                let others = any_but_text();
                let either = json!({"anyOf": [rule, others]});
                match object.get_mut("allOf") {
                    Some(Value::Array(list)) => list.push(either),
                    _ => {
                        object.insert("allOf".to_owned(), Value::Array(vec![either]));
                    }
                }
            } else {
                object.insert("pattern".to_owned(), pattern.into());
            }
        }
    });
}
