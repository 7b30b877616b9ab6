//! Embeds the kernel sources and, where `FATHOM_KERNEL_PACK` names one, the precompiled pack.
//!
//! No compiler runs here: a developer never waits for one. Release builds set the variable to what
//! `cargo xtask kernels` wrote.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env("CARGO_MANIFEST_DIR")?).join("../../kernels").canonicalize()?;
    println!("cargo::rerun-if-changed={}", root.display());
    println!("cargo::rerun-if-env-changed=FATHOM_KERNEL_PACK");
    let manifest: toml::Table = fs::read_to_string(root.join("MANIFEST.toml"))?.parse()?;
    let files = manifest.get("file").and_then(toml::Value::as_array).ok_or("no [[file]]")?;

    let default_archs = manifest.get("defaults").and_then(|table| table.get("archs"));
    let mut sources = String::new();
    let mut entries = String::new();
    let mut tables = String::new();
    let mut dependent = Vec::new();
    for header in fs::read_dir(root.join("include"))? {
        let name = format!("include/{}", header?.file_name().to_string_lossy());
        embed(&mut sources, &root, &name)?;
    }
    for file in files {
        let path = file.get("path").and_then(toml::Value::as_str).ok_or("a file without a path")?;
        embed(&mut sources, &root, path)?;
        let names = file.get("entries").and_then(toml::Value::as_array).ok_or("no entries")?;
        for entry in names.iter().filter_map(toml::Value::as_str) {
            writeln!(entries, "    ({entry:?}, {path:?}),")?;
            if file.get("dependent").is_some() {
                dependent.push(entry);
            }
        }
        let archs = file.get("archs").or(default_archs).ok_or("no archs, and no default")?;
        writeln!(tables, "    ({path:?}, &{}, &{}),", list(archs), list(&file["entries"]))?;
    }
    let pack = match env("FATHOM_KERNEL_PACK") {
        Ok(path) if !path.is_empty() => {
            println!("cargo::rerun-if-changed={path}");
            format!("include_bytes!({:?})", Path::new(&path).canonicalize()?)
        }
        _ => "&[]".to_owned(),
    };
    let text = format!(
        "/// Every kernel source and header: path, text.\n\
         pub(crate) static SOURCES: &[(&str, &str)] = &[\n{sources}];\n\
         /// Every entry point and the file it is in.\n\
         pub(crate) static ENTRIES: &[(&str, &str)] = &[\n{entries}];\n\
         /// Every kernel file: path, architectures, entry points.\n\
         pub(crate) static FILES: &[(&str, &[&str], &[&str])] = &[\n{tables}];\n\
         /// Entry points of the files that are `dependent`.\n\
         pub(crate) static DEPENDENT: &[&str] = &{dependent:?};\n\
         /// The precompiled pack; empty where none was given.\n\
         pub(crate) static PACK: &[u8] = {pack};\n"
    );
    fs::write(PathBuf::from(env("OUT_DIR")?).join("kernels.rs"), text)?;
    Ok(())
}

/// A list of strings as Rust writes it.
fn list(values: &toml::Value) -> String {
    let strings = values.as_array().into_iter().flatten().filter_map(toml::Value::as_str);
    format!("{:?}", strings.collect::<Vec<_>>())
}

fn embed(sources: &mut String, root: &Path, name: &str) -> Result<(), Box<dyn Error>> {
    writeln!(sources, "    ({name:?}, include_str!({:?})),", root.join(name))?;
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "cargo hands over its values so")]
fn env(name: &str) -> Result<String, std::env::VarError> {
    std::env::var(name)
}
