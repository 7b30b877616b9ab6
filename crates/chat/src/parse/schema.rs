//! What the parser needs to know about the tools on offer: names of parameters and their types.
//!
//! Not here: checking whole schemas (`grammar`, the server).

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};

/// The tools a request offers. Clones share one copy.
#[derive(Debug, Clone, Default)]
pub struct ToolSet {
    tools: Arc<HashMap<String, Parameters>>,
}

/// The parameters one tool declares.
#[derive(Debug, Default)]
pub(super) struct Parameters {
    types: HashMap<String, Types>,
}

impl ToolSet {
    /// Reads the client's `function` objects. What is missing or malformed in them counts as not
    /// declared.
    pub fn from_functions(functions: &[Value]) -> Self {
        let tools = functions.iter().filter_map(|function| {
            let name = function.get("name")?.as_str()?.to_owned();
            Some((name, Parameters::from_schema(function.get("parameters"))))
        });
        Self { tools: Arc::new(tools.collect()) }
    }

    pub(super) fn parameters(&self, tool: &str) -> Option<&Parameters> {
        self.tools.get(tool)
    }
}

impl Parameters {
    fn from_schema(schema: Option<&Value>) -> Self {
        let properties = schema.and_then(|schema| schema.get("properties"));
        let types = properties
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(name, schema)| (name.clone(), Types::of_schema(schema)))
            .collect();
        Self { types }
    }

    pub(super) fn declares(&self, name: &str) -> bool {
        self.types.contains_key(name)
    }

    /// The types a parameter may have; all if it is not declared.
    pub(super) fn types(&self, name: &str) -> Types {
        self.types.get(name).copied().unwrap_or(Types::ALL)
    }

    /// Whether every key of `object` is declared.
    pub(super) fn fits(&self, object: &Map<String, Value>) -> bool {
        object.keys().all(|key| self.declares(key))
    }
}

/// A set of JSON types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Types(u8);

impl Types {
    const NULL: Self = Self(1);
    const BOOLEAN: Self = Self(1 << 1);
    const INTEGER: Self = Self(1 << 2);
    /// Every integer is a number too.
    const NUMBER: Self = Self(1 << 2 | 1 << 3);
    const STRING: Self = Self(1 << 4);
    const ARRAY: Self = Self(1 << 5);
    const OBJECT: Self = Self(1 << 6);
    const NONE: Self = Self(0);
    const ALL: Self = Self(0x7f);

    fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn of_schema(schema: &Value) -> Self {
        let named = match schema.get("type") {
            Some(Value::String(name)) => Some(Self::named(name)),
            Some(Value::Array(names)) => Some(
                names
                    .iter()
                    .filter_map(Value::as_str)
                    .map(Self::named)
                    .fold(Self::NONE, Self::union),
            ),
            _ => None,
        };
        let values = schema
            .get("enum")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
            .or_else(|| schema.get("const").map(std::slice::from_ref))
            .map(|values| values.iter().map(Self::of_value).fold(Self::NONE, Self::union));
        let choices = ["anyOf", "oneOf"]
            .iter()
            .find_map(|key| schema.get(*key)?.as_array())
            .map(|choices| choices.iter().map(Self::of_schema).fold(Self::NONE, Self::union));
        // What says nothing about its type may have any.
        named.or(values).or(choices).unwrap_or(Self::ALL)
    }

    fn named(name: &str) -> Self {
        match name {
            "null" => Self::NULL,
            "boolean" => Self::BOOLEAN,
            "integer" => Self::INTEGER,
            "number" => Self::NUMBER,
            "string" => Self::STRING,
            "array" => Self::ARRAY,
            "object" => Self::OBJECT,
            _ => Self::ALL,
        }
    }

    fn of_value(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(number) if number.as_str().contains(['.', 'e', 'E']) => Self(1 << 3),
            Value::Number(_) => Self::INTEGER,
            Value::String(_) => Self::STRING,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
        }
    }

    /// Whether `value` has one of these types.
    pub(super) fn admit(self, value: &Value) -> bool {
        self.0 & Self::of_value(value).0 != 0
    }

    /// Whether a string has one of these types.
    pub(super) fn admit_text(self) -> bool {
        self.0 & Self::STRING.0 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn types(schema: Value) -> Types {
        let function = json!({"name": "f", "parameters": {"properties": {"p": schema}}});
        let tools = ToolSet::from_functions(&[function]);
        tools.parameters("f").unwrap().types("p")
    }

    #[test]
    fn types_come_from_type_or_else_from_values_or_choices() {
        assert_eq!(types(json!({"type": "integer"})), Types::INTEGER);
        assert_eq!(types(json!({"type": ["string", "null"]})), Types::STRING.union(Types::NULL));
        assert_eq!(types(json!({"enum": ["a", 1]})), Types::STRING.union(Types::INTEGER));
        assert_eq!(types(json!({"const": true})), Types::BOOLEAN);
        assert_eq!(
            types(json!({"anyOf": [{"type": "array"}, {"type": "object"}]})),
            Types::ARRAY.union(Types::OBJECT)
        );
        assert_eq!(types(json!({"description": "anything"})), Types::ALL);
    }

    #[test]
    fn a_number_admits_integers_but_an_integer_admits_no_fraction() {
        assert!(Types::NUMBER.admit(&json!(1)) && Types::NUMBER.admit(&json!(1.5)));
        assert!(Types::INTEGER.admit(&json!(1)) && !Types::INTEGER.admit(&json!(1.5)));
    }

    #[test]
    fn a_malformed_function_declares_nothing() {
        let functions = [json!({"name": 5}), json!({"name": "f"}), json!("g")];
        let tools = ToolSet::from_functions(&functions);
        assert!(tools.parameters("f").is_some_and(|parameters| !parameters.declares("p")));
        assert!(tools.parameters("g").is_none());
    }
}
