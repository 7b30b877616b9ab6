//! Rules about any text: length, header, names, words that must not appear.

use std::path::Path;

use super::Finding;

/// Longest source file.
const MAX_LINES: usize = 600;

/// Names that say nothing about what a module is for.
const EMPTY_NAMES: [&str; 5] = ["utils", "common", "helpers", "misc", "manager"];

/// Marks of unfinished work; written in halves so that this file does not find itself.
const UNFINISHED: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Package registries: how a machine reaches them is its owner's configuration.
const REGISTRIES: [&str; 6] = [
    concat!("crates", ".io"),
    concat!("pypi", ".org"),
    concat!("python", "hosted.org"),
    concat!("registry.npm", "js.org"),
    concat!("proxy.golang", ".org"),
    concat!("download.pytorch", ".org"),
];

/// Whether `path` is a source file that the length and header rules are about.
pub(super) fn is_source(path: &str) -> bool {
    matches!(extension(path), "rs" | "cu" | "cuh" | "py" | "sh")
}

fn extension(path: &str) -> &str {
    Path::new(path).extension().and_then(|extension| extension.to_str()).unwrap_or_default()
}

/// All rules of this module.
pub(super) fn check(path: &str, source: &str, findings: &mut Vec<Finding>) {
    if is_source(path) {
        findings.extend(too_long(path, source));
        findings.extend(empty_name(path));
    }
    findings.extend(missing_header(path, source));
    // The lock file names where each package came from; that is its purpose.
    if extension(path) != "lock" {
        findings.extend(forbidden_words(path, source));
    }
}

fn too_long(path: &str, source: &str) -> Option<Finding> {
    let n_lines = source.lines().count();
    (n_lines > MAX_LINES)
        .then(|| Finding::file(path, format!("{n_lines} lines; split it at {MAX_LINES}")))
}

fn empty_name(path: &str) -> Option<Finding> {
    let name = Path::new(path)
        .with_extension("")
        .iter()
        .filter_map(|part| part.to_str())
        .find_map(|part| EMPTY_NAMES.into_iter().find(|empty| *empty == part))?;
    Some(Finding::file(path, format!("`{name}` does not say what is in it")))
}

fn missing_header(path: &str, source: &str) -> Option<Finding> {
    let mut lines = source.lines();
    let mut first = lines.next().unwrap_or_default();
    let script = first.starts_with("#!/");
    if script {
        first = lines.next().unwrap_or_default();
    }
    let expected = match extension(path) {
        "rs" => "//! ",
        "cu" | "cuh" => "// ",
        "py" => "\"\"\"",
        "sh" => "# ",
        _ if script => "# ",
        _ => return None,
    };
    let text = first.strip_prefix(expected).map(str::trim);
    text.is_none_or(str::is_empty).then(|| {
        let message = format!("must begin with a header (`{expected}...`): what it is, what holds");
        Finding::file(path, message)
    })
}

fn forbidden_words<'a>(path: &'a str, source: &'a str) -> impl Iterator<Item = Finding> + 'a {
    source.lines().enumerate().flat_map(move |(index, line)| {
        let unfinished = UNFINISHED
            .into_iter()
            .filter(|word| has_word(line, word))
            .map(|word| format!("`{word}`: finish it, or say what holds today"));
        let registry = REGISTRIES
            .into_iter()
            .filter(|host| line.contains(host))
            .map(|host| format!("names the registry {host}"));
        unfinished
            .chain(registry)
            .map(move |message| Finding::line(path, index + 1, message))
            .collect::<Vec<_>>()
    })
}

/// Whether `word` occurs in `line` with no letter, digit or underscore around it.
pub(super) fn has_word(line: &str, word: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(joins) && !line[at + word.len()..].starts_with(joins))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(path: &str, source: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check(path, source, &mut findings);
        findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_file_of_600_lines_is_the_longest() {
        let fits = format!("//! Long.\n{}", "\n".repeat(599));
        assert_eq!(messages("a.rs", &fits), [""; 0]);
        assert_eq!(messages("a.rs", &format!("{fits}\n")), ["a.rs: 601 lines; split it at 600"]);
        assert_eq!(messages("data.json", &format!("{fits}\n")), [""; 0]);
    }

    #[test]
    fn every_kind_of_source_needs_its_header() {
        for (path, good, bad) in [
            ("a.rs", "//! What.\n", "use x;\n"),
            ("a.cu", "// What.\n", "int x;\n"),
            ("a.py", "#!/usr/bin/env python3\n\"\"\"What.\"\"\"\n", "import sys\n"),
            ("a.sh", "#!/bin/sh\n# What.\n", "#!/bin/sh\nset -e\n"),
            ("bin/run", "#!/bin/sh\n# What.\n", "#!/bin/sh\nset -e\n"),
        ] {
            assert_eq!(messages(path, good), [""; 0], "{path}");
            assert_eq!(messages(path, bad).len(), 1, "{path}");
        }
        assert_eq!(messages("a.rs", "//!\n//! Late.\n").len(), 1);
        assert_eq!(messages("notes.md", "no header needed\n"), [""; 0]);
    }

    #[test]
    fn a_module_or_folder_may_not_have_an_empty_name() {
        assert_eq!(messages("crates/x/src/utils.rs", "//! x\n").len(), 1);
        assert_eq!(messages("crates/x/src/common/mod.rs", "//! x\n").len(), 1);
        assert_eq!(messages("crates/x/src/commonplace.rs", "//! x\n"), [""; 0]);
    }

    #[test]
    fn unfinished_work_and_registries_are_found_with_their_line() {
        let source = format!("fine\n# {}: later\n", UNFINISHED[0]);
        assert!(messages("a.toml", &source)[0].starts_with("a.toml:2: "));
        let source = format!("index = \"https://{}/simple\"\n", REGISTRIES[1]);
        assert_eq!(messages("a.toml", &source).len(), 1);
        assert_eq!(messages("Cargo.lock", &source), [""; 0]);
        assert_eq!(messages("a.toml", &format!("A{}\n", UNFINISHED[0])), [""; 0]);
    }
}
