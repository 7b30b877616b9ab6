//! Which JSON Schemas are schemas, and which strict mode accepts.

use fathom_protocol::schema::{Problem, check, check_strict};
use serde_json::{Value, json};

fn pointer(result: Result<(), Problem>) -> String {
    match result {
        Err(
            Problem::Invalid { pointer, .. }
            | Problem::TooDeep { pointer }
            | Problem::Unsupported { pointer, .. },
        ) => pointer,
        Ok(()) => "accepted".into(),
    }
}

#[test]
fn each_malformed_keyword_is_found_where_it_is() {
    for (schema, at) in [
        (json!(5), ""),
        (json!({"type": "banana"}), "/type"),
        (json!({"type": []}), "/type"),
        (json!({"properties": {"a/b": {"type": 1}}}), "/properties/a~1b/type"),
        (json!({"properties": []}), "/properties"),
        (json!({"items": {"minItems": -1}}), "/items/minItems"),
        (json!({"anyOf": []}), "/anyOf"),
        (json!({"anyOf": [true, {"enum": 3}]}), "/anyOf/1/enum"),
        (json!({"required": "a"}), "/required"),
        (json!({"multipleOf": 0}), "/multipleOf"),
        (json!({"additionalProperties": 1}), "/additionalProperties"),
    ] {
        assert_eq!(pointer(check(&schema, 32)), at, "{schema}");
    }
}

#[test]
fn ordinary_schemas_are_accepted() {
    for schema in [
        json!({}),
        json!(true),
        json!({"type": ["string", "null"], "title": "T", "x-vendor": [1]}),
        json!({"type": "array", "items": [{"type": "string"}], "additionalItems": false}),
        json!({"minimum": 1, "exclusiveMinimum": true}),
        json!({"$defs": {"n": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/n"}}}),
    ] {
        assert_eq!(check(&schema, 32), Ok(()), "{schema}");
    }
}

#[test]
fn nesting_is_bounded() {
    let nested = |depth: usize| {
        (1..depth).fold(json!({}), |inner, _| json!({"type": "array", "items": inner}))
    };
    assert_eq!(check(&nested(32), 32), Ok(()));
    assert!(matches!(check(&nested(33), 32), Err(Problem::TooDeep { .. })));
}

fn closed(properties: Value) -> Value {
    let required: Vec<_> = properties.as_object().unwrap().keys().cloned().collect();
    json!({"type": "object", "properties": properties, "required": required,
           "additionalProperties": false})
}

#[test]
fn strict_mode_wants_closed_objects_at_every_level() {
    let inner_open = closed(json!({"a": {"type": "array", "items": {"type": "object"}}}));
    assert_eq!(pointer(check_strict(&inner_open)), "/properties/a/items");
    let mut optional = closed(json!({"a": {}, "b": {}}));
    optional["required"] = json!(["a"]);
    assert_eq!(pointer(check_strict(&optional)), "/properties/b");
    let dangling = closed(json!({"a": {"$ref": "#/$defs/none"}}));
    assert_eq!(pointer(check_strict(&dangling)), "/properties/a");
    let fine = closed(json!({"a": {"anyOf": [{"type": "null"}, closed(json!({}))]},
                             "b": {"type": "string", "format": "uuid", "pattern": "x"}}));
    assert_eq!(check_strict(&fine), Ok(()));
}

#[test]
fn a_broken_rule_is_reported_before_an_unsupported_keyword() {
    let both = closed(json!({"a": {"not": {}}, "b": {"type": "object"}}));
    assert!(matches!(check_strict(&both), Err(Problem::Invalid { .. })));
    let unsupported = closed(json!({"a": {"not": {}}}));
    assert!(matches!(check_strict(&unsupported), Err(Problem::Unsupported { .. })));
    let format = closed(json!({"a": {"format": "color"}}));
    assert!(matches!(check_strict(&format), Err(Problem::Unsupported { .. })));
}
