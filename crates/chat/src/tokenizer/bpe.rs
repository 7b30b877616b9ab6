//! Byte-pair merging: a piece's bytes to token ids.
//!
//! Merges the pair of lowest rank first, the leftmost of those, until none is left. A pair that
//! waits in the queue is merged if, when its turn comes, the symbols at its place still make the
//! same token: exactly the rule of the reference implementation, whose ids this must give.
//!
//! Pieces that are one token on their own (most words) are found by one look-up. Pieces of any
//! length take time and memory in proportion: a long one is merged in windows whose tokens are
//! joined where that provably changes nothing ([`Bpe::encode_long`]).
//!
//! Not here: where pieces come from (`split`).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use fathom_core::TokenId;
use serde_json::Value;

use super::tables::{Key, Merge, MergeTable, WordTable, hash, key};

/// Merges and the words that are single tokens.
pub(super) struct Bpe {
    /// `[256]`: the token of each byte.
    bytes: Vec<TokenId>,
    merges: MergeTable,
    words: WordTable,
    /// `[n_merges]`: what each makes, by rank.
    made: Vec<TokenId>,
    /// Whether different pairs make the same token. Then a pair's place in the queue may be taken by
    /// another one's, and only the queue gives the reference's order.
    has_twins: bool,
    /// `[vocab_size]`: how many bytes each token stands for; 0 for those that merges cannot make.
    lengths: Vec<u32>,
    /// The most bytes that a token stands for.
    longest: usize,
}

/// Bytes of a long piece that are merged at once, and how many of them are merged again together
/// with what follows. Both are far beyond what a token spans in any tokenizer worth the name; for
/// others they grow with the longest token.
const WINDOW: usize = 4096;
const OVERLAP: usize = 512;

/// Longest piece that is merged without a queue: looking at all pairs is quicker there.
const SHORT: usize = 32;

/// Buffers that one text's pieces share.
#[derive(Default)]
pub(crate) struct Scratch {
    symbols: Vec<Symbol>,
    /// Tokens of a window, and of the two tokens at a seam.
    window: Vec<TokenId>,
    seam: Vec<TokenId>,
    /// Short pieces that were merged: names and rare words come again and again. Nothing at first,
    /// because most texts are short.
    recent: Vec<Recent>,
    n_merged: usize,
    /// Pairs to merge, the next one first: the rank in the high half, the place in the low one.
    queue: BinaryHeap<Reverse<u64>>,
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

/// A piece and the tokens it was merged to.
#[derive(Clone, Copy)]
struct Recent {
    key: Key,
    n_tokens: usize,
    tokens: [TokenId; Self::MOST],
}

impl Recent {
    const NONE: Self = Self { key: [0; 2], n_tokens: 0, tokens: [0; Self::MOST] };
    /// Most tokens that are kept, and kept pieces as bits of an index: 100 KB.
    const MOST: usize = 6;
    const BITS: u32 = 11;
    /// Merged pieces after which a text counts as long.
    const AFTER: usize = 64;
}

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

