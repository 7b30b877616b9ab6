//! The header of a safetensors shard: which tensor lies where.
//!
//! Layout: 8 bytes little-endian header length, that many bytes of JSON, then the payload. What
//! [`parse_header`] accepts covers the payload exactly: no tensor overlaps another, none leaves a
//! gap, each has the length its format and shape imply, and the file ends with the last one.
//!
//! Own code instead of the `safetensors` crate, which reports neither file nor tensor for most of
//! these, and stops at the first format it does not know (a re-quantised checkpoint then reads as
//! a corrupt one).

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::dtype::{StoredDtype, byte_len};
use crate::error::LoadError;

/// Longest header that is read; the reference implementation has the same limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes before the header: its length.
pub const LENGTH_BYTES: u64 = 8;
/// How a Git LFS pointer file begins.
const LFS_MAGIC: &[u8; 8] = b"version ";

/// A tensor's format as written; V4 uses only the known ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderDtype {
    /// A format of DeepSeek-V4.
    Known(StoredDtype),
    /// Any other, by its name.
    Other(Box<str>),
}

impl fmt::Display for HeaderDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(dtype) => f.write_str(dtype.name()),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// One tensor of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderTensor {
    /// The name as written.
    pub name: Box<str>,
    /// Element format.
    pub dtype: HeaderDtype,
    /// Stored shape.
    pub shape: Box<[usize]>,
    /// First byte, counted from the end of the header.
    pub begin: u64,
    /// One past the last byte, counted from the end of the header.
    pub end: u64,
}

/// Where the header of a shard ends, from its first 8 bytes and the file's length.
///
/// # Errors
/// [`LoadError::NoHeader`], [`LoadError::LfsPointer`], [`LoadError::HeaderTooLong`],
/// [`LoadError::HeaderPastEnd`], in this order.
pub fn header_end(first: &[u8], file_len: u64, file: &str) -> Result<u64, LoadError> {
    let file = || file.to_owned();
    let Ok(length) = <[u8; 8]>::try_from(first) else {
        return Err(LoadError::NoHeader { file: file(), found: file_len });
    };
    if length == *LFS_MAGIC {
        return Err(LoadError::LfsPointer { file: file() });
    }
    let header = u64::from_le_bytes(length);
    if header > MAX_HEADER_BYTES {
        let limit = MAX_HEADER_BYTES;
        return Err(LoadError::HeaderTooLong { file: file(), found: header, limit });
    }
    let end = LENGTH_BYTES + header;
    if end > file_len {
        return Err(LoadError::HeaderPastEnd { file: file(), header, found: file_len });
    }
    Ok(end)
}

/// Reads the JSON of a header whose file is `file_len` bytes long. The result is in file order:
/// each tensor begins where the one before it ends.
///
/// # Errors
/// A [`LoadError`] about `file`: not UTF-8, not a header, a name twice, offsets that leave the
/// payload, disagree with the shape, overlap or leave a gap, a file too short or too long.
pub fn parse_header(
    json: &[u8],
    file_len: u64,
    file: &str,
) -> Result<Vec<HeaderTensor>, LoadError> {
    let text = std::str::from_utf8(json)
        .map_err(|source| LoadError::HeaderNotUtf8 { file: file.to_owned(), source })?;
    let Entries(mut tensors) = serde_json::from_str(text)
        .map_err(|source| LoadError::HeaderJson { file: file.to_owned(), source })?;
    let mut names = HashSet::with_capacity(tensors.len());
    for tensor in &tensors {
        if !names.insert(&*tensor.name) {
            return Err(LoadError::HeaderDuplicate {
                name: tensor.name.to_string(),
                file: file.to_owned(),
            });
        }
    }
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    check_layout(&tensors, LENGTH_BYTES + json.len() as u64, file_len, file)?;
    Ok(tensors)
}

/// Requires sorted `tensors` to cover the bytes from `data_start` to `file_len` exactly.
fn check_layout(
    tensors: &[HeaderTensor],
    data_start: u64,
    file_len: u64,
    file: &str,
) -> Result<(), LoadError> {
    let payload = file_len.saturating_sub(data_start);
    let mut previous: Option<&HeaderTensor> = None;
    for tensor in tensors {
        let (name, file) = (|| tensor.name.to_string(), || file.to_owned());
        let (begin, end) = (tensor.begin, tensor.end);
        if begin > end {
            return Err(LoadError::Offsets { name: name(), file: file(), begin, end, payload });
        }
        let found = end - begin;
        if let HeaderDtype::Known(dtype) = tensor.dtype
            && byte_len(dtype, &tensor.shape) != Some(found)
        {
            let shape = tensor.shape.to_vec();
            return Err(LoadError::OffsetsDisagree {
                name: name(),
                file: file(),
                dtype,
                shape,
                found,
            });
        }
        let expected = previous.map_or(0, |p| p.end);
        if begin < expected {
            let other = previous.map(|p| p.name.to_string()).unwrap_or_default();
            let (name, file) = (name(), file());
            return Err(LoadError::Overlap { name, file, other, found: begin, expected });
        }
        if begin > expected {
            return Err(LoadError::Gap { name: name(), file: file(), found: begin, expected });
        }
        previous = Some(tensor);
    }
    let expected = data_start.saturating_add(previous.map_or(0, |last| last.end));
    let (file, found) = (file.to_owned(), file_len);
    match found.cmp(&expected) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(LoadError::Truncated { file, found, expected }),
        std::cmp::Ordering::Greater => Err(LoadError::TrailingBytes { file, found, expected }),
    }
}

/// Reads the header of a shard that lies in memory as a whole.
///
/// # Errors
/// As [`header_end`] and [`parse_header`].
pub fn parse_shard(data: &[u8], file: &str) -> Result<Vec<HeaderTensor>, LoadError> {
    let end = header_end(&data[..data.len().min(8)], data.len() as u64, file)?;
    let end = usize::try_from(end).expect("not beyond the data");
    parse_header(&data[8..end], data.len() as u64, file)
}

/// The header's object, in document order and with duplicates, which a map type would lose.
struct Entries(Vec<HeaderTensor>);

#[derive(Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut out = Vec::new();
                while let Some(name) = map.next_key::<Name<'_>>()? {
                    if name.0 == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let raw: RawTensor<'_> = map.next_value()?;
                    let dtype = StoredDtype::from_name(&raw.dtype)
                        .map_or_else(|| HeaderDtype::Other(raw.dtype.into()), HeaderDtype::Known);
                    let [begin, end] = raw.data_offsets;
                    let name = name.0.into();
                    out.push(HeaderTensor { name, dtype, shape: raw.shape.into(), begin, end });
                }
                Ok(Entries(out))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// A string that borrows from the text unless it holds escapes.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct Name<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);
