//! Look-up tables that lie flat: most of tokenising is waiting for memory.
//!
//! Both are filled once from the tokenizer file and then only read: open addressing with linear
//! probing, at most half full, keys beside their values, so that a look-up is one cache line most of
//! the time. No request can make keys collide, because all of them come from the file.
//!
//! Not here: what is looked up when (`bpe`).

use std::collections::HashMap;

use fathom_core::TokenId;

/// Longest text that fits a key.
const SHORT: usize = 15;

/// A text of 1 to [`SHORT`] bytes and its length, in two words. Never `[0, 0]`.
pub(super) type Key = [u64; 2];

/// The key of a text, if it is short enough.
pub(super) fn key(text: &[u8]) -> Option<Key> {
    let len = text.len();
    let tag = (len as u64) << 56;
    // Each arm reads the first and the last bytes, which overlap where there are fewer.
    match len {
        1..=3 => {
            let byte = |at: usize| u64::from(text[at]) << (8 * at);
            Some([byte(0) | byte(len / 2) | byte(len - 1), tag])
        }
        4..=7 => {
            let first = u32::from_le_bytes(*text.first_chunk()?);
            let last = u32::from_le_bytes(*text.last_chunk()?);
            Some([u64::from(first) | u64::from(last) << (8 * (len - 4)), tag])
        }
        8..=SHORT => {
            let first = u64::from_le_bytes(*text.first_chunk()?);
            let last = u64::from_le_bytes(*text.last_chunk()?);
            let rest = last.checked_shr(8 * (16 - len as u32)).unwrap_or(0);
            Some([first, rest | tag])
        }
        _ => None,
    }
}

pub(super) fn hash(key: Key) -> u64 {
    let mixed = key[0].wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key[1].rotate_left(29);
    (mixed ^ mixed >> 32).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Slots of a table for `n` entries, as the number of bits of an index.
fn bits_for(n: usize) -> u32 {
    (2 * n).next_power_of_two().trailing_zeros().max(1)
}

/// Texts that are one token.
pub(super) struct WordTable {
    short: Vec<(Key, TokenId)>,
    bits: u32,
    long: HashMap<Box<[u8]>, TokenId>,
    longest: usize,
}

impl WordTable {
    pub(super) fn new(words: Vec<(Vec<u8>, TokenId)>) -> Self {
        let bits = bits_for(words.len());
        let longest = words.iter().map(|(word, _)| word.len()).max().unwrap_or(0);
        let mut table =
            Self { short: vec![([0; 2], 0); 1 << bits], bits, long: HashMap::new(), longest };
        for (word, token) in words {
            match key(&word) {
                Some(key) => {
                    let slot = table.slot(key);
                    table.short[slot] = (key, token);
                }
                None => drop(table.long.insert(word.into_boxed_slice(), token)),
            }
        }
        table
    }

    /// Where the key is, or would be.
    fn slot(&self, key: Key) -> usize {
        let mut slot = (hash(key) >> (64 - self.bits)) as usize;
        while self.short[slot].0 != key && self.short[slot].0 != [0; 2] {
            slot = (slot + 1) & (self.short.len() - 1);
        }
        slot
    }

    /// The token of a short text.
    pub(super) fn get_short(&self, key: Key) -> Option<TokenId> {
        let (found, token) = self.short[self.slot(key)];
        (found == key).then_some(token)
    }

    /// The token of a text that has no key.
    pub(super) fn get_long(&self, text: &[u8]) -> Option<TokenId> {
        if text.len() > self.longest {
            return None;
        }
        self.long.get(text).copied()
    }
}

/// What becomes of two tokens side by side. A pair that does not merge has rank [`Merge::NEVER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Merge {
    pub(super) rank: u32,
    pub(super) token: TokenId,
}

impl Merge {
    pub(super) const NEVER: u32 = u32::MAX;
    const NONE: Self = Self { rank: Self::NEVER, token: 0 };
}

