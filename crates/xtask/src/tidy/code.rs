//! Rules about Rust code, on text without comments and literals.

use super::Finding;
use super::text::has_word;

/// The crates that may contain `unsafe`: SIMD and devices, and memory-mapped files.
const UNSAFE_CRATES: [&str; 2] = ["crates/ops/", "crates/weights/"];

/// All rules of this module.
pub(super) fn check(path: &str, source: &str, findings: &mut Vec<Finding>) {
    let code = without_literals(source);
    let may_be_unsafe = UNSAFE_CRATES.iter().any(|allowed| path.starts_with(allowed));
    // A test module may have a file of its own, declared under `#[cfg(test)]`.
    let is_tests =
        path.ends_with("/tests.rs") || path.ends_with("_tests.rs") || path.contains("/tests/");
    let in_crate_source = path.contains("/src/") && !is_tests;
    let tests = test_lines(&code);
    for (index, line) in code.lines().enumerate() {
        let number = index + 1;
        if !may_be_unsafe && has_word(line, "unsafe") {
            findings.push(Finding::line(path, number, "`unsafe` belongs in ops or weights"));
        }
        if in_crate_source && !tests.contains(&index) && line.contains(".unwrap()") {
            let message = "no unwrap: use `?`, or `expect` with the invariant as its text";
            findings.push(Finding::line(path, number, message));
        }
    }
}

/// Indices of the lines from `#[cfg(test)]` on; by convention the test module ends a file.
fn test_lines(code: &str) -> std::ops::RangeFrom<usize> {
    let first = code.lines().position(|line| line.trim_start().starts_with("#[cfg(test)]"));
    first.unwrap_or(usize::MAX)..
}

/// `source` with the contents of comments, strings and character literals blanked; lines stay.
fn without_literals(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let literal = literal_len(rest, code.chars().next_back());
        if literal == 0 {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            code.extend(rest[..literal].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[literal..];
        }
    }
    code
}

/// Bytes of the comment or literal that `text` begins with, 0 if it begins with neither.
fn literal_len(text: &str, before: Option<char>) -> usize {
    let until = |end: &str, from: usize| {
        text[from..].find(end).map_or(text.len(), |at| from + at + end.len())
    };
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment_len(text);
    }
    if text.starts_with('"') {
        return quoted_len(text, '"');
    }
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if !in_word && let Some(raw) = text.strip_prefix("br").or_else(|| text.strip_prefix('r')) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let start = text.len() - raw.len() + hashes + 1;
            return until(&format!("\"{}", "#".repeat(hashes)), start);
        }
    }
    if let Some(after) = text.strip_prefix('\'') {
        // A lifetime has no closing quote right after its first character.
        let mut chars = after.chars();
        return match (chars.next(), chars.next()) {
            (Some('\\'), _) | (Some(_), Some('\'')) => quoted_len(text, '\''),
            _ => 0,
        };
    }
    0
}

/// Bytes up to and with the closing quote; `text` begins with the opening one.
fn quoted_len(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Bytes of a block comment; they nest.
fn block_comment_len(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let step = match rest {
            _ if rest.starts_with("/*") => {
                depth += 1;
                2
            }
            _ if rest.starts_with("*/") => {
                depth -= 1;
                2
            }
            _ => rest.chars().next().map_or(1, char::len_utf8),
        };
        at += step;
        if depth == 0 {
            break;
        }
    }
    at
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
    fn unsafe_is_for_ops_and_weights_only() {
        let source = "fn f() {\n    unsafe { g() }\n}\n";
        let expected = ["crates/model/src/a.rs:2: `unsafe` belongs in ops or weights"];
        assert_eq!(messages("crates/model/src/a.rs", source), expected);
        assert_eq!(messages("crates/ops/src/a.rs", source), [""; 0]);
        assert_eq!(messages("crates/weights/src/a.rs", source), [""; 0]);
        assert_eq!(messages("crates/model/src/a.rs", "#![forbid(unsafe_code)]\n"), [""; 0]);
    }

    #[test]
    fn unwrap_is_for_tests_only() {
        let call = format!("fn f() {{ x{}() }}\n", ".unwrap");
        assert_eq!(messages("crates/a/src/a.rs", &call).len(), 1);
        assert_eq!(messages("crates/a/tests/a.rs", &call), [""; 0]);
        assert_eq!(messages("crates/a/src/b/tests.rs", &call), [""; 0]);
        let in_tests = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{ {call} }}\n");
        assert_eq!(messages("crates/a/src/a.rs", &in_tests), [""; 0]);
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        for hidden in [
            "// unsafe",
            "/* a /* unsafe */ unsafe */",
            r#""say \" unsafe""#,
            r###"r#"a " unsafe "#"###,
            "b\"unsafe\"",
            "br\"\\\" ; let c = 'x'; // unsafe",
        ] {
            assert_eq!(messages("crates/a/src/a.rs", hidden), [""; 0], "{hidden}");
        }
        for shown in
            ["'\"'; unsafe {}", "&'a str; unsafe {}", "'\\''; unsafe {}", "\"\"; unsafe {}"]
        {
            assert_eq!(messages("crates/a/src/a.rs", shown).len(), 1, "{shown}");
        }
    }

    #[test]
    fn blanking_keeps_every_line_where_it_was() {
        let source = "a\n\"b\nc\"\n/* d\n*/ unsafe\n";
        assert!(messages("crates/a/src/a.rs", source)[0].starts_with("crates/a/src/a.rs:5:"));
    }
}
