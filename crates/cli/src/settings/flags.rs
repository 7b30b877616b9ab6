//! Settings as flags and environment variables.
//!
//! Each flag is made from its [`Setting`], and what was given becomes the same TOML that a file
//! would hold: one set of types and checks judges both.

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{ENGINE, Kind, SHORT, Setting, TABLES, flag, leaked, variable};

/// What the command line and the environment set.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides {
    tables: toml::Table,
}

impl Overrides {
    /// Sets one setting, as its flag would.
    pub(crate) fn set(&mut self, table: &str, name: &str, value: impl Into<toml::Value>) {
        let table = self.tables.entry(table).or_insert_with(|| toml::Table::new().into());
        let table = table.as_table_mut().expect("every entry was made a table");
        table.insert(name.to_owned(), value.into());
    }

    /// Replaces what `file` says by what is set here.
    ///
    /// # Errors
    /// If `file` has something else than a table in the place of a table.
    pub(crate) fn lay_over(self, file: &mut toml::Table) -> Result<()> {
        for (name, settings) in self.tables {
            let place = file.entry(name.clone()).or_insert_with(|| toml::Table::new().into());
            let Some(place) = place.as_table_mut() else {
                bail!("`{name}` must be a table: write it as [{name}]");
            };
            let settings = settings.as_table().context("every entry was made a table")?;
            place.extend(settings.clone());
        }
        Ok(())
    }
}

impl clap::Args for Overrides {
    fn augment_args(command: Command) -> Command {
        let single = TABLES.iter().filter(|table| !table.repeated);
        let settings = single.flat_map(|table| table.settings.iter().map(move |one| (table, one)));
        settings.fold(command, |command, (table, setting)| {
            let about = table.about.trim_end_matches('.');
            let heading = leaked(&format!("[{}] {about}", table.name));
            command.arg(arg(setting, heading))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn is_common(setting: &Setting) -> bool {
    setting.table == ENGINE || SHORT.contains(&(setting.table, setting.name))
}

fn arg(setting: &'static Setting, heading: &'static str) -> Arg {
    let flag = leaked(&flag(setting));
    let mut about = setting.about.trim_end_matches('.').to_owned();
    let empty = |value: &toml::Value| {
        value.as_array().is_some_and(Vec::is_empty)
            || value.as_table().is_some_and(toml::Table::is_empty)
    };
    if let Some(default) = setting.default.as_ref().filter(|value| !empty(value)) {
        about += &format!(" [default: {}]", shown(default));
    }
    let arg = Arg::new(flag).long(flag).env(leaked(&variable(flag))).help(about);
    let arg = match &setting.value_name {
        Some(name) => arg.value_name(leaked(name)),
        None => arg.value_name(value_name(&setting.kind)),
    };
    let arg = match &setting.kind {
        Kind::Boolean => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_parser(clap::builder::BoolishValueParser::new().map(toml::Value::Boolean)),
        Kind::Word(words) => {
            let words = words.iter().map(|word| leaked(word));
            arg.value_parser(PossibleValuesParser::new(words).map(toml::Value::String))
        }
        Kind::List | Kind::Map => arg
            .action(ArgAction::Append)
            .value_delimiter(',')
            .value_parser(move |text: &str| read(&setting.kind, text)),
        Kind::Integer | Kind::IntegerOr(_) | Kind::Text => {
            arg.value_parser(move |text: &str| read(&setting.kind, text))
        }
    };
    if is_common(setting) { arg } else { arg.help_heading(heading).hide_short_help(true) }
}

const fn value_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Boolean => "BOOL",
        Kind::Integer => "N",
        Kind::Text | Kind::List => "TEXT",
        Kind::Word(_) => "WORD",
        Kind::IntegerOr(_) => "N|WORD",
        Kind::Map => "NAME=TEXT",
    }
}

/// A default as one would type it.
fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(","),
        toml::Value::Table(fields) => {
            let pairs = fields.iter().map(|(name, value)| format!("{name}={}", shown(value)));
            pairs.collect::<Vec<_>>().join(",")
        }
        other => other.to_string(),
    }
}

