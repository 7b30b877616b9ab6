//! One piece of cached state as a file: a header that says what it is, then the bytes.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `FATHOMKV` |
//! | 8 | 4 | version of this format |
//! | 12 | 4 | 0 for a KV block, 1 for a snapshot |
//! | 16 | 16 | hash of the namespace: model, numeric mode, row formats, geometry |
//! | 32 | 16 | key of the prefix |
//! | 48 | 8 | bytes that follow the header |
//! | 56 | 8 | xxh3 of them |
//! | 64 | 8 | xxh3 of the 64 bytes before |
//!
//! All numbers are little-endian. What does not match in every field is not used.
//!
//! Not here: where files are and which there are (`disk`).

use fathom_scheduler::{StateKey, StateKind};
use xxhash_rust::xxh3::xxh3_64;

/// Bytes before the state.
pub(super) const HEADER_BYTES: usize = 72;

const MAGIC: [u8; 8] = *b"FATHOMKV";
const VERSION: u32 = 1;

/// A file cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Damage {
    #[error("it ends in its header, after {got} bytes")]
    ShortHeader { got: usize },
    #[error("it does not begin as a cache file does")]
    Foreign,
    #[error("it has format version {got}, this program reads {VERSION}")]
    Version { got: u32 },
    #[error("the checksum of its header is wrong")]
    HeaderChecksum,
    #[error("it belongs to another model or row format")]
    Namespace,
    #[error("it holds something else than its name says")]
    Name,
    #[error("{got} bytes follow the header, which announces {expected}")]
    Length { got: usize, expected: u64 },
    #[error("the checksum of its content is wrong")]
    Checksum,
}

/// The header of `bytes`, which are the state `state` in a namespace.
pub(super) fn header(namespace: u128, state: StateKey, bytes: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let mut end = 0;
    let mut put = |field: &[u8]| {
        header[end..end + field.len()].copy_from_slice(field);
        end += field.len();
    };
    put(&MAGIC);
    put(&VERSION.to_le_bytes());
    put(&kind_number(state.kind).to_le_bytes());
    put(&namespace.to_le_bytes());
    put(&state.key.0.to_le_bytes());
    put(&(bytes.len() as u64).to_le_bytes());
    put(&xxh3_64(bytes).to_le_bytes());
    let checksum = xxh3_64(&header[..HEADER_BYTES - 8]);
    header[HEADER_BYTES - 8..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Checks a whole file that should hold `state`; its state begins at [`HEADER_BYTES`].
///
/// # Errors
/// The first [`Damage`] found.
pub(super) fn check(file: &[u8], namespace: u128, state: StateKey) -> Result<(), Damage> {
    let Some((header, bytes)) = file.split_first_chunk::<HEADER_BYTES>() else {
        return Err(Damage::ShortHeader { got: file.len() });
    };
    if field::<8>(header, 0) != MAGIC {
        return Err(Damage::Foreign);
    }
    // Before the checksum: another version may compute it differently.
    let got = u32::from_le_bytes(field(header, 8));
    if got != VERSION {
        return Err(Damage::Version { got });
    }
    if u64::from_le_bytes(field(header, 64)) != xxh3_64(&header[..HEADER_BYTES - 8]) {
        return Err(Damage::HeaderChecksum);
    }
    if u128::from_le_bytes(field(header, 16)) != namespace {
        return Err(Damage::Namespace);
    }
    let kind = u32::from_le_bytes(field(header, 12));
    let key = u128::from_le_bytes(field(header, 32));
    if (kind, key) != (kind_number(state.kind), state.key.0) {
        return Err(Damage::Name);
    }
    let expected = u64::from_le_bytes(field(header, 48));
    if bytes.len() as u64 != expected {
        return Err(Damage::Length { got: bytes.len(), expected });
    }
    if u64::from_le_bytes(field(header, 56)) != xxh3_64(bytes) {
        return Err(Damage::Checksum);
    }
    Ok(())
}

fn field<const N: usize>(header: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&header[offset..offset + N]);
    field
}

const fn kind_number(kind: StateKind) -> u32 {
    match kind {
        StateKind::Block => 0,
        StateKind::Snapshot => 1,
    }
}

#[cfg(test)]
mod tests {
    use fathom_scheduler::BlockKey;
    use proptest::prelude::*;

    use super::*;

    const NAMESPACE: u128 = 77;

    fn state(key: u128) -> StateKey {
        StateKey { kind: StateKind::Snapshot, key: BlockKey(key) }
    }

    fn file(bytes: &[u8]) -> Vec<u8> {
        [&header(NAMESPACE, state(5), bytes)[..], bytes].concat()
    }

    #[test]
    fn a_file_cut_at_any_byte_or_with_any_bit_flipped_is_not_used() {
        let whole = file(b"some state of a sequence");
        assert_eq!(check(&whole, NAMESPACE, state(5)), Ok(()));
        for len in 0..whole.len() {
            assert!(check(&whole[..len], NAMESPACE, state(5)).is_err(), "cut to {len} bytes");
        }
        for bit in 0..8 * whole.len() {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&flipped, NAMESPACE, state(5)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn each_kind_of_mismatch_is_named() {
        let whole = file(b"state");
        let check = |file: &[u8]| check(file, NAMESPACE, state(5)).unwrap_err();
        assert_eq!(check(b"short"), Damage::ShortHeader { got: 5 });
        assert_eq!(check(&[7; 200]), Damage::Foreign);
        let mut newer = whole.clone();
        newer[8] = 9;
        assert_eq!(check(&newer), Damage::Version { got: 9 });
        let longer = [&whole[..], b"x"].concat();
        assert_eq!(check(&longer), Damage::Length { got: 6, expected: 5 });
        assert_eq!(super::check(&whole, 78, state(5)), Err(Damage::Namespace));
        assert_eq!(super::check(&whole, NAMESPACE, state(6)), Err(Damage::Name));
        let other = StateKey { kind: StateKind::Block, ..state(5) };
        assert_eq!(super::check(&whole, NAMESPACE, other), Err(Damage::Name));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            replaced in 0..HEADER_BYTES,
        ) {
            prop_assert!(check(&bytes, NAMESPACE, state(5)).is_err());
            // A header that is right up to some byte.
            let mut mixed = file(&[1, 2, 3]);
            for (byte, &other) in mixed[replaced..].iter_mut().zip(&bytes) {
                *byte = other;
            }
            let expected = file(&[1, 2, 3]) == mixed;
            prop_assert_eq!(check(&mixed, NAMESPACE, state(5)).is_ok(), expected);
        }
    }
}