        let mut merges = Vec::new();
        let mut made = Vec::new();
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
            made.push(token);
            merges.push(([*ids.get(left)?, *ids.get(right)?], merge));
        }

        let has_twins = made.iter().collect::<HashSet<_>>().len() < made.len();
        let n_ids = entries.iter().map(|&(_, id)| id as usize + 1).max().unwrap_or(0);
        let mut lengths = vec![0; n_ids];
        for (entry, id) in &entries {
            lengths[*id as usize] = u32::try_from(entry.len()).ok()?;
        }
        let longest = entries.iter().map(|(entry, _)| entry.len()).max().unwrap_or(0);
        let merges = MergeTable::new(&merges, &bytes);
        let words = WordTable::new(Vec::new());
        let mut bpe = Self { bytes, merges, words, made, has_twins, lengths, longest };
        let mut scratch = Scratch::default();
        let mut out = Vec::new();
        entries.retain(|(entry, id)| {
            out.clear();
            bpe.merge(entry, &mut scratch, &mut out);
            out == [*id]
        });
        bpe.words = WordTable::new(entries);
        Some(bpe)
    }

    /// Appends the ids of a piece.
    pub(super) fn encode(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let Some(key) = key(piece) else {
            match self.words.get_long(piece) {
                Some(id) => out.push(id),
                None if piece.len() > self.window() => self.encode_long(piece, scratch, out),
                None => self.merge(piece, scratch, out),
            }
            return;
        };
        if let Some(id) = self.words.get_short(key) {
            out.push(id);
            return;
        }
        if scratch.n_merged < Recent::AFTER {
            scratch.n_merged += 1;
            self.merge(piece, scratch, out);
            return;
        }
        scratch.recent.resize(1 << Recent::BITS, Recent::NONE);
        let slot = (hash(key) >> (64 - Recent::BITS)) as usize;
        let recent = &scratch.recent[slot];
        if recent.key == key {
            out.extend_from_slice(&recent.tokens[..recent.n_tokens]);
            return;
        }
        let first = out.len();
        self.merge(piece, scratch, out);
        let merged = &out[first..];
        if merged.len() <= Recent::MOST {
            let mut tokens = [0; Recent::MOST];
            tokens[..merged.len()].copy_from_slice(merged);
            scratch.recent[slot] = Recent { key, n_tokens: merged.len(), tokens };
        }
    }

    fn window(&self) -> usize {
        WINDOW.max(8 * self.longest)
    }

    /// Appends the ids of a piece of any length, with work and memory for one window at a time.
    ///
    /// Each window begins at the end of a token of the one before it, `OVERLAP` bytes or more before
    /// that one's end. The tokens left and right of such a seam stand if merging the bytes of just
    /// these two gives the same two: the first merge across any seam would only have seen bytes of
    /// the two tokens beside it, so it would happen there as well. If it does, the seam moves left.
    fn encode_long(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let (window, overlap) = (self.window(), OVERLAP.max(self.longest));
        let first = out.len();
        let mut at = 0;
        let mut end = window.min(piece.len());
        let mut n_back = 1;
        let mut tokens = std::mem::take(&mut scratch.window);
        loop {
            tokens.clear();
            self.merge(&piece[at..end], scratch, &mut tokens);
            if out.len() > first && !self.is_seam(&piece[..end], at, out, &tokens, scratch) {
                // Twice as far each time, so that going back costs no more than the way back.
                let keep = first.max(out.len().saturating_sub(n_back));
                n_back *= 2;
                at -= out.drain(keep..).map(|token| self.len(token)).sum::<usize>();
                continue;
            }
            n_back = 1;
            if end == piece.len() {
                out.append(&mut tokens);
                scratch.window = tokens;
                return;
            }
            for &token in &tokens {
                if at + self.len(token) > end - overlap {
                    break;
                }
                at += self.len(token);
                out.push(token);
            }
            end = piece.len().min(at + window);
        }
    }

    /// Whether the last token so far and the first of the next window, which meet at `at`, stay as
    /// they are side by side.
    fn is_seam(
        &self,
        piece: &[u8],
        at: usize,
        before: &[TokenId],
        after: &[TokenId],
        scratch: &mut Scratch,
    ) -> bool {
        let (Some(&left), Some(&right)) = (before.last(), after.first()) else { return true };
        let mut seam = std::mem::take(&mut scratch.seam);
        seam.clear();
        self.merge(&piece[at - self.len(left)..at + self.len(right)], scratch, &mut seam);
        let stands = seam == [left, right];
        scratch.seam = seam;
        stands
    }

    fn len(&self, token: TokenId) -> usize {
        self.lengths[token as usize] as usize
    }

    fn merge(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        if piece.len() <= SHORT && !self.has_twins {
            self.merge_short(piece, out);
        } else {
            self.merge_queued(piece, scratch, out);
        }
    }

    /// Looks at all pairs for the next one to merge.
    fn merge_short(&self, piece: &[u8], out: &mut Vec<TokenId>) {
        let mut n = piece.len();
        let mut tokens = [0; SHORT];
        for (token, &byte) in tokens.iter_mut().zip(piece) {
            *token = self.bytes[usize::from(byte)];
        }
        // What becomes of each token and the one after it.
        let mut ranks = [Merge::NEVER; SHORT];
        let mut merged = [0; SHORT];
        for (at, pair) in piece.windows(2).enumerate() {
            let merge = self.merges.of_bytes(pair[0], pair[1]);
            (ranks[at], merged[at]) = (merge.rank, merge.token);
        }
        while n > 1 {
            let lowest = ranks[..n - 1].iter().copied().min().unwrap_or(Merge::NEVER);
            if lowest == Merge::NEVER {
                break;
            }
            let at = ranks[..n - 1].iter().position(|&rank| rank == lowest).unwrap_or(0);
            tokens[at] = merged[at];
            tokens.copy_within(at + 2..n, at + 1);
            ranks.copy_within(at + 1..n - 1, at);
            merged.copy_within(at + 1..n - 1, at);
            n -= 1;
            for left in [at.wrapping_sub(1), at] {
                if left < n - 1 {
                    let merge = self.merges.get(tokens[left], tokens[left + 1]);
                    (ranks[left], merged[left]) = (merge.rank, merge.token);
                }
            }
        }
        out.extend_from_slice(&tokens[..n]);
    }

    /// Keeps pairs in a queue, the next one to merge first.
    fn merge_queued(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let Scratch { symbols, queue, .. } = scratch;
        symbols.clear();
        queue.clear();
        let n = u32::try_from(piece.len()).expect("a window is shorter than 4 GiB");
        symbols.extend(piece.iter().zip(0..n).map(|(&byte, i)| Symbol {
            token: self.bytes[usize::from(byte)],
            previous: i.checked_sub(1).unwrap_or(END),
            next: if i + 1 < n { i + 1 } else { END },
            merged_away: false,
        }));
        for i in 1..n {
            self.enqueue(symbols, i - 1, i, queue);
        }
        while let Some(Reverse(next)) = queue.pop() {
            let (rank, at) = ((next >> 32) as usize, next as u32);
            let token = self.made[rank];
            let left = symbols[at as usize];
            if left.merged_away || left.next == END {
                continue;
            }
            let right = symbols[left.next as usize];
            // The pair may have changed since it was queued.
            let merge = self.merges.get(left.token, right.token);
            if merge.rank == Merge::NEVER || merge.token != token {
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
        queue: &mut BinaryHeap<Reverse<u64>>,
    ) {
        let merge = self.merges.get(symbols[left as usize].token, symbols[right as usize].token);
        if merge.rank != Merge::NEVER {
            queue.push(Reverse(u64::from(merge.rank) << 32 | u64::from(left)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_of_any_length_takes_the_memory_of_a_window() {
        let json = include_bytes!("../../../../models/nano/tokenizer.json");
        let bpe = super::super::fast_pipeline(&serde_json::from_slice(json).unwrap()).unwrap();
        let mut scratch = Scratch::default();
        let mut ids = Vec::new();
        for unit in ["a", "th", "erin"] {
            bpe.encode(unit.repeat(400_000 / unit.len()).as_bytes(), &mut scratch, &mut ids);
        }
        let bytes = scratch.symbols.capacity() * size_of::<Symbol>()
            + scratch.queue.capacity() * size_of::<u64>()
            + scratch.window.capacity() * size_of::<TokenId>();
        assert!(bytes < 64 * WINDOW, "{bytes} bytes for a window of {WINDOW}");
    }
}
