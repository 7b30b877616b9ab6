//! Byte-pair merging: a piece's bytes to token ids.
//!
//! Merges the pair of lowest rank first, the leftmost of those, until none is left. A pair that
//! waits in the queue is merged if, when its turn comes, the symbols at its place still make the
//! same token: exactly the rule of the reference implementation, whose ids this must give.
//!
//! Pieces that are one token on their own (most words) are found by one look-up.
//!
//! Not here: where pieces come from (`split`).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use fathom_core::TokenId;
use serde_json::Value;

/// Merges and the words that are single tokens.
pub(super) struct Bpe {
    /// `[256]`: the token of each byte.
    bytes: Vec<TokenId>,
    merges: FastMap<u64, Merge>,
    words: FastMap<Box<[u8]>, TokenId>,
}

type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FastHasher>>;

#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    token: TokenId,
}

/// Buffers that one text's pieces share.
#[derive(Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    /// Rank, position and token of pairs to merge, the next one first.
    queue: BinaryHeap<Reverse<(u32, u32, TokenId)>>,
}

/// A token in the piece under way; a doubly linked list by index.
#[derive(Clone, Copy)]
struct Symbol {
    token: TokenId,
    previous: u32,
    next: u32,
    merged_away: bool,
}

const END: u32 = u32::MAX;

impl Bpe {
    /// Reads the `model` of a tokenizer.json, where `bytes_of` gives a vocabulary entry's bytes.
    /// `None` if it is not plain byte-pair encoding over all bytes.
    pub(super) fn from_json(
        model: &Value,
        bytes_of: impl Fn(&str) -> Option<Vec<u8>>,
    ) -> Option<Self> {
        let off = |key: &str| {
            matches!(model.get(key), None | Some(Value::Null | Value::Bool(false)))
                || model.get(key).and_then(Value::as_str) == Some("")
        };
        let options = [
            "dropout",
            "unk_token",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "fuse_unk",
            "byte_fallback",
            "ignore_merges",
        ];
        if model.get("type")?.as_str()? != "BPE" || !options.into_iter().all(off) {
            return None;
        }
        let mut ids: HashMap<&str, TokenId> = HashMap::new();
        let mut entries: Vec<(Vec<u8>, TokenId)> = Vec::new();
        for (text, id) in model.get("vocab")?.as_object()? {
            let id = TokenId::try_from(id.as_u64()?).ok()?;
            ids.insert(text, id);
            entries.extend(bytes_of(text).map(|bytes| (bytes, id)));
        }
        let mut bytes = vec![None; 256];
        for (entry, id) in &entries {
            if let [byte] = entry[..] {
                bytes[usize::from(byte)] = Some(*id);
            }
        }
        let bytes = bytes.into_iter().collect::<Option<Vec<TokenId>>>()?;

        let mut merges = FastMap::default();
        for (rank, merge) in model.get("merges")?.as_array()?.iter().enumerate() {
            let (left, right) = match merge {
                Value::String(pair) => pair.split_once(' ')?,
                Value::Array(pair) => match &pair[..] {
                    [left, right] => (left.as_str()?, right.as_str()?),
                    _ => return None,
                },
                _ => return None,
            };
            let token = *ids.get(format!("{left}{right}").as_str())?;
            let merge = Merge { rank: u32::try_from(rank).ok()?, token };
            merges.insert(pair(*ids.get(left)?, *ids.get(right)?), merge);
        }

        let mut bpe = Self { bytes, merges, words: FastMap::default() };
        let mut scratch = Scratch::default();
        let mut out = Vec::new();
        for (entry, id) in entries {
            out.clear();
            bpe.merge(&entry, &mut scratch, &mut out);
            if out == [id] {
                bpe.words.insert(entry.into_boxed_slice(), id);
            }
        }
        Some(bpe)
    }

    /// Appends the ids of a piece.
    pub(super) fn encode(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        match self.words.get(piece) {
            Some(&id) => out.push(id),
            None => self.merge(piece, scratch, out),
        }
    }

    fn merge(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let Scratch { symbols, queue } = scratch;
        symbols.clear();
        queue.clear();
        let n = u32::try_from(piece.len()).expect("a piece is shorter than 4 GiB");
        symbols.extend(piece.iter().zip(0..n).map(|(&byte, i)| Symbol {
            token: self.bytes[usize::from(byte)],
            previous: i.checked_sub(1).unwrap_or(END),
            next: if i + 1 < n { i + 1 } else { END },
            merged_away: false,
        }));
        for i in 1..n {
            self.enqueue(symbols, i - 1, i, queue);
        }
        while let Some(Reverse((_, at, token))) = queue.pop() {
            let left = symbols[at as usize];
            if left.merged_away || left.next == END {
                continue;
            }
            let right = symbols[left.next as usize];
            // The pair may have changed since it was queued.
            if self.merges.get(&pair(left.token, right.token)).is_none_or(|m| m.token != token) {
                continue;
            }
            symbols[left.next as usize].merged_away = true;
            symbols[at as usize].token = token;
            symbols[at as usize].next = right.next;
            if right.next != END {
                symbols[right.next as usize].previous = at;
                self.enqueue(symbols, at, right.next, queue);
            }
            if left.previous != END {
                self.enqueue(symbols, left.previous, at, queue);
            }
        }
        out.extend(symbols.iter().filter(|symbol| !symbol.merged_away).map(|symbol| symbol.token));
    }

    fn enqueue(
        &self,
        symbols: &[Symbol],
        left: u32,
        right: u32,
        queue: &mut BinaryHeap<Reverse<(u32, u32, TokenId)>>,
    ) {
        let tokens = pair(symbols[left as usize].token, symbols[right as usize].token);
        if let Some(merge) = self.merges.get(&tokens) {
            queue.push(Reverse((merge.rank, left, merge.token)));
        }
    }
}

fn pair(left: TokenId, right: TokenId) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// A quick hash for token pairs and words: multiply and rotate, as in rustc's own tables. All
/// keys come from the tokenizer file, so no request can make them collide.
#[derive(Default)]
pub(super) struct FastHasher(u64);

impl FastHasher {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for FastHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.add(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.add(u64::from_le_bytes(last));
    }

    fn write_u64(&mut self, word: u64) {
        self.add(word);
    }

    fn write_usize(&mut self, word: usize) {
        self.add(word as u64);
    }

    fn finish(&self) -> u64 {
        // The table takes its index from the low bits and its tag from the high ones.
        self.0 ^ self.0 >> 32
    }
}
