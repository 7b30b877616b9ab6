//! Strings as plain text: what a parameter with `string="true"` may hold.
//!
//! The model writes string parameters raw, without quotes and escapes, so their part of a schema
//! becomes a terminal of the grammar instead of JSON. A schema is split in two: what its strings
//! look like as text, and a schema for everything else, which is written as JSON. Where the strings
//! of a schema cannot be told apart, or not be stated as a terminal, all of it is written as JSON:
//! a quoted string is a valid value too, only not the one the model prefers.

use regex_syntax::hir::{Hir, HirKind, Look};
use serde_json::{Map, Value, json};

use super::{formats, schema};

/// References followed from one schema to the next.
const MAX_HOPS: usize = 16;

/// Any text.
pub(super) const ANY: &str = "/(?s:.*)/";

/// A schema's values, by how they are written.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Split {
    /// Terminals for the text of strings: one of them matches.
    pub(super) text: Vec<String>,
    /// Schemas for what is written as JSON: one of them matches.
    pub(super) json: Vec<Value>,
}

impl Split {
    fn join(mut self, other: Self) -> Self {
        self.text.extend(other.text);
        self.json.extend(other.json);
        self
    }

    fn as_json(schema: &Value) -> Self {
        Self { text: Vec::new(), json: vec![schema.clone()] }
    }
}

/// Splits `schema`, whose references lead into `root`.
pub(super) fn split(schema: &Value, root: &Value) -> Split {
    split_within(schema, root, MAX_HOPS)
}

fn split_within(schema: &Value, root: &Value, hops: usize) -> Split {
    let any = || Split { text: vec![ANY.to_owned()], json: vec![schema::any_but_text()] };
    let object = match schema {
        Value::Bool(false) => return Split::default(),
        Value::Object(object) => object,
        _ => return any(),
    };
    let Some(hops) = hops.checked_sub(1) else { return Split::as_json(schema) };
    if schema::says_only(object, &[]) {
        return any();
    }
    if let Some(Value::String(target)) = object.get("$ref") {
        let target = schema::resolve(target, root).filter(|_| schema::says_only(object, &["$ref"]));
        return match target {
            Some(target) => split_within(target, root, hops),
            None => Split::as_json(schema),
        };
    }
    if let Some(value) = object.get("const") {
        return values(schema, object, std::slice::from_ref(value));
    }
    if let Some(Value::Array(list)) = object.get("enum") {
        return values(schema, object, list);
    }
    if let Some(Value::Array(list)) = object.get("anyOf") {
        if !schema::says_only(object, &["anyOf"]) {
            return Split::as_json(schema);
        }
        let parts = list.iter().map(|one| split_within(one, root, hops));
        return parts.fold(Split::default(), Split::join);
    }
    if let Some([only]) = object.get("allOf").and_then(Value::as_array).map(Vec::as_slice)
        && schema::says_only(object, &["allOf"])
    {
        return split_within(only, root, hops);
    }
    const OPAQUE: [&str; 7] = ["allOf", "oneOf", "not", "if", "then", "else", "$dynamicRef"];
    if OPAQUE.iter().any(|keyword| object.contains_key(*keyword)) {
        return Split::as_json(schema);
    }
    by_type(schema, object)
}

/// Strings and other values of an enumeration.
fn values(schema: &Value, object: &Map<String, Value>, list: &[Value]) -> Split {
    if !schema::says_only(object, &["const", "enum", "type"]) {
        return Split::as_json(schema);
    }
    let kinds = object.get("type").map(types);
    let allowed = |value: &&Value| {
        kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|kind| is_of_type(value, kind)))
    };
    let (texts, others): (Vec<&Value>, Vec<&Value>) =
        list.iter().filter(allowed).partition(|value| value.is_string());
    Split {
        text: texts.into_iter().filter_map(Value::as_str).map(literal).collect(),
        json: if others.is_empty() { Vec::new() } else { vec![json!({"enum": others})] },
    }
}

fn by_type(schema: &Value, object: &Map<String, Value>) -> Split {
    let named = object.get("type").map(types);
    let kinds =
        named.unwrap_or_else(|| vec!["object", "array", "number", "boolean", "null", "string"]);
    let others: Vec<&str> = kinds.iter().copied().filter(|kind| *kind != "string").collect();
    let mut split = Split::default();
    if others.len() < kinds.len() {
        match terminal(object) {
            Some(terminal) => split.text.push(terminal),
            None => return Split::as_json(schema),
        }
    }
    if !others.is_empty() {
        let mut rest = object.clone();
        rest.insert("type".to_owned(), others.into());
        split.json.push(Value::Object(rest));
    }
    split
}

