//! The disk tier: one file per piece of cached state, bounded in bytes, usable after any crash.
//!
//! A file's name is its key, so the directory listing is the index and nothing can disagree with
//! it. Files are written under a temporary name and renamed: a process that is killed leaves whole
//! files, and at most one temporary file that the next one removes. Nothing is synced: after a power
//! failure a file may be short or hold anything, which its checksums tell (`record`). The
//! modification time is the time of last use, so the order of eviction survives restarts.
//!
//! Files of other namespaces in the same directory (another model, an older row format) count
//! towards the limit and are evicted like all others, but never read.
//!
//! Not here: locking the directory (`directory`), the thread that does all this (`worker`).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fathom_scheduler::{BlockKey, StateKey, StateKind};

use super::directory::{CacheDirectory, make_private_directory, private_file};
use super::record::{self, Damage, HEADER_BYTES};

/// Uses within this time of the last noted one are not noted on disk.
const TOUCH_INTERVAL: Duration = Duration::from_secs(300);

const TEMPORARY: &str = "tmp-";

/// Writes a new file from two parts. A parameter so that tests can fill the disk.
pub(super) type WriteFile = fn(&Path, [&[u8]; 2]) -> io::Result<()>;

/// What all files of a namespace have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Namespace {
    /// Hash of its description.
    pub(super) hash: u128,
    /// Bytes of a KV block.
    pub(super) block_bytes: usize,
    /// Bytes of a snapshot.
    pub(super) snapshot_bytes: usize,
}