fn read(kind: &Kind, text: &str) -> Result<toml::Value, String> {
    let integer = text.replace('_', "").parse::<i64>();
    match kind {
        Kind::Integer => {
            integer.map(toml::Value::Integer).map_err(|_| "expected a whole number".to_owned())
        }
        Kind::IntegerOr(words) => match integer {
            Ok(integer) => Ok(integer.into()),
            Err(_) if words.iter().any(|word| word == text) => Ok(text.into()),
            Err(_) => Err(format!("expected a whole number or {}", words.join(" or "))),
        },
        Kind::Map => {
            let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
            let (name, value) = pair.ok_or("expected NAME=TEXT")?;
            Ok(toml::Value::Table(toml::Table::from_iter([(name.to_owned(), value.into())])))
        }
        Kind::Boolean | Kind::Text | Kind::Word(_) | Kind::List => Ok(text.into()),
    }
}

impl clap::FromArgMatches for Overrides {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut overrides = Self::default();
        overrides.update_from_arg_matches(matches)?;
        Ok(overrides)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let single = TABLES.iter().filter(|table| !table.repeated);
        for setting in single.flat_map(|table| &table.settings) {
            let flag = flag(setting);
            let given = [ValueSource::CommandLine, ValueSource::EnvVariable].map(Some);
            if !given.contains(&matches.value_source(&flag)) {
                continue;
            }
            let mut values = matches.get_many::<toml::Value>(&flag).into_iter().flatten().cloned();
            let value = match setting.kind {
                Kind::List => Some(toml::Value::Array(values.collect())),
                Kind::Map => {
                    let pairs = values.filter_map(|one| one.as_table().cloned()).flatten();
                    Some(toml::Value::Table(pairs.collect()))
                }
                _ => values.next_back(),
            };
            if let Some(value) = value {
                self.set(setting.table, setting.name, value);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        overrides: Overrides,
    }

    fn tables(args: &[&str]) -> Result<toml::Table, String> {
        let line = Line::try_parse_from(std::iter::once("fathom").chain(args.iter().copied()));
        line.map(|line| line.overrides.tables).map_err(|error| error.to_string())
    }

    #[test]
    fn a_flag_of_each_kind_becomes_the_toml_of_its_setting() {
        let args = [
            "--host",
            "::",
            "--max-num-seqs",
            "1_0",
            "--limits-clip-max-tokens",
            "--thinking-default=off",
            "--limits-default-max-tokens",
            "4096",
            "--compat-developer-role",
            "reject",
            "--served-model-name",
            "a,b",
            "--served-model-name",
            "c",
            "--models-aliases",
            "gpt-4o=a,o3=b",
        ];
        let expected = r#"
            server.host = "::"
            limits = { clip_max_tokens = true, default_max_tokens = 4096 }
            thinking.default = false
            compat.developer_role = "reject"
            models.aliases = { gpt-4o = "a", o3 = "b" }
            engine = { max_num_seqs = 10, served_model_name = ["a", "b", "c"] }
        "#;
        assert_eq!(tables(&args).unwrap(), expected.parse().unwrap());
        assert_eq!(tables(&[]).unwrap(), toml::Table::new());
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_with_its_flag() {
        for (args, expected) in [
            (["--port", "http"], "--port"),
            (["--limits-default-max-tokens", "most"], "model_max"),
            (["--compat-developer-role", "user"], "possible values: system, reject"),
            (["--models-aliases", "gpt"], "NAME=TEXT"),
        ] {
            let error = tables(&args).unwrap_err();
            assert!(error.contains(expected) && error.contains(args[0]), "{error}");
        }
    }

    #[test]
    fn a_flag_replaces_what_the_file_says_and_nothing_else() {
        let mut file: toml::Table = "[server]\nport = 1\nhost = 'a'".parse().unwrap();
        let mut overrides = Overrides::default();
        overrides.set("server", "port", 2);
        overrides.clone().lay_over(&mut file).unwrap();
        assert_eq!(file, "[server]\nport = 2\nhost = 'a'".parse().unwrap());
        let mut file: toml::Table = "server = 3".parse().unwrap();
        assert!(overrides.lay_over(&mut file).unwrap_err().to_string().contains("[server]"));
    }
}
