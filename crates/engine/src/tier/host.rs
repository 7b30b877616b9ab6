//! The host-memory tier: bounded bytes, least recently used first out.
//!
//! Not here: when something is put here (the engine does when the device evicts it).

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use fathom_scheduler::StateKey;

#[derive(Debug)]
struct Entry {
    bytes: Bytes,
    /// Key in `by_use`.
    used: u64,
}

/// Cached state in host memory.
#[derive(Debug)]
pub(super) struct HostTier {
    limit_bytes: u64,
    used_bytes: u64,
    entries: HashMap<StateKey, Entry>,
    /// Ascending: least recently used first.
    by_use: BTreeMap<u64, StateKey>,
    clock: u64,
}

impl HostTier {
    pub(super) fn new(limit_bytes: u64) -> Self {
        let (entries, by_use) = (HashMap::new(), BTreeMap::new());
        Self { limit_bytes, used_bytes: 0, entries, by_use, clock: 0 }
    }

    pub(super) const fn is_enabled(&self) -> bool {
        self.limit_bytes > 0
    }

    pub(super) const fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn contains(&self, state: StateKey) -> bool {
        self.entries.contains_key(&state)
    }

    /// The bytes of `state`, which is used now.
    pub(super) fn get(&mut self, state: StateKey) -> Option<Bytes> {
        self.touch(state);
        self.entries.get(&state).map(|entry| entry.bytes.clone())
    }

    /// Notes that `state` is used now.
    pub(super) fn touch(&mut self, state: StateKey) {
        if let Some(entry) = self.entries.get_mut(&state) {
            self.by_use.remove(&entry.used);
            self.clock += 1;
            entry.used = self.clock;
            self.by_use.insert(entry.used, state);
        }
    }

    /// Keeps `bytes`; what had to leave for them is appended to `evicted`. Returns whether there was
    /// room: bytes beyond the limit are not kept at all.
    pub(super) fn put(
        &mut self,
        state: StateKey,
        bytes: Bytes,
        evicted: &mut Vec<StateKey>,
    ) -> bool {
        let len = bytes.len() as u64;
        if len > self.limit_bytes {
            return false;
        }
        self.remove(state);
        while self.used_bytes + len > self.limit_bytes {
            let (_, oldest) = self.by_use.pop_first().expect("bytes are used by some entry");
            self.remove(oldest);
            evicted.push(oldest);
        }
        self.clock += 1;
        self.used_bytes += len;
        self.entries.insert(state, Entry { bytes, used: self.clock });
        self.by_use.insert(self.clock, state);
        true
    }

    pub(super) fn remove(&mut self, state: StateKey) {
        if let Some(entry) = self.entries.remove(&state) {
            self.by_use.remove(&entry.used);
            self.used_bytes -= entry.bytes.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use fathom_scheduler::{BlockKey, StateKind};
    use proptest::prelude::*;

    use super::*;

    fn state(key: u128) -> StateKey {
        StateKey { kind: StateKind::Block, key: BlockKey(key) }
    }

    #[test]
    fn the_least_recently_used_entry_leaves_first() {
        let mut host = HostTier::new(30);
        let mut evicted = Vec::new();
        for key in 0..3 {
            assert!(host.put(state(key), Bytes::from(vec![key as u8; 10]), &mut evicted));
        }
        assert_eq!(host.get(state(0)).unwrap(), vec![0; 10]);
        assert!(host.put(state(3), Bytes::from(vec![3; 15]), &mut evicted));
        assert_eq!(evicted, [state(1), state(2)]);
        assert_eq!((host.used_bytes(), host.len()), (25, 2));
        assert!(!host.put(state(4), Bytes::from(vec![4; 31]), &mut evicted));
        assert_eq!(evicted.len(), 2, "what can never fit pushes nothing out");
    }

    proptest! {
        #[test]
        fn bytes_stay_within_the_limit_and_every_loss_is_told(
            limit in 0..60_u64,
            actions in prop::collection::vec((0..9_u128, 0..30_usize, 0..4), 0..60),
        ) {
            let mut host = HostTier::new(limit);
            let mut known = std::collections::HashMap::new();
            for (key, len, action) in actions {
                match action {
                    0 => { host.remove(state(key)); known.remove(&key); }
                    1 => prop_assert_eq!(host.get(state(key)).map(|bytes| bytes.len()), known.get(&key).copied()),
                    _ => {
                        let mut evicted = Vec::new();
                        if host.put(state(key), Bytes::from(vec![0; len]), &mut evicted) {
                            known.insert(key, len);
                        }
                        evicted.iter().for_each(|state| { known.remove(&state.key.0); });
                    }
                }
                prop_assert!(host.used_bytes() <= limit);
                prop_assert_eq!(host.used_bytes(), known.values().sum::<usize>() as u64);
                prop_assert_eq!(host.len(), known.len());
            }
        }
    }
}