fn types(kind: &Value) -> Vec<&str> {
    match kind {
        Value::String(one) => vec![one],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn is_of_type(value: &Value, kind: &str) -> bool {
    match kind {
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        _ => value.is_object(),
    }
}

/// A text as a literal of the grammar.
pub(super) fn literal(text: &str) -> String {
    // The notation's strings are JSON's, but for one character that JSON need not escape.
    Value::from(text).to_string().replace('\x7f', "\\u007f")
}

/// What a schema says about its strings, as a terminal; `None` if that cannot be stated.
fn terminal(object: &Map<String, Value>) -> Option<String> {
    let mut conditions = Vec::new();
    let length = |keyword| object.get(keyword).map(|value| value.as_f64().map(|n| n as u64));
    let (least, most) = (length("minLength"), length("maxLength"));
    if least.is_some() || most.is_some() {
        let least = least.flatten().unwrap_or(0);
        let most = most.flatten().map_or_else(String::new, |most| most.to_string());
        conditions.push(format!("/(?s:.{{{least},{most}}})/"));
    }
    if let Some(pattern) = object.get("pattern") {
        conditions.push(format!("/{}/", slashed(&whole(pattern.as_str()?)?)));
    }
    let format = object.get("format").and_then(Value::as_str).and_then(formats::lookup);
    if let Some(format) = format {
        conditions.push(format!("/{}/", slashed(&format!("(?:{format})"))));
    }
    Some(match conditions.as_slice() {
        [] => ANY.to_owned(),
        all => format!("({})", all.join(" & ")),
    })
}

/// A pattern, which may match anywhere in a text, as an expression for the whole of it. `None` if
/// it asks about what surrounds a place, other than by `^` at its beginning and `$` at its end.
pub(super) fn whole(pattern: &str) -> Option<String> {
    let pattern = llguidance::regex_to_lark(pattern, "dw");
    let hir = regex_syntax::parse(&pattern).ok()?;
    let any = regex_syntax::parse("(?s:.*)").ok()?;
    Some(anchored(&hir, &any, false)?.to_string())
}

/// An expression for the whole of a text, as the notation has it. Anchors at its ends say nothing.
///
/// # Errors
/// What is wrong with it, in the words of its parser.
pub(super) fn expression(source: &str) -> Result<String, String> {
    let source = llguidance::regex_to_lark(source, "dw");
    let hir = regex_syntax::parse(&source).map_err(|error| {
        let text = error.to_string();
        text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
    })?;
    let whole = anchored(&hir, &Hir::empty(), false);
    let whole = whole.ok_or("`^`, `$` and word boundaries are supported at the ends only")?;
    Ok(format!("/{}/", slashed(&whole.to_string())))
}

/// `hir` without the anchors at its ends, and with `any` where one is missing; `begun` if what
/// stands before it was anchored.
fn anchored(hir: &Hir, any: &Hir, begun: bool) -> Option<Hir> {
    match hir.kind() {
        HirKind::Capture(capture) => anchored(&capture.sub, any, begun),
        HirKind::Alternation(list) => {
            let list = list.iter().map(|one| anchored(one, any, begun));
            Some(Hir::alternation(list.collect::<Option<_>>()?))
        }
        HirKind::Concat(list) => anchored_list(list, any, begun),
        _ => anchored_list(std::slice::from_ref(hir), any, begun),
    }
}

fn anchored_list(list: &[Hir], any: &Hir, begun: bool) -> Option<Hir> {
    let is = |hir: &Hir, look: Look| matches!(hir.kind(), HirKind::Look(found) if *found == look);
    let (begins, list) = match list {
        [first, rest @ ..] if is(first, Look::Start) => (true, rest),
        list => (begun, list),
    };
    let (ends, list) = match list {
        [rest @ .., last] if is(last, Look::End) => (true, rest),
        list => (false, list),
    };
    let looks = |part: &Hir| !part.properties().look_set().is_empty();
    if let [before @ .., last] = list
        && !ends
        && looks(last)
        && let Some(ways) = alternatives(last)
    {
        // Each way may end, and be anchored, in its own manner: `^a$|^b`, whose beginning the parser
        // shares between the two.
        let ways = ways.iter().map(|way| {
            let parts = before.iter().chain([way]).cloned().collect();
            anchored(&Hir::concat(parts), any, begins)
        });
        return Some(Hir::alternation(ways.collect::<Option<_>>()?));
    }
    if list.iter().any(looks) {
        return None;
    }
    let mut parts = Vec::with_capacity(list.len() + 2);
    if !begins {
        parts.push(any.clone());
    }
    parts.extend_from_slice(list);
    if !ends {
        parts.push(any.clone());
    }
    Some(Hir::concat(parts))
}

/// The ways of an alternation, in a group or not.
fn alternatives(hir: &Hir) -> Option<&[Hir]> {
    match hir.kind() {
        HirKind::Capture(capture) => alternatives(&capture.sub),
        HirKind::Alternation(list) => Some(list),
        _ => None,
    }
}

/// An expression as it can stand between slashes.
fn slashed(expression: &str) -> String {
    let mut out = String::with_capacity(expression.len() + 8);
    let mut escaped = false;
    for character in expression.chars() {
        match character {
            '/' if !escaped => out.push_str("\\/"),
            '\n' => out.push_str(if escaped { "n" } else { "\\n" }),
            '\r' => out.push_str(if escaped { "r" } else { "\\r" }),
            other => out.push(other),
        }
        escaped = character == '\\' && !escaped;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_anchored_wherever_its_ways_are() {
        for (pattern, texts, others) in [
            ("^a$|^b", ["a", "bc", "b"], ["ab", "cb", ""]),
            ("^(a$|b)", ["a", "bc", "b"], ["ab", "cb", ""]),
            ("^a/b\\.[0-9]$|^\\w\\s$", ["a/b.1", "4 ", "_\n"], ["4", "a/b.12", "xa/b.1"]),
            ("a|b$", ["xay", "b", "xb"], ["bx", "", "c"]),
        ] {
            let expression = whole(pattern).unwrap_or_else(|| panic!("{pattern} cannot be stated"));
            let tries = texts.map(|text| (text, true)).into_iter();
            for (text, expected) in tries.chain(others.map(|text| (text, false))) {
                let found = matches_whole(&expression, text);
                assert_eq!(found, expected, "{pattern} as {expression}: {text:?}");
            }
        }
        assert_eq!(whole("a^b|c"), None);
    }

    /// Whether the whole of `text` matches, by a regular expression engine of its own.
    fn matches_whole(expression: &str, text: &str) -> bool {
        let schema = json!({"type": "string", "pattern": format!("^(?:{expression})$")});
        jsonschema::validator_for(&schema).unwrap().is_valid(&json!(text))
    }
}
