//! The keywords of JSON Schema that hold schemas, and the formats that can be enforced.
//!
//! Whoever reads a schema (`protocol`) and whoever makes a grammar of it (`chat`) must look into the
//! same places. Not here: what keywords mean.

/// Keywords whose value is one schema.
pub const ONE: [&str; 11] = [
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "additionalItems",
    "unevaluatedProperties",
    "unevaluatedItems",
];

/// Keywords whose value is a non-empty array of schemas. `items` could be one before draft 2020-12.
pub const LIST: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];

/// Keywords whose value is an object of schemas.
pub const NAMED: [&str; 5] =
    ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];

/// The formats of strings that a grammar can enforce.
pub const FORMATS: [&str; 8] =
    ["email", "hostname", "ipv4", "ipv6", "uuid", "date", "date-time", "time"];
