//! Where a checkpoint's files come from: a directory, or the binary itself.
//!
//! Files are reached by name only. A name from the index must stay inside the directory
//! ([`is_inside`]). Symbolic links are followed: a hub cache consists of links to its blobs, and
//! whoever made the directory made the links; a link that leads back to itself is an error.
//!
//! Not here: what is in the files.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::LoadError;

/// Files by name.
#[derive(Debug, Clone)]
pub(crate) enum Files {
    Dir(PathBuf),
    Embedded(Vec<(String, &'static [u8])>),
}

/// A shard that was opened: its bytes, not yet looked at.
pub(crate) struct ShardFile {
    /// The first bytes, up to the end of the header; read, so that a bad disk is an error here.
    pub(crate) head: Bytes,
    /// The whole file, mapped.
    pub(crate) all: Bytes,
}

/// Whether `name`, taken from an index, names something inside the directory.
pub(crate) fn is_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

impl Files {
    /// The files of the directory `dir`.
    pub(crate) fn dir(dir: &Path) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(dir).map_err(|source| LoadError::io(dir, source))?;
        if !metadata.is_dir() {
            return Err(LoadError::NotADirectory { path: dir.to_owned() });
        }
        Ok(Self::Dir(dir.to_owned()))
    }

    /// The directory, or what stands for it in messages.
    pub(crate) fn root(&self) -> PathBuf {
        match self {
            Self::Dir(dir) => dir.clone(),
            Self::Embedded(_) => PathBuf::from("<embedded>"),
        }
    }

    /// How messages name the file `name`.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The names of all files at the top; empty where the directory cannot be listed.
    pub(crate) fn names(&self) -> Vec<String> {
        match self {
            Self::Dir(dir) => std::fs::read_dir(dir)
                .into_iter()
                .flatten()
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
            Self::Embedded(files) => files.iter().map(|(name, _)| name.clone()).collect(),
        }
    }

    /// Reads a whole file of at most `limit` bytes; `None` where there is none.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Option<Bytes>, LoadError> {
        match self {
            Self::Embedded(_) => Ok(self.embedded(name).map(Bytes::from_static)),
            Self::Dir(_) => {
                let path = self.path(name);
                let Some((file, found)) = open(&path)? else { return Ok(None) };
                if found > limit {
                    return Err(LoadError::TooLarge { path, found, limit });
                }
                let mut out = Vec::new();
                file.take(limit)
                    .read_to_end(&mut out)
                    .map_err(|source| LoadError::io(&path, source))?;
                Ok(Some(Bytes::from(out)))
            }
        }
    }

    /// Reads a whole file that must be there.
    pub(crate) fn require(&self, name: &str, limit: u64) -> Result<Bytes, LoadError> {
        self.read(name, limit)?
            .ok_or_else(|| LoadError::MissingFile { dir: self.root(), file: name.to_owned() })
    }

    /// Maps a shard and reads it up to `head_len(first 8 bytes, file length)`; `None` where there
    /// is none.
    pub(crate) fn shard(
        &self,
        name: &str,
        head_len: impl Fn(&[u8], u64) -> Result<u64, LoadError>,
    ) -> Result<Option<ShardFile>, LoadError> {
        if let Self::Embedded(_) = self {
            let Some(data) = self.embedded(name) else { return Ok(None) };
            let all = Bytes::from_static(data);
            let end = head_len(&all[..all.len().min(8)], all.len() as u64)?;
            return Ok(Some(ShardFile { head: all.slice(..to_usize(end)), all }));
        }
        let path = self.path(name);
        let Some((mut file, found)) = open(&path)? else { return Ok(None) };
        let mut head = Vec::with_capacity(8);
        let io = |source| LoadError::io(&path, source);
        file.by_ref().take(8).read_to_end(&mut head).map_err(io)?;
        let end = head_len(&head, found)?;
        head.reserve_exact(to_usize(end) - head.len());
        file.by_ref().take(end - head.len() as u64).read_to_end(&mut head).map_err(io)?;
        // SAFETY: a mapping is sound while nobody truncates or rewrites the file. Checkpoints are
        // read-only data; a shard replaced by rename keeps its mapped inode. This is the condition
        // under which every program maps weights; the crate's README states it.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Some(ShardFile { head: Bytes::from(head), all: Bytes::from_owner(map) }))
    }

    fn embedded(&self, name: &str) -> Option<&'static [u8]> {
        match self {
            Self::Dir(_) => None,
            Self::Embedded(files) => {
                files.iter().find(|(file, _)| file == name).map(|(_, data)| *data)
            }
        }
    }
}

/// Opens a regular file and tells its length; `None` where there is none.
fn open(path: &Path) -> Result<Option<(File, u64)>, LoadError> {
    // Asked before opening: opening a FIFO would wait for a writer.
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::io(path, error)),
    };
    if !metadata.is_file() {
        return Err(LoadError::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(|source| LoadError::io(path, source))?;
    let len = file.metadata().map_err(|source| LoadError::io(path, source))?.len();
    Ok(Some((file, len)))
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("no longer than a header, which has a limit")
}