impl Namespace {
    fn file_bytes(&self, kind: StateKind) -> u64 {
        let state = match kind {
            StateKind::Block => self.block_bytes,
            StateKind::Snapshot => self.snapshot_bytes,
        };
        (HEADER_BYTES + state) as u64
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FileId {
    namespace: u128,
    state: StateKey,
}

#[derive(Debug)]
struct FileEntry {
    bytes: u64,
    /// Key in `by_use`.
    used: u64,
    /// The use that the file's modification time tells.
    noted: SystemTime,
}

/// Cached state on disk. All calls do IO and may be slow.
#[derive(Debug)]
pub(super) struct DiskStore {
    directory: CacheDirectory,
    namespace: Namespace,
    limit_bytes: u64,
    used_bytes: u64,
    files: HashMap<FileId, FileEntry>,
    /// Ascending: least recently used first.
    by_use: BTreeMap<u64, FileId>,
    clock: u64,
    n_damaged: u64,
    write_file: WriteFile,
}

impl DiskStore {
    /// Finds what the directory holds; reads no file. Removes temporary and misshapen files of the
    /// namespace, and evicts until the limit is kept.
    ///
    /// # Errors
    /// If the namespace's own directory cannot be made or listed.
    pub(super) fn open(
        directory: CacheDirectory,
        namespace: Namespace,
        limit_bytes: u64,
        write_file: WriteFile,
    ) -> io::Result<Self> {
        let mut store = Self {
            directory,
            namespace,
            limit_bytes,
            used_bytes: 0,
            files: HashMap::new(),
            by_use: BTreeMap::new(),
            clock: 0,
            n_damaged: 0,
            write_file,
        };
        make_private_directory(&store.namespace_path(namespace.hash))?;
        let mut found = store.scan()?;
        // The file name only makes the order the same on every system.
        found.sort_unstable_by_key(|(id, _, used)| (*used, id.state.key.0, id.state.kind));
        for (id, bytes, used) in found {
            store.insert(id, bytes, used);
        }
        store.make_room(0, &mut Vec::new());
        Ok(store)
    }

    /// All files of this directory that have the name and place of cached state.
    fn scan(&mut self) -> io::Result<Vec<(FileId, u64, SystemTime)>> {
        let mut found = Vec::new();
        let mut n_foreign = 0_u64;
        for entry in fs::read_dir(self.directory.path())? {
            let entry = entry?;
            let Some(namespace) = hex(&entry.file_name().to_string_lossy()) else { continue };
            let is_own = namespace == self.namespace.hash;
            let files = match fs::read_dir(entry.path()) {
                Ok(files) => files,
                Err(error) if is_own => return Err(error),
                Err(_) => continue,
            };
            for file in files {
                let file = file?;
                let name = file.file_name();
                let name = name.to_string_lossy();
                let Ok(facts) = file.metadata() else { continue };
                if name.starts_with(TEMPORARY) && facts.is_file() {
                    remove_file(&file.path());
                    continue;
                }
                let Some(state) = state_of(&name).filter(|_| facts.is_file()) else {
                    n_foreign += 1;
                    continue;
                };
                if is_own && facts.len() != self.namespace.file_bytes(state.kind) {
                    let expected = self.namespace.file_bytes(state.kind);
                    tracing::warn!(
                        path = %file.path().display(),
                        "removing a cache file of {} bytes, where {expected} are expected",
                        facts.len(),
                    );
                    remove_file(&file.path());
                    self.n_damaged += 1;
                    continue;
                }
                let used = facts.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push((FileId { namespace, state }, facts.len(), used));
            }
        }
        if n_foreign > 0 {
            let path = self.directory.path().display();
            tracing::warn!(%path, "{n_foreign} files in the cache directory are not ours: ignored");
        }
        Ok(found)
    }

    pub(super) const fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(super) fn n_files(&self) -> usize {
        self.files.len()
    }

    /// Files that could not be used, so far.
    pub(super) const fn n_damaged(&self) -> u64 {
        self.n_damaged
    }

    /// What there is of this namespace.
    pub(super) fn states(&self) -> impl Iterator<Item = StateKey> + '_ {
        let own = self.files.keys().filter(|id| id.namespace == self.namespace.hash);
        own.map(|id| id.state)
    }

    /// Keeps `bytes`. What of this namespace had to leave for them is appended to `evicted`. Returns
    /// whether they were kept: a file beyond the limit is not.
    ///
    /// # Errors
    /// If the file cannot be written; nothing is left of it then.
    pub(super) fn put(
        &mut self,
        state: StateKey,
        bytes: &[u8],
        evicted: &mut Vec<StateKey>,
    ) -> io::Result<bool> {
        let id = self.own(state);
        let file_bytes = self.namespace.file_bytes(state.kind);
        if self.files.contains_key(&id) {
            return Ok(true);
        }
        if file_bytes > self.limit_bytes || file_bytes != (HEADER_BYTES + bytes.len()) as u64 {
            return Ok(false);
        }
        // First, so that the limit holds at every moment.
        self.make_room(file_bytes, evicted);
        let temporary =
            self.namespace_path(id.namespace).join(format!("{TEMPORARY}{}", self.clock));
        let header = record::header(self.namespace.hash, state, bytes);
        let written = (self.write_file)(&temporary, [&header, bytes])
            .and_then(|()| fs::rename(&temporary, self.path(id)));
        if let Err(error) = written {
            remove_file(&temporary);
            return Err(error);
        }
        self.insert(id, file_bytes, SystemTime::now());
        Ok(true)
    }

    /// Reads and checks `state`. A file that cannot be used is logged, removed and a miss.
    pub(super) fn get(&mut self, state: StateKey) -> Option<Bytes> {
        let id = self.own(state);
        self.files.get(&id)?;
        let path = self.path(id);
        let reason = match self.read(&path, state) {
            Ok(Ok(bytes)) => {
                self.touch(state);
                return Some(bytes);
            }
            Ok(Err(damage)) => damage.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(path = %path.display(), reason, "removing a cache file that cannot be used");
        self.n_damaged += 1;
        self.remove(state);
        None
    }

    fn read(&self, path: &Path, state: StateKey) -> io::Result<Result<Bytes, Damage>> {
        let expected = self.namespace.file_bytes(state.kind);
        let mut file = Vec::with_capacity(expected as usize);
        // One byte more than expected is enough to tell that a file is too long.
        File::open(path)?.take(expected + 1).read_to_end(&mut file)?;
        let checked = record::check(&file, self.namespace.hash, state);
        Ok(checked.map(|()| Bytes::from(file).slice(HEADER_BYTES..)))
    }

    /// Notes that `state` is used now.
    pub(super) fn touch(&mut self, state: StateKey) {
        let id = self.own(state);
        let Some(entry) = self.files.get_mut(&id) else { return };
        self.by_use.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.by_use.insert(self.clock, id);
        let now = SystemTime::now();
        if now.duration_since(entry.noted).is_ok_and(|age| age > TOUCH_INTERVAL) {
            entry.noted = now;
            let path = self.path(id);
            let noted = File::options().write(true).open(&path);
            if let Err(error) = noted.and_then(|file| file.set_modified(now)) {
                tracing::debug!(path = %path.display(), %error, "cannot note a use");
            }
        }
    }

    pub(super) fn remove(&mut self, state: StateKey) {
        self.remove_id(self.own(state));
    }

    fn remove_id(&mut self, id: FileId) {
        if let Some(entry) = self.files.remove(&id) {
            self.by_use.remove(&entry.used);
            self.used_bytes -= entry.bytes;
            remove_file(&self.path(id));
        }
    }

    fn insert(&mut self, id: FileId, bytes: u64, noted: SystemTime) {
        self.clock += 1;
        self.used_bytes += bytes;
        self.files.insert(id, FileEntry { bytes, used: self.clock, noted });
        self.by_use.insert(self.clock, id);
    }

    /// Evicts until `bytes` more fit.
    fn make_room(&mut self, bytes: u64, evicted: &mut Vec<StateKey>) {
        while self.used_bytes + bytes > self.limit_bytes {
            let Some((_, &oldest)) = self.by_use.first_key_value() else { return };
            self.remove_id(oldest);
            if oldest.namespace == self.namespace.hash {
                evicted.push(oldest.state);
            }
        }
    }

    const fn own(&self, state: StateKey) -> FileId {
        FileId { namespace: self.namespace.hash, state }
    }

    fn namespace_path(&self, namespace: u128) -> PathBuf {
        self.directory.path().join(format!("{namespace:032x}"))
    }

    fn path(&self, id: FileId) -> PathBuf {
        let FileId { namespace, state: StateKey { kind, key } } = id;
        self.namespace_path(namespace).join(format!("{:032x}.{}", key.0, extension(kind)))
    }
}

const fn extension(kind: StateKind) -> &'static str {
    match kind {
        StateKind::Block => "block",
        StateKind::Snapshot => "snapshot",
    }
}

fn state_of(name: &str) -> Option<StateKey> {
    let (key, end) = name.split_once('.')?;
    let kind =
        [StateKind::Block, StateKind::Snapshot].into_iter().find(|k| extension(*k) == end)?;
    Some(StateKey { kind, key: BlockKey(hex(key)?) })
}

/// The number of 32 lower-case hexadecimal digits.
fn hex(digits: &str) -> Option<u128> {
    let all = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (digits.len() == 32 && all).then(|| u128::from_str_radix(digits, 16).ok()).flatten()
}

/// Removes a file. One that cannot be removed is nothing to stop for.
fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove a cache file");
    }
}

/// Writes a new file that only its owner can read.
pub(super) fn write_file(path: &Path, parts: [&[u8]; 2]) -> io::Result<()> {
    let mut file = private_file().create_new(true).open(path)?;
    parts.into_iter().try_for_each(|part| file.write_all(part))
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
