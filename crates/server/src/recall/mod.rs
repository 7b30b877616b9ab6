//! What the model said, token for token: so that a conversation sent back as JSON is found in the
//! prefix cache up to its last full block.
//!
//! A client returns an answer as text. Encoding it again may spell it in other tokens than were
//! sampled, and everything after the first difference would be computed again. [`AnswerMemory`] maps
//! *(all tokens before an answer, the answer as a prompt renders it)* to the sampled tokens. A client
//! that changed anything, in the answer or before it, asks for another key, and its own words count.
//!
//! Invariants:
//! - the key covers model, cache salt and, where users are isolated, the user: nobody's prompt is
//!   counted or cached differently because of what somebody else was told;
//! - remembered tokens say exactly what the rendered answer says ([`fathom_chat::AnswerTurn`]);
//! - memory and file are bounded; what was used longest ago goes first, and losing it costs time only.
//!
//! Not here: the file ([`log`]), which answers qualify (`chat`).

mod log;
#[cfg(test)]
mod log_tests;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fathom_chat::{AnswerTurn, ParserOptions, Tokenizer, Turn};
use fathom_core::TokenId;
use xxhash_rust::xxh3::Xxh3;

use log::Log;

/// Memory of an entry beside its tokens: two map nodes and an allocation.
const ENTRY_BYTES: usize = 160;

/// Names an answer at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key(u128);

/// Remembered answers, shared by all requests.
pub(crate) struct AnswerMemory {
    /// Keys depend on it: a client cannot construct two conversations with one key.
    seed: u64,
    entries: Mutex<Entries>,
    log: Option<Log>,
}

impl AnswerMemory {
    /// A memory of at most `limit_bytes`, with what the file in `directory` remembers. Without a
    /// directory, or if another process uses the file, it forgets at the end.
    pub(crate) fn open(limit_bytes: usize, directory: Option<&Path>) -> Arc<Self> {
        let mut entries = Entries::new(limit_bytes);
        let log = directory
            .filter(|_| limit_bytes > 0)
            .and_then(|directory| Log::open(directory, limit_bytes as u64, &mut entries));
        // The standard library seeds its hash maps from the system's randomness.
        let seed =
            log.as_ref().map_or_else(|| RandomState::new().build_hasher().finish(), Log::seed);
        Arc::new(Self { seed, entries: Mutex::new(entries), log })
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Nothing in the entries is half-done between two statements.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, key: Key, ids: Arc<[TokenId]>) {
        let mut entries = self.entries();
        if entries.insert(key, Arc::clone(&ids))
            && let Some(log) = &self.log
            && !log.append(key, ids)
        {
            // The file is full of what has been forgotten since.
            log.rewrite(entries.oldest_first());
        }
    }

    /// Begins to read a prompt of `scope` from its start.
    pub(crate) fn walk(self: &Arc<Self>, scope: &Scope<'_>) -> Walk {
        let mut prefix = Xxh3::with_seed(self.seed);
        let parts = [Some(scope.fingerprint), scope.cache_salt, scope.user];
        for part in parts {
            // The length keeps ("ab", "c") and ("a", "bc") apart, its absence None and "".
            prefix.update(&part.map_or(0, |part| part.len() as u64 + 1).to_le_bytes());
            prefix.update(part.unwrap_or_default().as_bytes());
        }
        Walk { memory: Arc::clone(self), prefix, n_absorbed: 0 }
    }
}

/// Whose conversations share answers.
pub(crate) struct Scope<'a> {
    pub(crate) fingerprint: &'a str,
    pub(crate) cache_salt: Option<&'a str>,
    /// `None` if users are not isolated.
    pub(crate) user: Option<&'a str>,
}

/// A prompt, read from its start to the coming answer.
pub(crate) struct Walk {
    memory: Arc<AnswerMemory>,
    prefix: Xxh3,
    n_absorbed: usize,
}

impl Walk {
    /// The tokens of the answer `turn` that stands after `before`, if it was given here. Calls of one
    /// walk extend `before`.
    pub(crate) fn recall(&mut self, before: &[TokenId], turn: Turn<'_>) -> Option<Arc<[TokenId]>> {
        self.absorb(before);
        let key = self.key(turn);
        self.memory.entries().get(key)
    }

    fn absorb(&mut self, before: &[TokenId]) {
        for chunk in before[self.n_absorbed..].chunks(256) {
            let mut bytes = [0; 4 * 256];
            for (bytes, id) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(chunk) {
                *bytes = id.to_le_bytes();
            }
            self.prefix.update(&bytes[..4 * chunk.len()]);
        }
        self.n_absorbed = before.len();
    }

    fn key(&self, turn: Turn<'_>) -> Key {
        let mut hasher = Xxh3::with_seed(self.memory.seed);
        hasher.update(&self.prefix.digest128().to_le_bytes());
        turn.bytes(|bytes| hasher.update(bytes));
        Key(hasher.digest128())
    }

    /// Gets ready to remember the answer to the prompt `ids`, of which the first `n_before_answer`
    /// come before it.
    pub(crate) fn listen(mut self, ids: &[TokenId], n_before_answer: usize) -> Listener {
        self.absorb(&ids[..n_before_answer]);
        Listener { walk: Arc::new(self), opened: ids[n_before_answer..].into() }
    }
}

/// Remembers an answer when it is complete. Clones listen to other answers to the same prompt.
#[derive(Clone)]
pub(crate) struct Listener {
    walk: Arc<Walk>,
    /// Tokens of the answer that the prompt held.
    opened: Arc<[TokenId]>,
}

