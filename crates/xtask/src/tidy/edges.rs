//! Which crate may depend on which: Cargo.toml files against the block in ARCHITECTURE.md.
//!
//! The block is the fenced text after the line `<!-- crate edges -->`, one crate per line:
//! `model -> core ops weights`. `any` allows everything. Only `[dependencies]` and
//! `[build-dependencies]` count: tests may look wherever they need to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, ensure};

use super::Finding;
use crate::workspace::Workspace;

const DOCUMENT: &str = "ARCHITECTURE.md";
const MARKER: &str = "<!-- crate edges -->";

/// Allowed dependencies of each crate, names without the project's prefix.
type Allowed = BTreeMap<String, BTreeSet<String>>;

/// Compares every workspace member with the block.
pub(super) fn check(workspace: &Workspace) -> Result<Vec<Finding>> {
    let read = |path: &str| {
        fs::read_to_string(workspace.root.join(path)).with_context(|| format!("reading {path}"))
    };
    let allowed = parse(&read(DOCUMENT)?)?;
    let root: toml::Table = toml::from_str(&read("Cargo.toml")?).context("parsing Cargo.toml")?;
    let members = root["workspace"]["members"].as_array().context("workspace.members")?;
    let mut findings = Vec::new();
    for member in members.iter().filter_map(toml::Value::as_str) {
        let path = format!("{member}/Cargo.toml");
        findings.extend(check_manifest(&path, &read(&path)?, &allowed)?);
    }
    Ok(findings)
}

fn parse(document: &str) -> Result<Allowed> {
    let (_, after) = document
        .split_once(MARKER)
        .with_context(|| format!("{DOCUMENT} has no line `{MARKER}`"))?;
    let block = after.split("```").nth(1).context("no fenced block follows the marker")?;
    let mut allowed = Allowed::new();
    // The first line is the fence's language.
    for line in block.lines().skip(1).filter(|line| !line.trim().is_empty()) {
        let (name, targets) =
            line.split_once("->").with_context(|| format!("no `->` in `{line}`"))?;
        let targets = targets.split_whitespace().map(str::to_owned).collect();
        let twice = allowed.insert(name.trim().to_owned(), targets).is_some();
        ensure!(!twice, "{DOCUMENT} lists `{}` twice", name.trim());
    }
    Ok(allowed)
}

fn check_manifest(path: &str, manifest: &str, allowed: &Allowed) -> Result<Vec<Finding>> {
    let manifest: toml::Table =
        toml::from_str(manifest).with_context(|| format!("parsing {path}"))?;
    let short = |name: &str| name.strip_prefix("fathom-").unwrap_or(name).to_owned();
    let name = manifest["package"]["name"].as_str().context("package.name is no string")?;
    let Some(targets) = allowed.get(&short(name)) else {
        return Ok(vec![Finding::file(path, format!("`{name}` is missing from {DOCUMENT}"))]);
    };
    if targets.contains("any") {
        return Ok(Vec::new());
    }
    Ok(dependencies(&manifest)
        .filter(|dependency| dependency.starts_with("fathom-"))
        .map(|dependency| short(&dependency))
        .filter(|dependency| !targets.contains(dependency))
        .map(|dependency| {
            let edge = format!("{} -> {dependency}", short(name));
            Finding::file(path, format!("`{edge}` is not an edge of {DOCUMENT}"))
        })
        .collect())
}

/// Names in all dependency tables but those of tests, also per target platform.
fn dependencies(manifest: &toml::Table) -> impl Iterator<Item = String> {
    let platforms = manifest.get("target").and_then(toml::Value::as_table).into_iter();
    let platforms = platforms.flat_map(toml::Table::values).filter_map(toml::Value::as_table);
    std::iter::once(manifest)
        .chain(platforms)
        .flat_map(|table| ["dependencies", "build-dependencies"].map(|key| table.get(key)))
        .filter_map(|table| table?.as_table())
        .flat_map(|table| table.keys().cloned().collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: &str =
        "text\n<!-- crate edges -->\n```text\ncore ->\nmodel -> core ops\nbenches -> any\n```\n";

    fn messages(manifest: &str) -> Vec<String> {
        let allowed = parse(BLOCK).unwrap();
        let findings = check_manifest("crates/x/Cargo.toml", manifest, &allowed).unwrap();
        findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_edge_that_is_not_in_the_block_is_found() {
        let manifest = "[package]\nname = 'fathom-model'\n[dependencies]\nfathom-core = {}\nfathom-chat = {}\nserde = '1'\n";
        let expected =
            ["crates/x/Cargo.toml: `model -> chat` is not an edge of ARCHITECTURE.md".to_owned()];
        assert_eq!(messages(manifest), expected);
    }

    #[test]
    fn platform_and_build_dependencies_count_and_those_of_tests_do_not() {
        let package = "[package]\nname = 'fathom-core'\n";
        let tests = format!("{package}[dev-dependencies]\nfathom-model = {{}}\n");
        assert_eq!(messages(&tests), [""; 0]);
        let build = format!("{package}[build-dependencies]\nfathom-model = {{}}\n");
        assert_eq!(messages(&build).len(), 1);
        let unix = format!("{package}[target.'cfg(unix)'.dependencies]\nfathom-model = {{}}\n");
        assert_eq!(messages(&unix).len(), 1);
    }

    #[test]
    fn a_crate_must_be_in_the_block_and_any_allows_everything() {
        assert_eq!(messages("[package]\nname = 'fathom-new'\n").len(), 1);
        let benches = "[package]\nname = 'fathom-benches'\n[dependencies]\nfathom-model = {}\n";
        assert_eq!(messages(benches), [""; 0]);
    }

    #[test]
    fn a_document_without_a_block_is_an_error() {
        assert!(parse("no edges here").is_err());
        assert!(parse("<!-- crate edges -->\nno fence").is_err());
        assert!(parse("<!-- crate edges -->\n```text\na -> b\na -> c\n```").is_err());
    }
}