/// Which pairs of tokens merge.
pub(super) struct MergeTable {
    slots: Vec<(u64, Merge)>,
    bits: u32,
    /// `[256 * 256]`: the merges of two bytes, where every piece begins.
    bytes: Vec<Merge>,
}

/// No pair of tokens: ids are below 2^24.
const EMPTY: u64 = u64::MAX;

impl MergeTable {
    /// A table of `merges`, each a pair and what becomes of it. Of equal pairs the last one counts.
    /// `bytes` is `[256]`, the token of each byte.
    pub(super) fn new(merges: &[([TokenId; 2], Merge)], bytes: &[TokenId]) -> Self {
        let bits = bits_for(merges.len());
        let slots = vec![(EMPTY, Merge::NONE); 1 << bits];
        let mut table = Self { slots, bits, bytes: Vec::new() };
        for &([left, right], merge) in merges {
            let slot = table.slot(pair(left, right));
            table.slots[slot] = (pair(left, right), merge);
        }
        table.bytes = bytes
            .iter()
            .flat_map(|&left| bytes.iter().map(move |&right| (left, right)))
            .map(|(left, right)| table.get(left, right))
            .collect();
        table
    }

    fn slot(&self, pair: u64) -> usize {
        let mut slot = (hash([pair, 0]) >> (64 - self.bits)) as usize;
        while self.slots[slot].0 != pair && self.slots[slot].0 != EMPTY {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        slot
    }

    /// What becomes of two tokens.
    pub(super) fn get(&self, left: TokenId, right: TokenId) -> Merge {
        self.slots[self.slot(pair(left, right))].1
    }

    /// What becomes of the tokens of two bytes.
    pub(super) fn of_bytes(&self, left: u8, right: u8) -> Merge {
        self.bytes[usize::from(left) << 8 | usize::from(right)]
    }
}

fn pair(left: TokenId, right: TokenId) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn texts_have_the_same_key_only_if_they_are_the_same(
            a in prop::collection::vec(0_u8..3, 1..=SHORT),
            b in prop::collection::vec(0_u8..3, 1..=SHORT),
        ) {
            prop_assert_eq!(key(&a) == key(&b), a == b);
            prop_assert_ne!(key(&a).unwrap(), [0; 2]);
        }

        #[test]
        fn words_are_found_and_others_are_not(
            words in prop::collection::btree_set(prop::collection::vec(0_u8..4, 1..20), 0..300),
            other in prop::collection::vec(0_u8..4, 1..20),
        ) {
            let words: Vec<(Vec<u8>, TokenId)> = words.into_iter().zip(1..).collect();
            let table = WordTable::new(words.clone());
            let get = |word: &[u8]| match key(word) {
                Some(key) => table.get_short(key),
                None => table.get_long(word),
            };
            for (word, token) in &words {
                prop_assert_eq!(get(word), Some(*token));
            }
            let known = words.iter().find(|(word, _)| *word == other).map(|(_, token)| *token);
            prop_assert_eq!(get(&other), known);
        }

        #[test]
        fn merges_are_found_and_others_are_not(
            merges in prop::collection::btree_map((0_u32..40, 0_u32..40), 0_u32..9, 0..300),
            (left, right) in (0_u32..50, 0_u32..50),
        ) {
            let listed: Vec<_> = merges
                .iter()
                .map(|(&(left, right), &rank)| ([left, right], Merge { rank, token: left * right }))
                .collect();
            let table = MergeTable::new(&listed, &[7; 256]);
            let expected = merges.get(&(left, right)).map_or(Merge::NONE, |&rank| {
                Merge { rank, token: left * right }
            });
            prop_assert_eq!(table.get(left, right), expected);
            prop_assert_eq!(table.of_bytes(1, 2), table.get(7, 7));
        }
    }

    #[test]
    fn a_key_has_no_room_for_more() {
        assert_eq!(key(b""), None);
        assert_eq!(key(&[1; SHORT + 1]), None);
    }
}
