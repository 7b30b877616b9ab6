//! The file of remembered answers: through restarts, damage, other users and its limit.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use fathom_core::TokenId;

use super::*;

const LIMIT: usize = 64 << 10;

fn ids(n: u32) -> Arc<[TokenId]> {
    (n..n + 100).collect()
}

fn known(memory: &AnswerMemory) -> Vec<u32> {
    let mut entries = memory.entries();
    (0..1000).filter(|&n| entries.get(Key(n.into())) == Some(ids(n))).collect()
}

/// A file with the answers 0 to 9, closed again.
fn written(directory: &Path) {
    let memory = AnswerMemory::open(LIMIT, Some(directory));
    (0..10).for_each(|n| memory.remember(Key(n.into()), ids(n)));
}

#[test]
fn answers_are_known_after_a_restart_under_the_same_seed() {
    let root = tempfile::tempdir().unwrap();
    written(root.path());
    let memory = AnswerMemory::open(LIMIT, Some(root.path()));
    assert_eq!(known(&memory), (0..10).collect::<Vec<_>>());
    let seed = memory.seed;
    drop(memory);
    assert_eq!(AnswerMemory::open(LIMIT, Some(root.path())).seed, seed);
}

#[test]
fn whatever_is_damaged_the_rest_is_kept_and_nothing_wrong_is_believed() {
    type Damage = fn(&mut Vec<u8>);
    let all = || (0..10).collect::<Vec<u32>>();
    let without = |n: u32| (0..10).filter(|&m| m != n).collect::<Vec<u32>>();
    const RECORD: usize = 4 + 16 + 400 + 8;
    let cases: [(&str, Damage, Vec<u32>); 7] = [
        ("a flipped bit in the ids of answer 3", |f| f[24 + 3 * RECORD + 100] ^= 1, without(3)),
        ("a flipped bit in the key of answer 3", |f| f[24 + 3 * RECORD + 6] ^= 1, without(3)),
        ("an absurd length of answer 3", |f| f[24 + 3 * RECORD + 3] = 0xff, vec![0, 1, 2]),
        ("a record that was cut", |f| f.truncate(f.len() - 5), without(9)),
        ("an unfinished length", |f| f.extend([1, 2]), all()),
        ("another version", |f| f[7] = b'0', vec![]),
        ("a header that was cut", |f| f.truncate(10), vec![]),
    ];
    for (name, damage, expected) in cases {
        let root = tempfile::tempdir().unwrap();
        written(root.path());
        let path = root.path().join("answers.log");
        let mut file = fs::read(&path).unwrap();
        damage(&mut file);
        fs::write(&path, file).unwrap();
        let memory = AnswerMemory::open(LIMIT, Some(root.path()));
        assert_eq!(known(&memory), expected, "{name}");
        // It goes on with a whole file.
        memory.remember(Key(500), ids(500));
        drop(memory);
        let again = known(&AnswerMemory::open(LIMIT, Some(root.path())));
        assert_eq!(again, [&expected[..], &[500]].concat(), "{name}");
    }
}

#[test]
fn the_file_stays_within_twice_the_memory_and_keeps_the_latest() {
    let root = tempfile::tempdir().unwrap();
    let memory = AnswerMemory::open(LIMIT, Some(root.path()));
    for n in 0..1000 {
        memory.remember(Key(n.into()), ids(n));
    }
    let expected = known(&memory);
    assert!(expected.len() > 50 && expected.ends_with(&[998, 999]), "{expected:?}");
    drop(memory);
    let bytes = fs::metadata(root.path().join("answers.log")).unwrap().len();
    assert!(bytes <= 2 * LIMIT as u64 + 24, "{bytes}");
    assert_eq!(known(&AnswerMemory::open(LIMIT, Some(root.path()))), expected);
}

#[test]
fn a_second_user_of_a_directory_remembers_in_memory_only() {
    let root = tempfile::tempdir().unwrap();
    let first = AnswerMemory::open(LIMIT, Some(root.path()));
    let second = AnswerMemory::open(LIMIT, Some(root.path()));
    second.remember(Key(1), ids(1));
    assert_eq!(known(&second), [1]);
    first.remember(Key(2), ids(2));
    drop((first, second));
    assert_eq!(known(&AnswerMemory::open(LIMIT, Some(root.path()))), [2]);
}

#[test]
fn a_directory_that_cannot_be_made_costs_nothing_but_the_file() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    let memory = AnswerMemory::open(LIMIT, Some(&file));
    memory.remember(Key(1), ids(1));
    assert_eq!(known(&memory), [1]);
}
