//! Token ids of turns that were tokenised before, for conversations that grow turn by turn.
//!
//! A prompt is cut before every `<｜User｜>` and `<｜Assistant｜>`. Control tokens end texts for the
//! tokenizer too, so a turn has the same ids whatever stands around it, and the ids put together
//! here are those of [`Prompt::token_ids`]. A conversation that grew by a turn, lost the reasoning
//! of an earlier one, or was edited in the middle pays for the turns that differ.
//!
//! Invariants:
//! - what is found has the same text and the same control tokens: hashes only choose where to look;
//! - nothing is found from another scope or with another tokenizer than it was put in with;
//! - texts and ids kept never exceed the limit, and short turns are not kept at all.
//!
//! Not here: which scopes there are (the server), the prefix cache of the model (`scheduler`).

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use fathom_core::TokenId;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::prompt::{EncodedPrompt, Prompt, Turn};
use crate::special::Special;
use crate::tokenizer::{EncodeScratch, Tokenizer, TokenizerError};

/// Turns shorter than this are tokenised about as fast as they are found.
const MIN_BYTES: usize = 256;
/// What an entry takes besides its text, control tokens and ids, roughly.
const ENTRY_BYTES: usize = 160;

/// Who may find what: requests share entries only if their scopes are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope(u64);

/// What a cache holds and has done, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TurnCacheStats {
    /// Gauge: memory of the entries.
    pub held_bytes: u64,
    /// Text whose ids were found.
    pub reused_bytes: u64,
    /// Text that was tokenised.
    pub encoded_bytes: u64,
}

/// The cache; see the module.
#[derive(Debug)]
pub struct TurnCache {
    /// Half of the limit: what each of the two generations may hold.
    max_generation: usize,
    /// Secret, so that nobody can make entries collide, and scopes cannot be guessed.
    keys: RandomState,
    seed: u64,
    state: Mutex<State>,
}

/// Two generations: what is used moves to the young one; when that is full, it becomes the old one
/// and what nobody used since is forgotten.
#[derive(Debug, Default)]
struct State {
    young: HashMap<u64, Arc<Entry>>,
    old: HashMap<u64, Arc<Entry>>,
    young_bytes: usize,
    old_bytes: usize,
    reused_bytes: u64,
    encoded_bytes: u64,
}

#[derive(Debug)]
struct Entry {
    scope: Scope,
    tokenizer: u64,
    text: Box<str>,
    /// As in [`Turn`].
    controls: Box<[(Range<usize>, Special)]>,
    /// Where the turn began in the prompt that `controls` come from.
    start: usize,
    ids: Box<[TokenId]>,
}

impl Entry {
    fn holds(&self, turn: &Turn<'_>, scope: Scope, tokenizer: u64) -> bool {
        let place = |(range, special): &(Range<usize>, Special), start| {
            (range.start - start, range.end - start, *special)
        };
        self.scope == scope
            && self.tokenizer == tokenizer
            && *self.text == *turn.text
            && self.controls.len() == turn.controls.len()
            && self
                .controls
                .iter()
                .zip(turn.controls)
                .all(|(mine, its)| place(mine, self.start) == place(its, turn.start))
    }

    fn bytes(&self) -> usize {
        ENTRY_BYTES
            + self.text.len()
            + size_of_val::<[_]>(&self.controls)
            + size_of_val::<[_]>(&self.ids)
    }
}

impl State {
    /// What lies at `key`, which is young from now on.
    fn find(&mut self, key: u64, max_generation: usize) -> Option<Arc<Entry>> {
        if let Some(entry) = self.young.get(&key) {
            return Some(Arc::clone(entry));
        }
        let entry = self.old.remove(&key)?;
        self.old_bytes -= entry.bytes();
        self.insert(key, Arc::clone(&entry), max_generation);
        Some(entry)
    }

    fn insert(&mut self, key: u64, entry: Arc<Entry>, max_generation: usize) {
        let bytes = entry.bytes();
        if bytes > max_generation {
            return;
        }
        if self.young_bytes + bytes > max_generation {
            self.old = std::mem::take(&mut self.young);
            self.old_bytes = std::mem::take(&mut self.young_bytes);
        }
        self.young_bytes += bytes;
        if let Some(replaced) = self.young.insert(key, entry) {
            self.young_bytes -= replaced.bytes();
        }
    }
}

