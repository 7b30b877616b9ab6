//! Every setting of `fathom serve`, read off the schema of the configuration types.
//!
//! A setting is defined once, as a documented field with a default: in `fathom_server::config`, or
//! in [`EngineOptions`]. Flags and variables ([`flags`]), the example file ([`example`]) and
//! `fathom config schema` are made from what is collected here, so that none can lag behind.
//!
//! Not here: what the settings mean together (`serve::config`).

mod example;
mod flags;

use std::sync::LazyLock;

use fathom_server::ServerConfig;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use crate::serve::EngineOptions;

pub(crate) use example::example;
pub(crate) use flags::Overrides;

/// The table of what concerns the model; the others are those of [`ServerConfig`].
pub(crate) const ENGINE: &str = "engine";
/// Settings whose flags do without the name of their table, besides those of `[engine]`: operators
/// type them often, and know them by these names from other servers.
const SHORT: [(&str, &str); 3] =
    [("server", "host"), ("server", "port"), ("limits", "max_model_len")];

/// A table of the configuration file.
pub(crate) struct Table {
    name: &'static str,
    about: String,
    settings: Vec<Setting>,
    /// Whether it may occur any number of times, as `[[name]]`; such tables have no flags.
    repeated: bool,
}

/// One setting.
pub(crate) struct Setting {
    table: &'static str,
    name: &'static str,
    /// Its documentation, on one line.
    about: String,
    kind: Kind,
    /// What a flag's value is called in the help.
    value_name: Option<String>,
    /// `None` if it is unset unless someone sets it.
    default: Option<toml::Value>,
    /// A value for the example file, where there is no default.
    sample: Option<toml::Value>,
    /// Whether it contradicts the other settings of the example, in which it then stays a comment.
    is_conditional: bool,
}

/// What a setting's values look like.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Boolean,
    Integer,
    Text,
    /// One of these.
    Word(Vec<String>),
    /// A number, or one of these.
    IntegerOr(Vec<String>),
    /// Texts.
    List,
    /// Names and texts.
    Map,
}

/// All tables, in the order of the example file.
static TABLES: LazyLock<Vec<Table>> = LazyLock::new(|| {
    let engine = schema::<EngineOptions>();
    let engine = table(ENGINE, &engine);
    let http = schema::<ServerConfig>();
    let http = properties(&http).map(|(name, schema)| table(leaked(name), schema));
    std::iter::once(engine).chain(http).collect()
});

/// The JSON Schema of the whole file, for editors.
pub(crate) fn file_schema() -> Value {
    let mut schema = schema::<ServerConfig>();
    schema["title"] = "Settings of fathom serve".into();
    schema["properties"][ENGINE] = self::schema::<EngineOptions>();
    schema
}

/// The name of a setting's flag, without its dashes.
fn flag(setting: &Setting) -> String {
    let Setting { table, name, .. } = setting;
    let short = *table == ENGINE || SHORT.contains(&(table, name));
    let full = if short { (*name).to_owned() } else { format!("{table}_{name}") };
    full.replace('_', "-")
}

/// The environment variable of a flag.
fn variable(flag: &str) -> String {
    format!("FATHOM_{}", flag.replace('-', "_").to_uppercase())
}

fn schema<T: JsonSchema>() -> Value {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}

/// Names live as long as the program: flags are made from them once, at its start.
fn leaked(name: &str) -> &'static str {
    Box::leak(name.to_owned().into_boxed_str())
}

fn table(name: &'static str, schema: &Value) -> Table {
    let repeated = schema["type"] == "array";
    let shape = if repeated { &schema["items"] } else { schema };
    let settings = properties(shape).map(|(field, schema)| setting(name, leaked(field), schema));
    Table { name, about: about(shape), settings: settings.collect(), repeated }
}

fn setting(table: &'static str, name: &'static str, schema: &Value) -> Setting {
    Setting {
        table,
        name,
        about: about(schema),
        kind: kind(schema),
        value_name: schema["value_name"].as_str().map(str::to_owned),
        default: as_toml(&schema["default"]),
        sample: as_toml(&schema["examples"][0]),
        is_conditional: schema["conditional"] == true,
    }
}

fn about(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn kind(schema: &Value) -> Kind {
    let alternatives = ["anyOf", "oneOf"].iter().find_map(|key| schema[*key].as_array());
    let alternatives = alternatives.map_or(std::slice::from_ref(schema), Vec::as_slice);
    let is = |name: &str| {
        let mut types = alternatives.iter().map(|one| &one["type"]);
        types.any(|given| {
            given == name || given.as_array().is_some_and(|all| all.iter().any(|one| one == name))
        })
    };
    let words = alternatives.iter().flat_map(|one| {
        let listed = one["enum"].as_array().map_or(&[][..], Vec::as_slice);
        listed.iter().chain(one.get("const")).filter_map(Value::as_str).map(str::to_owned)
    });
    let words: Vec<String> = words.collect();
    match words {
        words if is("integer") && !words.is_empty() => Kind::IntegerOr(words),
        _ if is("integer") => Kind::Integer,
        words if !words.is_empty() => Kind::Word(words),
        _ if is("boolean") => Kind::Boolean,
        _ if is("array") => Kind::List,
        _ if is("object") => Kind::Map,
        _ => Kind::Text,
    }
}

fn as_toml(value: &Value) -> Option<toml::Value> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match number.as_i64() {
            Some(integer) => integer.into(),
            None => number.as_f64()?.into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => toml::Value::Array(items.iter().filter_map(as_toml).collect()),
        Value::Object(fields) => {
            let fields = fields.iter().filter_map(|(name, v)| Some((name.clone(), as_toml(v)?)));
            toml::Value::Table(fields.collect())
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_setting_is_documented_and_has_a_default_or_a_sample() {
        for setting in TABLES.iter().flat_map(|table| &table.settings) {
            let place = format!("[{}] {}", setting.table, setting.name);
            assert!(setting.about.ends_with('.'), "{place} has no documentation");
            let shown = setting.default.is_some() || setting.sample.is_some();
            assert!(shown, "{place} has neither a default nor #[schemars(example = ...)]");
        }
    }

    #[test]
    fn no_two_settings_have_one_flag() {
        let single = || TABLES.iter().filter(|table| !table.repeated);
        let flags: Vec<String> = single().flat_map(|table| &table.settings).map(flag).collect();
        let different: BTreeSet<&String> = flags.iter().collect();
        assert_eq!(different.len(), flags.len(), "{flags:?}");
        assert!(flags.iter().all(|flag| !["config", "api-key", "help"].contains(&flag.as_str())));
    }
}
