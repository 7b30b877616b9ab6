//! Remembered answers on disk: one file of records, appended in the background, bounded in size.
//!
//! ```text
//! answers.log    header: magic and version, seed, checksum                              24 bytes
//!                record: number of ids, key, ids, checksum                  4 + 16 + 4 n + 8 bytes
//! answers.lock   held by the process that uses the file
//! ```
//!
//! All numbers are little endian; a checksum is xxh3 of what is before it, under the file's seed. A
//! record that was cut, as by a kill, ends the file; one that is damaged is left out; a file of another
//! version, or of nobody, is replaced. Forgotten answers leave the file when it is rewritten: beside
//! the first file and then renamed, so that a kill leaves one of the two.
//!
//! Not here: what is remembered and for how long (the module above).

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use fathom_core::TokenId;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Entries, Key};

/// With the version; other versions are not read.
const MAGIC: &[u8; 8] = b"FTHMANS1";

const HEADER_BYTES: u64 = 24;

/// Longest answer that is believed: a larger number is damage.
const MAX_IDS: u32 = 1 << 22;

/// Answers that may wait to be written; further ones are not.
const QUEUE: usize = 1024;

enum Chore {
    Append(Key, Arc<[TokenId]>),
    Rewrite(Vec<(Key, Arc<[TokenId]>)>),
}

/// The file, written by a thread of its own.
pub(super) struct Log {
    seed: u64,
    /// Most bytes of the file: twice those of the memory, so that rewriting it stays rare.
    limit_bytes: u64,
    /// Bytes that the file has once everything queued is written.
    bytes: AtomicU64,
    chores: Mutex<Option<SyncSender<Chore>>>,
    thread: Option<JoinHandle<()>>,
}

impl Log {
    /// Reads the file of `directory` into `entries`. `None`, and a line in the log, if the file cannot
    /// be used; nothing depends on it.
    pub(super) fn open(directory: &Path, limit_bytes: u64, entries: &mut Entries) -> Option<Self> {
        match Self::try_open(directory, limit_bytes, entries) {
            Ok(log) => log,
            Err(error) => {
                let path = directory.display();
                tracing::warn!(%path, %error, "answers are remembered until the end only");
                None
            }
        }
    }

