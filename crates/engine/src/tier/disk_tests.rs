//! What the disk tier does with crashes, damage, foreign files and full disks.

use proptest::prelude::*;

use super::*;

const NAMESPACE: Namespace = Namespace { hash: 0xabc, block_bytes: 20, snapshot_bytes: 50 };
const BLOCK_FILE: u64 = (HEADER_BYTES + 20) as u64;

fn open(root: &Path) -> DiskStore {
    open_with(root, NAMESPACE, 1 << 20, write_file)
}

fn open_with(root: &Path, namespace: Namespace, limit: u64, write: WriteFile) -> DiskStore {
    DiskStore::open(CacheDirectory::open(root).unwrap(), namespace, limit, write).unwrap()
}

fn block(key: u128) -> StateKey {
    StateKey { kind: StateKind::Block, key: BlockKey(key) }
}

fn content(key: u128) -> Vec<u8> {
    (0..20).map(|i| (key as u8).wrapping_mul(31) ^ i).collect()
}

fn put(store: &mut DiskStore, key: u128) -> Vec<StateKey> {
    let mut evicted = Vec::new();
    assert!(store.put(block(key), &content(key), &mut evicted).unwrap());
    evicted
}

fn file_of(root: &Path, key: u128) -> PathBuf {
    root.join(format!("{:032x}/{key:032x}.block", NAMESPACE.hash))
}

/// Bytes of all cached state in a directory.
fn bytes_on_disk(root: &Path) -> u64 {
    let directories = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let files =
        directories.filter(|path| path.is_dir()).flat_map(|path| fs::read_dir(path).unwrap());
    files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn what_was_put_is_there_after_reopening() {
    let root = tempfile::tempdir().unwrap();
    let snapshot = StateKey { kind: StateKind::Snapshot, key: BlockKey(1) };
    let mut store = open(root.path());
    put(&mut store, 1);
    assert!(store.put(snapshot, &[7; 50], &mut Vec::new()).unwrap());
    drop(store);

    let mut store = open(root.path());
    assert_eq!((store.n_files(), store.used_bytes()), (2, BLOCK_FILE + 72 + 50));
    assert_eq!(store.states().count(), 2);
    assert_eq!(store.get(block(1)).unwrap(), content(1));
    assert_eq!(store.get(snapshot).unwrap(), vec![7; 50]);
    assert_eq!(store.get(block(2)), None);
}

#[test]
fn a_file_cut_at_any_byte_is_a_miss_and_can_be_put_again() {
    let root = tempfile::tempdir().unwrap();
    let path = file_of(root.path(), 1);
    put(&mut open(root.path()), 1);
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() {
        // Cut while nobody looks, and cut while the store is open.
        fs::write(&path, &whole[..len]).unwrap();
        let mut store = open(root.path());
        assert_eq!((store.get(block(1)), store.n_files()), (None, 0), "cut to {len} bytes");
        put(&mut store, 1);
        fs::write(&path, &whole[..len]).unwrap();
        assert_eq!(store.get(block(1)), None, "cut to {len} bytes");
        assert!(!path.exists());
        put(&mut store, 1);
        assert_eq!(store.get(block(1)).unwrap(), content(1));
        assert_eq!((store.n_damaged(), store.used_bytes()), (2, BLOCK_FILE));
    }
}

#[test]
fn a_file_with_any_bit_flipped_is_a_miss() {
    let root = tempfile::tempdir().unwrap();
    let path = file_of(root.path(), 1);
    let mut store = open(root.path());
    put(&mut store, 1);
    let whole = fs::read(&path).unwrap();
    for bit in 0..8 * whole.len() {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &flipped).unwrap();
        assert_eq!(store.get(block(1)), None, "bit {bit}");
        put(&mut store, 1);
    }
    assert_eq!(store.get(block(1)).unwrap(), content(1));
}

#[test]
fn files_that_are_longer_gone_or_renamed_are_misses() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open(root.path());
    (1..=3).for_each(|key| drop(put(&mut store, key)));
    let longer = [fs::read(file_of(root.path(), 1)).unwrap(), vec![0]].concat();
    fs::write(file_of(root.path(), 1), longer).unwrap();
    fs::remove_file(file_of(root.path(), 2)).unwrap();
    fs::rename(file_of(root.path(), 3), file_of(root.path(), 4)).unwrap();
    assert_eq!([1, 2, 3].map(|key| store.get(block(key))), [None, None, None]);
    drop(store);
    assert_eq!(open(root.path()).get(block(4)), None, "the header names another key");
}

#[test]
fn what_a_killed_process_left_half_written_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open(root.path());
    put(&mut store, 1);
    let directory = file_of(root.path(), 1).parent().unwrap().to_owned();
    fs::write(directory.join("tmp-9"), b"half").unwrap();
    drop(store);
    let mut store = open(root.path());
    assert!(!directory.join("tmp-9").exists());
    assert_eq!(store.get(block(1)).unwrap(), content(1));
}

