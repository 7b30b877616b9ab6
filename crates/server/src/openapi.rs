//! `GET /openapi.json`: the requests and answers of every endpoint, for machines.
//!
//! The document is written by hand, beside readers that are too; tests hold the two together: every
//! endpoint is in it, and every field that a reader asks for.

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

const DOCUMENT: &str = include_str!("openapi.json");

pub(crate) async fn document() -> Response {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::routes::{ENDPOINTS, Methods};

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    /// Names of all properties below `value`, and of `$ref`s.
    fn collect(
        value: &Value,
        properties: &mut BTreeSet<String>,
        references: &mut BTreeSet<String>,
    ) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    if name == "properties" {
                        properties.extend(value.as_object().unwrap().keys().cloned());
                    }
                    if name == "$ref" {
                        references.insert(value.as_str().unwrap().to_owned());
                    }
                    collect(value, properties, references);
                }
            }
            Value::Array(items) => {
                items.iter().for_each(|item| collect(item, properties, references));
            }
            _ => {}
        }
    }

    #[test]
    fn every_endpoint_is_described_and_nothing_else() {
        let document = document();
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let described: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap().keys();
                methods.map(move |method| (path.clone(), method.clone()))
            })
            .collect();
        let served = ENDPOINTS.iter().map(|endpoint| {
            let method = match endpoint.methods {
                Methods::Get => "get",
                Methods::Post => "post",
            };
            (endpoint.template.to_owned(), method.to_owned())
        });
        assert_eq!(described, served.collect());
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = document();
        let (mut properties, mut references) = (BTreeSet::new(), BTreeSet::new());
        collect(&document, &mut properties, &mut references);
        for reference in references {
            let place = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(place).is_some(), "{reference}");
        }
    }

    /// Field names that the readers of the protocol crate ask for.
    fn asked_for(directory: &Path, names: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                asked_for(&path, names);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for reader in [
                "get",
                "boolean",
                "string",
                "integer",
                "number",
                "array",
                "object",
                "required",
                "required_string",
            ] {
                for place in text.split(&format!(".{reader}(\"")).skip(1) {
                    names.extend(place.split_once('"').map(|(name, _)| name.to_owned()));
                }
            }
        }
    }

    #[test]
    fn every_field_that_is_read_is_described() {
        let protocol = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/src");
        let mut read = BTreeSet::new();
        for surface in ["openai", "anthropic", "responses"] {
            asked_for(&protocol.join(surface), &mut read);
        }
        assert!(read.len() > 90, "the scan finds {} names", read.len());
        let (mut described, mut references) = (BTreeSet::new(), BTreeSet::new());
        collect(&document()["components"]["schemas"], &mut described, &mut references);
        // Refused by name.
        let refused = ["output_format", "structural_tag"];
        let missing: Vec<&String> =
            read.difference(&described).filter(|name| !refused.contains(&name.as_str())).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