impl Listener {
    /// Remembers the answer `sampled`, which was read with `options`.
    pub(crate) fn remember(
        &self,
        tokenizer: &Tokenizer,
        options: &ParserOptions,
        sampled: &[TokenId],
    ) {
        let turn = AnswerTurn::new(tokenizer, options, &self.opened, sampled);
        let Some(turn) = turn else { return };
        if let Some(rendered) = turn.rendered() {
            self.walk.memory.remember(self.walk.key(rendered), turn.ids().into());
        }
    }
}

/// Tokens by key, least recently used first out.
struct Entries {
    limit_bytes: usize,
    used_bytes: usize,
    by_key: HashMap<Key, Entry>,
    /// Ascending: least recently used first.
    by_use: BTreeMap<u64, Key>,
    clock: u64,
}

struct Entry {
    ids: Arc<[TokenId]>,
    used: u64,
}

impl Entries {
    fn new(limit_bytes: usize) -> Self {
        let (by_key, by_use) = (HashMap::new(), BTreeMap::new());
        Self { limit_bytes, used_bytes: 0, by_key, by_use, clock: 0 }
    }

    fn bytes_of(ids: &[TokenId]) -> usize {
        ENTRY_BYTES + size_of_val(ids)
    }

    fn get(&mut self, key: Key) -> Option<Arc<[TokenId]>> {
        let entry = self.by_key.get_mut(&key)?;
        self.clock += 1;
        self.by_use.remove(&std::mem::replace(&mut entry.used, self.clock));
        self.by_use.insert(self.clock, key);
        Some(Arc::clone(&entry.ids))
    }

    /// Keeps the newest answer of a key. False if nothing changed: it is known, or too long.
    fn insert(&mut self, key: Key, ids: Arc<[TokenId]>) -> bool {
        let bytes = Self::bytes_of(&ids);
        if bytes > self.limit_bytes || self.get(key).is_some_and(|known| known == ids) {
            return false;
        }
        self.remove(key);
        while self.used_bytes + bytes > self.limit_bytes {
            let Some((_, &oldest)) = self.by_use.first_key_value() else { break };
            self.remove(oldest);
        }
        self.clock += 1;
        self.used_bytes += bytes;
        self.by_use.insert(self.clock, key);
        self.by_key.insert(key, Entry { ids, used: self.clock });
        true
    }

    fn remove(&mut self, key: Key) {
        if let Some(entry) = self.by_key.remove(&key) {
            self.by_use.remove(&entry.used);
            self.used_bytes -= Self::bytes_of(&entry.ids);
        }
    }

    fn oldest_first(&self) -> Vec<(Key, Arc<[TokenId]>)> {
        let ids = |key: &Key| self.by_key.get(key).map(|entry| (*key, Arc::clone(&entry.ids)));
        self.by_use.values().filter_map(ids).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: u32) -> Arc<[TokenId]> {
        (0..n).collect()
    }

    #[test]
    fn what_was_used_longest_ago_is_forgotten_first_and_the_limit_holds() {
        let mut entries = Entries::new(2 * (ENTRY_BYTES + 40));
        assert!(entries.insert(Key(1), ids(10)) && entries.insert(Key(2), ids(10)));
        assert!(entries.get(Key(1)).is_some());
        assert!(entries.insert(Key(3), ids(10)));
        assert!(entries.get(Key(2)).is_none());
        assert_eq!(entries.oldest_first().iter().map(|(key, _)| key.0).collect::<Vec<_>>(), [1, 3]);
        assert!(entries.used_bytes <= entries.limit_bytes);
        assert!(!entries.insert(Key(4), ids(1000)), "longer than the limit");
        assert_eq!(entries.by_key.len(), 2);
    }

    #[test]
    fn the_newest_answer_of_a_key_counts_and_repeating_it_changes_nothing() {
        let mut entries = Entries::new(1 << 20);
        assert!(entries.insert(Key(1), ids(3)));
        assert!(!entries.insert(Key(1), ids(3)));
        assert!(entries.insert(Key(1), ids(4)));
        assert_eq!((entries.get(Key(1)), entries.by_use.len()), (Some(ids(4)), 1));
        assert_eq!(entries.used_bytes, Entries::bytes_of(&ids(4)));
    }

    #[test]
    fn scopes_and_prefixes_have_keys_of_their_own() {
        let memory = AnswerMemory::open(1 << 20, None);
        let scope = |fingerprint, cache_salt, user| Scope { fingerprint, cache_salt, user };
        let digest = |scope: Scope<'_>, before: &[TokenId]| {
            let mut walk = memory.walk(&scope);
            walk.absorb(before);
            walk.prefix.digest128()
        };
        let all = [
            digest(scope("fp", None, None), &[1, 2]),
            digest(scope("fp", None, None), &[1, 3]),
            digest(scope("fp", Some(""), None), &[1, 2]),
            digest(scope("fp", None, Some("")), &[1, 2]),
            digest(scope("fp", Some("ab"), Some("c")), &[1, 2]),
            digest(scope("fp", Some("a"), Some("bc")), &[1, 2]),
            digest(scope("other", None, None), &[1, 2]),
        ];
        for (index, key) in all.iter().enumerate() {
            assert!(!all[..index].contains(key), "{index} repeats an earlier one");
        }
        let mut walk = memory.walk(&scope("fp", None, None));
        walk.absorb(&[1]);
        walk.absorb(&[1, 2]);
        assert_eq!(walk.prefix.digest128(), all[0], "in parts as at once");
    }
}
