//! The example file: every setting with its documentation and its default, commented out.
//!
//! Prose begins with `# `, a setting with `#` and no space. The file in the repository is compared
//! with what is written here, and what is written here with the defaults.

use std::fmt::Write;

use super::{Kind, Setting, TABLES, Table, flag, variable};

const HEAD: &str = "\
# Settings of `fathom serve --config FILE`: all there are, with their defaults.
#
# Written by `fathom config example`. Remove the `#` before a setting to change it. Each can also be
# given as a flag or as an environment variable, named below its description: a flag wins over a
# variable, and a variable over the file. `fathom config check FILE` says what is wrong with a file.
";

/// Longest line of prose.
const WIDTH: usize = 100;

/// The text of the file.
pub(crate) fn example() -> String {
    let mut text = HEAD.to_owned();
    for table in TABLES.iter() {
        write_table(&mut text, table);
    }
    text
}

fn write_table(text: &mut String, table: &Table) {
    text.push('\n');
    write_prose(text, &table.about);
    if table.repeated {
        write_prose(text, "The next line and what follows may be repeated.");
        line(text, &format!("#[[{}]]", table.name));
    } else {
        line(text, &format!("[{}]", table.name));
    }
    for setting in &table.settings {
        text.push('\n');
        write_setting(text, setting, table.repeated);
    }
}

fn write_setting(text: &mut String, setting: &Setting, repeated: bool) {
    write_prose(text, &setting.about);
    if !repeated {
        let flag = flag(setting);
        line(text, &format!("# --{flag}, {}", variable(&flag)));
    }
    let value = setting.sample.as_ref().or(setting.default.as_ref());
    let value = value.map(ToString::to_string).unwrap_or_default();
    if let Kind::Word(words) = &setting.kind {
        line(text, &format!("# One of {}.", words.join(", ")));
    }
    if setting.default.is_none() {
        line(text, "# Unset by default; for example:");
    }
    let mark = if setting.is_conditional { "# " } else { "#" };
    line(text, &format!("{mark}{} = {value}", setting.name));
}

fn write_prose(text: &mut String, prose: &str) {
    let mut begun = 0;
    for word in prose.split(' ') {
        if begun > 0 && begun + 1 + word.len() > WIDTH {
            text.push('\n');
            begun = 0;
        }
        let separator = if begun == 0 { "# " } else { " " };
        text.push_str(separator);
        text.push_str(word);
        begun += separator.len() + word.len();
    }
    text.push('\n');
}

fn line(text: &mut String, line: &str) {
    writeln!(text, "{line}").expect("a String takes all writes");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::{EngineOptions, ServeConfig};

    /// The example with every setting in force.
    fn uncommented() -> String {
        let lines = example();
        let lines = lines.lines().map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with(' ') => setting,
            _ => line,
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_example_in_the_repository_is_what_the_program_prints() {
        let file = include_str!("../../../../fathom.example.toml");
        assert!(file == example(), "write it again: fathom config example > fathom.example.toml");
    }

    #[test]
    fn the_example_changes_nothing_and_every_line_of_it_may_be_uncommented() {
        let as_it_is: toml::Table = example().parse().unwrap();
        assert!(as_it_is.values().all(|table| table.as_table().is_some_and(toml::Table::is_empty)));
        ServeConfig::check_file(&example()).unwrap();
        ServeConfig::check_file(&uncommented()).unwrap();
    }

    #[test]
    fn the_values_shown_are_the_defaults() {
        let tables: toml::Table = uncommented().parse().unwrap();
        let shown: EngineOptions = tables["engine"].clone().try_into().unwrap();
        assert_eq!(shown.max_num_seqs, EngineOptions::default().max_num_seqs);
        for table in TABLES.iter().filter(|table| !table.repeated) {
            for setting in &table.settings {
                if let Some(default) = &setting.default {
                    assert_eq!(&tables[table.name][setting.name], default, "{}", setting.name);
                }
            }
        }
    }
}
