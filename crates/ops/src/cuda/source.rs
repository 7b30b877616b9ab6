//! Kernel sources: the embedded ones, and one text per kernel file with its headers in place.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The text of the embedded source `path`.
#[must_use]
pub fn embedded(path: &str) -> Option<String> {
    SOURCES.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).to_owned())
}

/// Every kernel file with the architectures it is compiled for.
pub fn files() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    FILES.iter().map(|&(path, archs, _)| (path, archs))
}

/// The file that kernel `entry` is in.
pub(crate) fn file_of(entry: &str) -> Option<&'static str> {
    ENTRIES.iter().find(|(name, _)| *name == entry).map(|(_, path)| *path)
}

/// Whether kernel `entry` waits by itself for the launch before it (`dependent` in the manifest).
pub(crate) fn is_dependent(entry: &str) -> bool {
    DEPENDENT.contains(&entry)
}

/// `path` with every `#include "..."` replaced by the file's text, each file once; the host bodies
/// are left out. `read` returns a file by its path under `kernels/`.
///
/// # Errors
/// The path that `read` does not know.
pub fn flatten(path: &str, read: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    append(path, read, &mut Vec::new(), &mut out)?;
    Ok(out)
}

fn append(
    path: &str,
    read: &dyn Fn(&str) -> Option<String>,
    seen: &mut Vec<String>,
    out: &mut String,
) -> Result<(), String> {
    if seen.iter().any(|known| known == path) || path.ends_with("/host.cuh") {
        return Ok(());
    }
    seen.push(path.to_owned());
    let text = read(path).ok_or_else(|| path.to_owned())?;
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    *out += &format!("#line 1 \"{path}\"\n");
    for (index, line) in text.lines().enumerate() {
        let included = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        if let Some(name) = included {
            let target = match name.strip_prefix("../") {
                Some(name) => name.to_owned(),
                None => format!("{folder}/{name}"),
            };
            append(&target, read, seen, out)?;
            *out += &format!("#line {} \"{path}\"\n", index + 2);
        } else if line != "#pragma once" {
            *out += line;
            out.push('\n');
        } else {
            out.push('\n');
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_of_the_manifest_is_in_its_file_and_flattens() {
        assert!(!ENTRIES.is_empty());
        for (entry, path) in ENTRIES {
            let text = flatten(path, &embedded).unwrap();
            assert!(text.contains(entry), "{entry} is not in {path}");
            assert!(!text.contains("#include"), "{path}");
            assert_eq!(text.matches("\ntypedef unsigned char u8;").count(), 1, "{path}");
        }
    }

    #[test]
    fn kernel_files_hold_no_asm_and_no_shared_declarations() {
        for (path, text) in SOURCES.iter().filter(|(path, _)| path.ends_with(".cu")) {
            for word in ["asm", "__shared__", "__shfl", "__syncthreads", "#include <"] {
                assert!(!text.contains(word), "{path} uses {word}: take a wrapper of include/");
            }
        }
    }

    #[test]
    fn an_unknown_header_is_named() {
        let read = |path: &str| (path == "a/x.cu").then(|| "#include \"../b.cuh\"\n".to_owned());
        assert_eq!(flatten("a/x.cu", &read), Err("b.cuh".to_owned()));
    }
}