#[test]
fn foreign_files_are_left_alone() {
    let root = tempfile::tempdir().unwrap();
    drop(open(root.path()));
    let directory = file_of(root.path(), 1).parent().unwrap().to_owned();
    let foreign = [
        root.path().join("README"),
        directory.join("notes.txt"),
        directory.join("abc.block"),
        directory.join(format!("{:032X}.block", 0xabc)),
    ];
    foreign.iter().for_each(|path| fs::write(path, b"mine").unwrap());
    fs::create_dir(directory.join(format!("{:032x}.block", 5))).unwrap();
    let mut store = open_with(root.path(), NAMESPACE, 0, write_file);
    assert_eq!((store.n_files(), store.get(block(5))), (0, None));
    assert!(foreign.iter().all(|path| fs::read(path).unwrap() == b"mine"));
}

#[test]
fn another_namespace_is_never_read_but_makes_room() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open(root.path());
    put(&mut store, 1);
    drop(store);
    let other = Namespace { hash: 0xdef, ..NAMESPACE };
    let mut store = open_with(root.path(), other, 2 * BLOCK_FILE, write_file);
    assert_eq!((store.get(block(1)), store.states().count(), store.n_files()), (None, 0, 1));
    assert_eq!(put(&mut store, 2), []);
    assert!(file_of(root.path(), 1).exists());
    assert_eq!(put(&mut store, 3), []);
    assert!(!file_of(root.path(), 1).exists());

    // A copied file is not enough.
    let copy = root.path().join(format!("{:032x}/{:032x}.block", 0xdef, 3));
    let foreign = record::header(NAMESPACE.hash, block(3), &content(3));
    fs::write(copy, [&foreign[..], &content(3)].concat()).unwrap();
    assert_eq!(store.get(block(3)), None);
}

#[test]
fn the_least_recently_used_file_is_evicted_also_after_reopening() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open_with(root.path(), NAMESPACE, 3 * BLOCK_FILE, write_file);
    for key in 1..=3 {
        put(&mut store, key);
        // As if it were written hours ago, the first key first.
        let hours = SystemTime::now() - Duration::from_secs(3600 * (10 - key as u64));
        let file = File::options().write(true).open(file_of(root.path(), key)).unwrap();
        file.set_modified(hours).unwrap();
    }
    drop(store);
    let mut store = open_with(root.path(), NAMESPACE, 3 * BLOCK_FILE, write_file);
    assert!(store.get(block(1)).is_some());
    drop(store);
    let mut store = open_with(root.path(), NAMESPACE, 3 * BLOCK_FILE, write_file);
    assert_eq!(put(&mut store, 4), [block(2)]);
    assert_eq!(put(&mut store, 5), [block(3)]);
    drop(store);
    let store = open_with(root.path(), NAMESPACE, BLOCK_FILE, write_file);
    assert_eq!(store.states().collect::<Vec<_>>(), [block(5)]);
}

#[test]
fn a_full_disk_leaves_no_rest_and_loses_nothing_else() {
    fn full(path: &Path, parts: [&[u8]; 2]) -> io::Result<()> {
        if parts[1] == content(2) {
            fs::write(path, parts[0])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        write_file(path, parts)
    }
    let root = tempfile::tempdir().unwrap();
    let mut store = open_with(root.path(), NAMESPACE, 1 << 20, full);
    put(&mut store, 1);
    let error = store.put(block(2), &content(2), &mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!((store.used_bytes(), bytes_on_disk(root.path())), (BLOCK_FILE, BLOCK_FILE));
    put(&mut store, 3);
    assert_eq!(store.get(block(1)).unwrap(), content(1));
    assert_eq!(store.get(block(2)), None);
}

#[test]
fn what_is_larger_than_the_limit_or_misshapen_is_not_kept() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open_with(root.path(), NAMESPACE, BLOCK_FILE - 1, write_file);
    assert!(!store.put(block(1), &content(1), &mut Vec::new()).unwrap());
    drop(store);
    let mut store = open(root.path());
    assert!(!store.put(block(1), &[0; 21], &mut Vec::new()).unwrap());
    assert_eq!(bytes_on_disk(root.path()), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_limit_always_holds_and_what_is_found_is_right(
        limit in 0..8 * BLOCK_FILE,
        actions in prop::collection::vec((0..12_u128, 0..8), 0..60),
    ) {
        let root = tempfile::tempdir().unwrap();
        let mut store = open_with(root.path(), NAMESPACE, limit, write_file);
        for (key, action) in actions {
            match action {
                0 => store.remove(block(key)),
                1 => {
                    drop(store);
                    store = open_with(root.path(), NAMESPACE, limit, write_file);
                }
                2 => {
                    // Half of a file goes missing.
                    let path = file_of(root.path(), key);
                    if let Ok(whole) = fs::read(&path) {
                        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
                        prop_assert_eq!(store.get(block(key)), None);
                    }
                }
                3 | 4 => match store.get(block(key)) {
                    Some(bytes) => prop_assert_eq!(bytes, content(key)),
                    None => prop_assert!(!file_of(root.path(), key).exists()),
                },
                _ => {
                    let mut evicted = Vec::new();
                    let kept = store.put(block(key), &content(key), &mut evicted).unwrap();
                    prop_assert_eq!(kept, BLOCK_FILE <= limit);
                    prop_assert!(evicted.iter().all(|&state| !store.states().any(|other| other == state)));
                }
            }
            prop_assert_eq!(store.used_bytes(), bytes_on_disk(root.path()));
            prop_assert!(store.used_bytes() <= limit);
        }
    }
}
