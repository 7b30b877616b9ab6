//! The cache directory: who may use it, and the secret its keys are derived with.
//!
//! ```text
//! cache-dir/
//!   LOCK                   held by the process that uses the directory
//!   seed                   16 hexadecimal digits; readable by its owner only
//!   <namespace, 32 hex>/   files of one model, numeric mode and row format: see `disk`
//! ```
//!
//! The seed makes prefix keys the same after a restart, and keeps clients from constructing two
//! prompts with one key.
//!
//! Not here: the cached state itself (`disk`).

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum DirectoryError {
    #[error("the cache directory {path} is used by another process")]
    InUse { path: PathBuf },
    #[error("the cache directory {path} cannot be used: cannot {doing}")]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
}

/// A cache directory that this process holds the lock of.
#[derive(Debug)]
pub(crate) struct CacheDirectory {
    path: PathBuf,
    seed: u64,
    /// The system releases the lock when the file is closed, also if the process is killed.
    _lock: File,
}

impl CacheDirectory {
    /// Makes the directory if it is not there, locks it, and reads or makes its seed.
    ///
    /// # Errors
    /// [`DirectoryError`].
    pub(crate) fn open(path: &Path) -> Result<Self, DirectoryError> {
        let failed =
            |doing| move |source| DirectoryError::Io { path: path.to_owned(), doing, source };
        make_private_directory(path).map_err(failed("create it"))?;
        let lock = private_file()
            .create(true)
            .truncate(false)
            .open(path.join("LOCK"))
            .map_err(failed("create its LOCK file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DirectoryError::InUse { path: path.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(failed("lock it")(source)),
        }
        let seed = match read_seed(&path.join("seed")) {
            Some(seed) => seed,
            None => new_seed(path).map_err(failed("write its seed"))?,
        };
        Ok(Self { path: path.to_owned(), seed, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Secret of the directory, for prefix keys.
    pub(crate) const fn seed(&self) -> u64 {
        self.seed
    }
}

/// Makes a directory, and those above it, that only their owner can read.
pub(super) fn make_private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Options for a file that only its owner can read.
pub(super) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

fn read_seed(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let digits = text.trim_end();
    let seed = (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    if seed.is_none() {
        tracing::warn!(
            path = %path.display(),
            "the seed of the cache directory is damaged: a new one is made, and what was cached \
             under the old one will not be found"
        );
    }
    seed
}

fn new_seed(directory: &Path) -> io::Result<u64> {
    // The standard library seeds its hash maps from the system's randomness.
    let seed = RandomState::new().build_hasher().finish();
    let temporary = directory.join("seed.tmp");
    let mut file = private_file().create(true).truncate(true).open(&temporary)?;
    writeln!(file, "{seed:016x}")?;
    file.sync_all()?;
    fs::rename(&temporary, directory.join("seed"))?;
    Ok(seed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_seed_stays_the_same_and_only_its_owner_can_read_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/cache");
        let seed = CacheDirectory::open(&path).unwrap().seed();
        assert_eq!(CacheDirectory::open(&path).unwrap().seed(), seed);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join("seed"))), (0o700, 0o600));

        let other = CacheDirectory::open(&root.path().join("other")).unwrap();
        assert_ne!(other.seed(), seed);
    }

    #[test]
    fn a_damaged_seed_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let seed = CacheDirectory::open(root.path()).unwrap().seed();
        for damaged in ["", "12", "zzzzzzzzzzzzzzzz\n"] {
            fs::write(root.path().join("seed"), damaged).unwrap();
            assert_ne!(CacheDirectory::open(root.path()).unwrap().seed(), seed);
        }
    }

    #[test]
    fn a_second_user_is_turned_away_until_the_first_has_gone() {
        let root = tempfile::tempdir().unwrap();
        let first = CacheDirectory::open(root.path()).unwrap();
        let refused = CacheDirectory::open(root.path()).unwrap_err();
        assert!(matches!(refused, DirectoryError::InUse { .. }), "{refused}");
        drop(first);
        assert!(CacheDirectory::open(root.path()).is_ok());
    }

    #[test]
    fn a_path_that_is_no_directory_is_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        fs::write(&path, "").unwrap();
        let refused = CacheDirectory::open(&path).unwrap_err().to_string();
        assert!(refused.contains("file cannot be used: cannot create it"), "{refused}");
    }
}
