//! Every target over its corpus, and over mutations of it that are the same in every run.
//!
//! `FATHOM_FUZZ_MUTATIONS` and `FATHOM_FUZZ_SEED` ask for more of them, and for others: fuzzing
//! without coverage, for who has no nightly compiler.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};

use fathom_fuzz::{TARGETS, Target};

/// Mutations per target; of grammars, which are compiled; and of streams, whose every input is two
/// dozen requests.
const MUTATIONS: usize = 1500;
const GRAMMAR_MUTATIONS: usize = 300;
const STREAM_MUTATIONS: usize = 20;
/// What mutations put in: pieces that matter to a parser somewhere.
const PIECES: [&[u8]; 16] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b":",
    b"null",
    b"-1",
    b"1e999",
    b"\\ud800",
    b"\xff",
    b"\0",
    b"true",
    b"\n[",
    "｜DSML｜".as_bytes(),
    b"\"stream\":true,",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Contents of all files of a folder, in the order of their names.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// A corpus, with what the tree holds of that kind anyway.
fn seeds(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut seeds = files(&root().join("corpus").join(name));
    let models = root().join("../../models");
    match name {
        "config_json" => {
            for model in ["flash", "nano", "pro"] {
                let path = models.join(model).join("config.json");
                seeds.extend(fs::read(&path).ok().map(|bytes| (path, bytes)));
            }
        }
        "safetensors_header" => {
            let path = models.join("nano/model-00003-of-00003.safetensors");
            let bytes = fs::read(&path).unwrap();
            seeds.push((path, bytes[..bytes.len().min(64 * 1024)].to_vec()));
        }
        _ => {}
    }
    seeds
}

struct Chance(u64);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (self.0 >> 33) as usize % n.max(1)
    }
}

/// One to four changes: a flipped bit, a lost range, a repeated range, a piece, another seed's end.
fn mutated(seeds: &[(PathBuf, Vec<u8>)], chance: &mut Chance) -> Vec<u8> {
    let mut bytes = seeds[chance.below(seeds.len())].1.clone();
    for _ in 0..=chance.below(4) {
        let at = chance.below(bytes.len() + 1);
        let end = (at + chance.below(24)).min(bytes.len());
        match chance.below(5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << chance.below(8),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let range = bytes[at..end].to_vec();
                bytes.splice(at..at, range);
            }
            3 => drop(bytes.splice(at..at, PIECES[chance.below(PIECES.len())].iter().copied())),
            _ => {
                let other = &seeds[chance.below(seeds.len())].1;
                bytes.truncate(at);
                bytes.extend_from_slice(&other[chance.below(other.len())..]);
            }
        }
    }
    bytes
}

fn run(name: &str) {
    let (_, target): (_, Target) = *TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "no seeds for {name}");
    for (path, bytes) in &seeds {
        let held = std::panic::catch_unwind(|| target(bytes));
        assert!(held.is_ok(), "{} breaks {name}", path.display());
    }
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let from_outside = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let mut chance = Chance(from_outside("FATHOM_FUZZ_SEED").unwrap_or(42));
    let n_mutations = match name {
        "grammar" => GRAMMAR_MUTATIONS,
        "stream_disconnects" => STREAM_MUTATIONS,
        _ => MUTATIONS,
    };
    let n_mutations = from_outside("FATHOM_FUZZ_MUTATIONS").map_or(n_mutations, |n| n as usize);
    for i in 0..n_mutations {
        let bytes = mutated(&seeds, &mut chance);
        let held = std::panic::catch_unwind(|| target(&bytes));
        assert!(held.is_ok(), "mutation {i} breaks {name}: {:?}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn config_json() {
    run("config_json");
}

#[test]
fn grammar() {
    run("grammar");
}

#[test]
fn output_parser() {
    run("output_parser");
}

#[test]
fn request_body() {
    run("request_body");
}

#[test]
fn safetensors_header() {
    run("safetensors_header");
}

#[test]
fn server_config() {
    run("server_config");
}

#[test]
fn stream_disconnects() {
    run("stream_disconnects");
}

#[test]
fn every_target_has_its_corpus_its_test_and_its_binary() {
    let tests = include_str!("corpus.rs");
    let manifest = include_str!("../libfuzzer/Cargo.toml");
    for (name, _) in TARGETS {
        assert!(root().join("corpus").join(name).is_dir(), "no corpus for {name}");
        assert!(tests.contains(&format!("fn {name}() {{")), "no test for {name}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "no binary for {name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
}
