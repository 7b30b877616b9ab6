//! Why a checkpoint is not loaded: one variant per thing someone can act on.
//!
//! Every message about a tensor names the tensor, its file, what was expected and what was found.
//! `config.json` has its own errors in [`ConfigError`](crate::config::ConfigError).

use std::path::{Path, PathBuf};

use crate::config::ConfigError;
use crate::dtype::StoredDtype;

/// What to do about a checkpoint that another program wrote anew.
const REDOWNLOAD: &str = "re-download the original checkpoint";

/// A checkpoint cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum LoadError {
    // The directory and its files.
    #[error("{path} is not a directory: name the directory that holds config.json")]
    NotADirectory { path: PathBuf },
    #[error("no {file} in {dir}: name a directory in the layout of the DeepSeek-V4 release")]
    MissingFile { dir: PathBuf, file: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is a symbolic link that leads back to itself: restore the file it stands for")]
    SymlinkLoop { path: PathBuf },
    #[error("{path} is not a regular file")]
    NotAFile { path: PathBuf },
    #[error("{path} has {found} bytes, more than the {limit} such a file may have")]
    TooLarge { path: PathBuf, found: u64, limit: u64 },
    #[error("{path}")]
    Config { path: PathBuf, source: ConfigError },
    #[error(
        "{dir} holds config.json but no weights (model.safetensors.index.json or model.safetensors)"
    )]
    NoWeights { dir: PathBuf },
    #[error(
        "{file} was written by convert.py for one rank: start from the original checkpoint \
         (model-000NN-of-000MM.safetensors with its index), Fathom shards it itself"
    )]
    Converted { file: String },
    #[error("{file} is a Git LFS pointer, not the weights: run `git lfs pull` there")]
    LfsPointer { file: String },

    // The index.
    #[error("{file} is not a valid index")]
    IndexJson { file: String, source: serde_json::Error },
    #[error("{file} lists `{name}` twice")]
    IndexDuplicate { name: String, file: String },
    #[error(
        "the index places `{name}` in {file:?}, outside the checkpoint: \
         expected a file name inside the directory"
    )]
    IndexOutside { name: String, file: String },
    #[error("the index places `{name}` in {file}, which is missing: download that shard")]
    MissingShard { name: String, file: String },
    #[error("{file} says total_size {expected}, but the shards hold {found} bytes of tensors")]
    TotalSize { file: String, expected: u64, found: u64 },
    #[error("{file} lacks `{name}`, which the index places there")]
    NotInShard { name: String, file: String },
    #[error("{file} holds `{name}`, which the index does not list")]
    NotInIndex { name: String, file: String },
    #[error("{file} holds `{name}`, which the index places in {expected}")]
    OtherShard { name: String, file: String, expected: String },

    // A shard's header and length.
    #[error("{file} has {found} bytes: a shard begins with an 8-byte header length")]
    NoHeader { file: String, found: u64 },
    #[error(
        "{file}: header length {found} exceeds the limit of {limit} bytes; the file is damaged"
    )]
    HeaderTooLong { file: String, found: u64, limit: u64 },
    #[error("{file}: header of {header} bytes in a file of {found}: the download is incomplete")]
    HeaderPastEnd { file: String, header: u64, found: u64 },
    #[error("{file}: the header is not UTF-8")]
    HeaderNotUtf8 { file: String, source: std::str::Utf8Error },
    #[error("{file}: the header is not a safetensors header")]
    HeaderJson { file: String, source: serde_json::Error },
    #[error("{file}: the header lists `{name}` twice")]
    HeaderDuplicate { name: String, file: String },
    #[error(
        "{file}: `{name}` has data offsets [{begin}, {end}], expected begin <= end <= {payload}, \
         the bytes after the header"
    )]
    Offsets { name: String, file: String, begin: u64, end: u64, payload: u64 },
    #[error("{file}: `{name}` is {dtype} {shape:?}, but its data offsets span {found} bytes")]
    OffsetsDisagree {
        name: String,
        file: String,
        dtype: StoredDtype,
        shape: Vec<usize>,
        found: u64,
    },
    #[error("{file}: `{name}` begins at byte {found}, inside `{other}`, which ends at {expected}")]
    Overlap { name: String, file: String, other: String, found: u64, expected: u64 },
    #[error("{file}: `{name}` begins at byte {found}, expected {expected}: the gap is unowned")]
    Gap { name: String, file: String, found: u64, expected: u64 },
    #[error("{file} has {found} bytes, its header implies {expected}: the download is incomplete")]
    Truncated { file: String, found: u64, expected: u64 },
    #[error(
        "{file} has {found} bytes, its header implies {expected}: bytes follow the last tensor"
    )]
    TrailingBytes { file: String, found: u64, expected: u64 },

    // Tensors against config.json.
    #[error("`{first}` and `{second}` ({file}) are two names of the same tensor")]
    SameTensor { first: String, second: String, file: String },
    #[error("no tensor `{name}`: config.json implies {dtype} {shape:?}; found in no shard")]
    MissingTensor { name: String, dtype: StoredDtype, shape: Vec<usize> },
    #[error("{file} holds `{name}`, which no DeepSeek-V4 model of this config.json has")]
    SurplusTensor { name: String, file: String },
    #[error("{file}: `{name}` has shape {found:?}, config.json implies {expected:?}")]
    WrongShape { name: String, file: String, found: Vec<usize>, expected: Vec<usize> },
    #[error(
        "{file}: `{name}` is {found}, expected {expected}; a re-saved checkpoint may have been \
         cast: {REDOWNLOAD}"
    )]
    WrongDtype { name: String, file: String, found: String, expected: StoredDtype },
    #[error("{file}: `{name}` lists {found} experts per token, num_experts_per_tok is {expected}")]
    HashTableWidth { name: String, file: String, found: usize, expected: usize },
    #[error("no tensor `{name}` in this checkpoint")]
    UnknownTensor { name: String },

    // Whole families of checkpoints that are not supported.
    #[error("{file} holds `{name}`, a name of Hugging Face's own layout: {REDOWNLOAD}")]
    HfSaved { name: String, file: String },
    #[error("{file} holds `{name}`, re-quantised as {method}: {REDOWNLOAD} (FP8 and FP4)")]
    Requantised { name: String, file: String, method: &'static str },
    #[error("{file} holds `{name}`: vision checkpoint not supported; use the text model")]
    Vision { name: String, file: String },

    // Values.
    #[error("{file}: `{name}` has the NaN scale 255 at {position:?}: {REDOWNLOAD}")]
    NanScale { name: String, file: String, position: Vec<usize> },
    #[error("{file}: `{name}` has scale {found} at {position:?}, expected finite and not negative")]
    BadScale { name: String, file: String, position: Vec<usize>, found: f32 },
    #[error("{file}: `{name}` is not finite at {position:?}: {REDOWNLOAD}")]
    NotFinite { name: String, file: String, position: Vec<usize> },
    #[error("{file}: `{name}` sends token {token} to expert {found}, expected 0..{n_experts}")]
    ExpertOutOfRange { name: String, file: String, token: usize, found: i64, n_experts: usize },
    #[error("{file}: `{name}` sends token {token} to expert {found} twice")]
    ExpertRepeated { name: String, file: String, token: usize, found: i64 },
}

impl LoadError {
    /// The error for a failed `open`, `stat` or `read` of `path`.
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        // ELOOP; std's own name for it is unstable.
        const ELOOP: i32 = if cfg!(target_os = "linux") { 40 } else { 62 };
        if source.raw_os_error() == Some(ELOOP) {
            return Self::SymlinkLoop { path: path.to_owned() };
        }
        Self::Read { path: path.to_owned(), source }
    }
}