    fn try_open(
        directory: &Path,
        limit_bytes: u64,
        entries: &mut Entries,
    ) -> io::Result<Option<Self>> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let lock = private().create(true).truncate(false).open(directory.join("answers.lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let path = directory.display();
                tracing::warn!(%path, "another process remembers answers here");
                return Ok(None);
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let path = directory.join("answers.log");
        let found = match File::open(&path) {
            Ok(file) => read(&mut BufReader::new(file), entries)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Found::default(),
            Err(error) => return Err(error),
        };
        let limit_bytes = 2 * limit_bytes + HEADER_BYTES;
        if found.is_damaged {
            tracing::warn!(path = %path.display(), "the file was damaged: what can be read is kept");
        }
        let seed = found.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let whole = !found.is_damaged && found.seed.is_some() && found.bytes <= limit_bytes;
        let (file, bytes) = if whole {
            (OpenOptions::new().append(true).open(&path)?, found.bytes)
        } else {
            write_new(&path, seed, &entries.oldest_first())?
        };
        let (chores, inbox) = sync_channel(QUEUE);
        let writer = Writer { path, seed, file, _lock: lock };
        let thread = std::thread::Builder::new()
            .name("fathom-answers".to_owned())
            .spawn(move || writer.run(&inbox))?;
        Ok(Some(Self {
            seed,
            limit_bytes,
            bytes: AtomicU64::new(bytes),
            chores: Mutex::new(Some(chores)),
            thread: Some(thread),
        }))
    }

    pub(super) const fn seed(&self) -> u64 {
        self.seed
    }

    /// Queues an answer. False: the file has no room for it, and must be rewritten.
    pub(super) fn append(&self, key: Key, ids: Arc<[TokenId]>) -> bool {
        let bytes = record_bytes(&ids);
        if self.bytes.load(Ordering::Relaxed) + bytes > self.limit_bytes {
            return false;
        }
        if self.send(Chore::Append(key, ids)) {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        true
    }

    /// Replaces the file's content, the least recently used answer first.
    pub(super) fn rewrite(&self, answers: Vec<(Key, Arc<[TokenId]>)>) {
        let records = answers.iter().map(|(_, ids)| record_bytes(ids));
        let bytes = HEADER_BYTES + records.sum::<u64>();
        if self.send(Chore::Rewrite(answers)) {
            self.bytes.store(bytes, Ordering::Relaxed);
        }
    }

    /// False if the thread has too much to do, or has ended because it could not write.
    fn send(&self, chore: Chore) -> bool {
        let chores = self.chores.lock().unwrap_or_else(PoisonError::into_inner);
        chores.as_ref().is_some_and(|chores| chores.try_send(chore).is_ok())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        *self.chores.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(thread) = self.thread.take() {
            // A panic lost what was queued; there is nothing more to do about it.
            let _ = thread.join();
        }
    }
}

struct Writer {
    path: PathBuf,
    seed: u64,
    file: File,
    _lock: File,
}

impl Writer {
    fn run(mut self, chores: &Receiver<Chore>) {
        for chore in chores {
            let result = match chore {
                Chore::Append(key, ids) => self.file.write_all(&record(key, &ids, self.seed)),
                Chore::Rewrite(answers) => {
                    write_new(&self.path, self.seed, &answers).map(|(file, _)| self.file = file)
                }
            };
            if let Err(error) = result {
                let path = self.path.display();
                // A record that was cut ends the file; after it nothing must be written.
                tracing::warn!(%path, %error, "answers are no longer written to the cache");
                return;
            }
        }
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

fn record_bytes(ids: &[TokenId]) -> u64 {
    (4 + 16 + size_of_val(ids) + 8) as u64
}

fn record(key: Key, ids: &[TokenId], seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(record_bytes(ids) as usize);
    bytes.extend_from_slice(&(ids.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&key.0.to_le_bytes());
    bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    bytes.extend_from_slice(&xxh3_64_with_seed(&bytes, seed).to_le_bytes());
    bytes
}

/// Writes a file with these answers in place of the one at `path`; returns it and its bytes.
fn write_new(path: &Path, seed: u64, answers: &[(Key, Arc<[TokenId]>)]) -> io::Result<(File, u64)> {
    let temporary = path.with_extension("tmp");
    let mut file = BufWriter::new(private().create(true).truncate(true).open(&temporary)?);
    let mut header = [&MAGIC[..], &seed.to_le_bytes()].concat();
    header.extend_from_slice(&xxh3_64_with_seed(&header, seed).to_le_bytes());
    file.write_all(&header)?;
    let mut bytes = HEADER_BYTES;
    for (key, ids) in answers {
        file.write_all(&record(*key, ids, seed))?;
        bytes += record_bytes(ids);
    }
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    fs::rename(&temporary, path)?;
    Ok((file, bytes))
}

/// What a file was found to be.
#[derive(Default)]
struct Found {
    /// `None` if it is none of ours, or there is none.
    seed: Option<u64>,
    /// Bytes that could be read.
    bytes: u64,
    /// There is more, or something else.
    is_damaged: bool,
}

/// Reads as many records as there are.
fn read(file: &mut impl Read, entries: &mut Entries) -> io::Result<Found> {
    let mut found = Found { is_damaged: true, ..Found::default() };
    let mut header = [0; HEADER_BYTES as usize];
    if !fill(file, &mut header)? {
        return Ok(found);
    }
    let (content, checksum) = header.split_at(16);
    let seed = number(&content[8..]);
    if !content.starts_with(MAGIC) || xxh3_64_with_seed(content, seed) != number(checksum) {
        return Ok(found);
    }
    found = Found { seed: Some(seed), bytes: HEADER_BYTES, is_damaged: false };
    let mut bytes = Vec::new();
    loop {
        let mut length = [0; 4];
        match file.read(&mut length[..1])? {
            0 => return Ok(found),
            _ if fill(file, &mut length[1..])? => {}
            _ => break,
        }
        let n_ids = u32::from_le_bytes(length);
        if n_ids > MAX_IDS {
            break;
        }
        bytes.clear();
        bytes.extend_from_slice(&length);
        bytes.resize(4 + 16 + 4 * n_ids as usize + 8, 0);
        if !fill(file, &mut bytes[4..])? {
            break;
        }
        let (content, checksum) = bytes.split_at(bytes.len() - 8);
        if xxh3_64_with_seed(content, seed) != number(checksum) {
            found.is_damaged = true;
            continue;
        }
        let (key, ids) = content[4..].split_at(16);
        let key = key.try_into().map_or(0, u128::from_le_bytes);
        let ids = ids.as_chunks::<4>().0.iter().map(|id| TokenId::from_le_bytes(*id));
        entries.insert(Key(key), ids.collect());
        found.bytes += bytes.len() as u64;
    }
    found.is_damaged = true;
    Ok(found)
}

/// Fills `into`; false if the file ends before.
fn fill(file: &mut impl Read, into: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(into) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}