impl TurnCache {
    /// A cache that takes at most about `max_bytes`; 0 keeps nothing.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        let keys = RandomState::new();
        let seed = keys.hash_one("seed");
        Self { max_generation: max_bytes / 2, keys, seed, state: Mutex::default() }
    }

    /// The scope of requests that agree in `parts`.
    pub fn scope(&self, parts: &[Option<&str>]) -> Scope {
        Scope(self.keys.hash_one(parts))
    }

    /// The ids of [`Prompt::token_ids`], tokenising only the turns that are new in `scope`.
    ///
    /// # Errors
    /// Those of [`Prompt::token_ids`].
    pub fn token_ids(
        &self,
        prompt: &Prompt,
        tokenizer: &Tokenizer,
        scope: Scope,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let encoded = self.token_ids_recalling(prompt, tokenizer, scope, |_, _| None)?;
        Ok(encoded.ids)
    }

    /// The ids of [`Prompt::token_ids_recalling`], tokenising only the turns that are new in `scope`
    /// and not recalled.
    ///
    /// # Errors
    /// Those of [`Prompt::token_ids`].
    pub fn token_ids_recalling(
        &self,
        prompt: &Prompt,
        tokenizer: &Tokenizer,
        scope: Scope,
        mut recall: impl FnMut(&[TokenId], Turn<'_>) -> Option<Arc<[TokenId]>>,
    ) -> Result<EncodedPrompt, TokenizerError> {
        let turns: Vec<(Turn<'_>, Option<u64>)> = prompt
            .turns()
            .map(|turn| {
                let keeps = turn.text.len() >= MIN_BYTES && self.max_generation > 0;
                let key = keeps.then(|| xxh3_64_with_seed(turn.text.as_bytes(), self.seed));
                (turn, key.map(|key| key ^ scope.0 ^ tokenizer.instance()))
            })
            .collect();
        let found = self.find_all(turns.iter().map(|(_, key)| *key));

        let mut ids = Vec::with_capacity(prompt.as_text().len() / 3);
        let mut scratch = EncodeScratch::default();
        let mut new = Vec::new();
        let (mut reused, mut encoded) = (0, 0);
        let mut n_before_answer = None;
        for ((turn, key), entry) in turns.into_iter().zip(found) {
            let range = turn.range();
            if let Some(answer) = prompt.answer_in(range.clone()) {
                let first = ids.len();
                let opener = prompt.part(range.start..answer.start);
                opener.encode(tokenizer, &mut scratch, &mut ids)?;
                if let Some(known) = recall(&ids, prompt.part(answer.clone())) {
                    ids.extend_from_slice(&known);
                    let rest = prompt.part(answer.end..range.end);
                    rest.encode(tokenizer, &mut scratch, &mut ids)?;
                    reused += turn.text.len() as u64;
                    continue;
                }
                ids.truncate(first);
            }
            let answer = prompt.answer_start();
            if range.contains(&answer) {
                // After a control token: what stands before it has the same ids by itself.
                let mut head = Vec::new();
                prompt.part(range.start..answer).encode(tokenizer, &mut scratch, &mut head)?;
                n_before_answer = Some(ids.len() + head.len());
            }
            let entry = entry.filter(|entry| entry.holds(&turn, scope, tokenizer.instance()));
            if let Some(entry) = entry {
                ids.extend_from_slice(&entry.ids);
                reused += turn.text.len() as u64;
                continue;
            }
            let first = ids.len();
            turn.encode(tokenizer, &mut scratch, &mut ids)?;
            encoded += turn.text.len() as u64;
            if let Some(key) = key {
                let entry = Entry {
                    scope,
                    tokenizer: tokenizer.instance(),
                    text: turn.text.into(),
                    controls: turn.controls.into(),
                    start: turn.start,
                    ids: ids[first..].into(),
                };
                new.push((key, Arc::new(entry)));
            }
        }
        let mut state = self.lock();
        state.reused_bytes += reused;
        state.encoded_bytes += encoded;
        for (key, entry) in new {
            state.insert(key, entry, self.max_generation);
        }
        drop(state);
        let n_before_answer = n_before_answer.unwrap_or(ids.len());
        Ok(EncodedPrompt { ids, n_before_answer })
    }

    /// What the cache holds and has done.
    pub fn stats(&self) -> TurnCacheStats {
        let state = self.lock();
        TurnCacheStats {
            held_bytes: (state.young_bytes + state.old_bytes) as u64,
            reused_bytes: state.reused_bytes,
            encoded_bytes: state.encoded_bytes,
        }
    }

    /// What lies at each key. Texts are compared outside the lock.
    fn find_all(&self, keys: impl Iterator<Item = Option<u64>>) -> Vec<Option<Arc<Entry>>> {
        let mut state = self.lock();
        keys.map(|key| key.and_then(|key| state.find(key, self.max_generation))).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
