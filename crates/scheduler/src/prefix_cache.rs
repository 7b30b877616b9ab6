//! The prefix cache: full blocks and state snapshots shared between sequences.
//!
//! A block becomes shareable ("published") when all its tokens have been computed. A new sequence
//! may skip the longest prefix whose blocks are all published *and* at whose end a snapshot is
//! kept: blocks hold the compressed KV, only a snapshot holds the window and compressor state.
//! Blocks and snapshots are evicted separately, each least recently used first; a block takes its
//! snapshot with it.
//!
//! What becomes reusable or is evicted is offered to lower tiers, and a look-up goes on in what they
//! hold; see `lower`.
//!
//! Invariants:
//! - a published block's content never changes, so any number of sequences may hold it;
//! - every idle block of the pool is published;
//! - a look-up changes nothing: only [`PrefixCache::acquire`] does.
//!
//! Not here: when blocks are published and snapshots taken (`commit`, `plan`).

use std::collections::{HashMap, HashSet, VecDeque};

use fathom_core::TokenId;

use crate::BLOCK_TOKENS;
use crate::blocks::BlockPool;
use crate::budget::Limits;
use crate::keys::{BlockKey, ByHash, KeyHasher, block_tokens};
use crate::lower::{LoadItem, LowerKeys, Save, SaveReason, StateKey};
use crate::snapshots::SnapshotPool;

const NO_SNAPSHOT: u32 = u32::MAX;

/// What look-ups of started and resumed sequences found. `lookups` is `hits` plus all misses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// Sequences started or resumed with the cache on.
    pub lookups: u64,
    /// Those that skipped at least one block.
    pub hits: u64,
    /// Tokens skipped.
    pub hit_tokens: u64,
    /// Misses of sequences too short to skip a block.
    pub miss_short: u64,
    /// Misses because the first block was never seen.
    pub miss_no_block: u64,
    /// Misses because the first missing block was evicted.
    pub miss_evicted: u64,
    /// Misses because the first block is published under another salt or user only.
    pub miss_salt: u64,
    /// Misses because none of the blocks found has a snapshot.
    pub miss_no_snapshot: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Miss {
    Short,
    NoBlock,
    Evicted,
    Salt,
    NoSnapshot,
}

/// What a look-up found: valid until the cache changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LookUp {
    /// Blocks to share; 0 is a miss.
    pub(crate) n_blocks: u32,
    /// Those of them that are on the device; the others are in a lower tier.
    pub(crate) n_present: u32,
    /// Those of them that nobody holds: sharing them makes that many fewer available.
    pub(crate) n_idle: u32,
    /// On the device; if there is none, and this is no miss, it is in a lower tier.
    snapshot: u32,
    miss: Option<Miss>,
}

impl LookUp {
    const fn miss(reason: Option<Miss>) -> Self {
        Self { n_blocks: 0, n_present: 0, n_idle: 0, snapshot: NO_SNAPSHOT, miss: reason }
    }

    /// Whether something must be loaded before the prefix can be shared.
    pub(crate) const fn must_load(&self) -> bool {
        self.n_blocks > 0 && (self.n_present < self.n_blocks || self.snapshot == NO_SNAPSHOT)
    }
}

/// What a load holds: see [`PrefixCache::begin_load`].
#[derive(Debug)]
pub(crate) struct BegunLoad {
    pub(crate) items: Vec<LoadItem>,
    pub(crate) blocks: Vec<u32>,
    pub(crate) pinned: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Published {
    key: BlockKey,
    snapshot: u32,
    /// For a first block: the hash of its tokens without scope.
    unscoped: Option<u64>,
}

/// Index over the block pool and the snapshot pool.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    enabled: bool,
    isolate_users: bool,
    hasher: KeyHasher,
    pool: BlockPool,
    snapshots: SnapshotPool,
    by_key: HashMap<BlockKey, u32, ByHash>,
    published: Vec<Option<Published>>,
    /// First blocks by their tokens alone, with the number of scopes that have them.
    unscoped: HashMap<u64, u32, ByHash>,
    evicted: Evicted,
    /// Whether there are lower tiers to offer things to.
    has_lower: bool,
    lower: LowerKeys,
    saves: Vec<Save>,
    drops: Vec<StateKey>,
    stats: CacheStats,
    /// Counts releases: what did not fit does not fit before this changes.
    version: u64,
}

impl PrefixCache {
    pub(crate) fn new(limits: &Limits) -> Self {
        let n_blocks = limits.n_blocks();
        Self {
            enabled: limits.prefix_cache(),
            isolate_users: limits.isolate_users(),
            hasher: KeyHasher::new(limits.cache_seed(), limits.cache_namespace()),
            pool: BlockPool::new(n_blocks),
            snapshots: SnapshotPool::new(limits.n_snapshots()),
            by_key: HashMap::with_capacity_and_hasher(n_blocks as usize, ByHash::default()),
            published: vec![None; n_blocks as usize],
            unscoped: HashMap::default(),
            evicted: Evicted::new(n_blocks.clamp(256, 1 << 16) as usize),
            has_lower: limits.lower_tiers(),
            lower: LowerKeys::default(),
            saves: Vec::new(),
            drops: Vec::new(),
            stats: CacheStats::default(),
            version: 1,
        }
    }

    pub(crate) const fn is_enabled(&self) -> bool {
        self.enabled
    }

    pub(crate) const fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub(crate) const fn snapshots(&self) -> &SnapshotPool {
        &self.snapshots
    }

    pub(crate) const fn stats(&self) -> CacheStats {
        self.stats
    }

    pub(crate) const fn lower_mut(&mut self) -> &mut LowerKeys {
        &mut self.lower
    }

    pub(crate) const fn saves_mut(&mut self) -> &mut Vec<Save> {
        &mut self.saves
    }

    pub(crate) const fn drops_mut(&mut self) -> &mut Vec<StateKey> {
        &mut self.drops
    }

    pub(crate) const fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn is_published(&self, block: u32) -> bool {
        self.published[block as usize].is_some()
    }

    /// The start of the key chain of a request.
    pub(crate) fn root(&self, salt: Option<&str>, user: Option<&str>) -> BlockKey {
        self.hasher.root(salt, user.filter(|_| self.isolate_users))
    }

    /// Extends `keys` to the first `n_blocks` blocks of `tokens`.
    pub(crate) fn extend_keys(
        &self,
        root: BlockKey,
        keys: &mut Vec<BlockKey>,
        tokens: &[TokenId],
        n_blocks: u32,
    ) {
        self.hasher.extend(root, keys, tokens, n_blocks as usize);
    }

    /// Finds the longest prefix of `tokens` that can be skipped, leaving at least one token to
    /// compute. `keys` is extended as far as the search goes. With `lower`, also what lower tiers
    /// hold counts.
    pub(crate) fn look_up(
        &self,
        root: BlockKey,
        keys: &mut Vec<BlockKey>,
        tokens: &[TokenId],
        lower: bool,
    ) -> LookUp {
        if !self.enabled {
            return LookUp::miss(None);
        }
        let most = (tokens.len() - 1) / BLOCK_TOKENS as usize;
        let mut found = LookUp::miss(Some(Miss::Short));
        let is_below = |state| lower && self.lower.contains(state);
        let (mut n_idle, mut n_present) = (0, 0);
        for index in 0..most {
            self.hasher.extend(root, keys, tokens, index + 1);
            let key = keys[index];
            let snapshot = if let Some(&block) = self.by_key.get(&key) {
                n_present += 1;
                n_idle += u32::from(self.pool.is_idle(block));
                self.published[block as usize].map_or(NO_SNAPSHOT, |of| of.snapshot)
            } else if is_below(StateKey::block(key)) {
                NO_SNAPSHOT
            } else {
                if found.n_blocks == 0 {
                    found.miss = Some(self.why_missing(index, key, tokens));
                }
                return found;
            };
            if snapshot != NO_SNAPSHOT || is_below(StateKey::snapshot(key)) {
                let n_blocks = index as u32 + 1;
                found = LookUp { n_blocks, n_present, n_idle, snapshot, miss: None };
            } else if found.n_blocks == 0 {
                found.miss = Some(Miss::NoSnapshot);
            }
        }
        found
    }

    fn why_missing(&self, index: usize, key: BlockKey, tokens: &[TokenId]) -> Miss {
        if self.evicted.contains(key) {
            Miss::Evicted
        } else if index > 0 {
            Miss::NoSnapshot
        } else if self.unscoped.contains_key(&self.hasher.unscoped(block_tokens(tokens, 0))) {
            Miss::Salt
        } else {
            Miss::NoBlock
        }
    }

    /// Counts a look-up and shares what it found on the device: its blocks are appended to `table`.
    /// Returns the snapshot to restore, pinned until [`PrefixCache::unpin`].
    pub(crate) fn acquire(
        &mut self,
        found: LookUp,
        keys: &[BlockKey],
        table: &mut Vec<u32>,
    ) -> Option<u32> {
        if !self.enabled {
            return None;
        }
        self.stats.lookups += 1;
        match found.miss {
            None => self.stats.hits += 1,
            Some(Miss::Short) => self.stats.miss_short += 1,
            Some(Miss::NoBlock) => self.stats.miss_no_block += 1,
            Some(Miss::Evicted) => self.stats.miss_evicted += 1,
            Some(Miss::Salt) => self.stats.miss_salt += 1,
            Some(Miss::NoSnapshot) => self.stats.miss_no_snapshot += 1,
        }
        self.stats.hit_tokens += u64::from(found.n_blocks * BLOCK_TOKENS);
        for key in &keys[..found.n_blocks as usize] {
            let block = *self.by_key.get(key).expect("nothing changed since the look-up");
            self.pool.retain(block);
            table.push(block);
        }
        (found.snapshot != NO_SNAPSHOT).then(|| {
            self.snapshots.pin(found.snapshot);
            found.snapshot
        })
    }

    /// Takes a block for one holder, evicting an idle one if none is free.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let taken = self.pool.take()?;
        if taken.was_idle {
            if let Some(of) = self.published[taken.block as usize] {
                self.evicted.insert(of.key);
                self.offer(StateKey::block(of.key), taken.block, SaveReason::Evicted);
                if of.snapshot != NO_SNAPSHOT {
                    self.offer(StateKey::snapshot(of.key), of.snapshot, SaveReason::Evicted);
                }
            }
            self.unpublish(taken.block);
        }
        Some(taken.block)
    }

    fn offer(&mut self, state: StateKey, id: u32, reason: SaveReason) {
        if self.has_lower && (reason == SaveReason::Evicted || !self.lower.contains(state)) {
            self.saves.push(Save { state, id, reason });
        }
    }

    /// Offers the snapshot of the prefix `key` if it is still the one in slot `snapshot`.
    pub(crate) fn offer_snapshot(&mut self, snapshot: u32, key: BlockKey) {
        let block = self.by_key.get(&key).and_then(|&block| self.published[block as usize]);
        if block.is_some_and(|of| of.snapshot == snapshot) {
            self.offer(StateKey::snapshot(key), snapshot, SaveReason::Published);
        }
    }

    /// The first block of a chain, else its snapshot, that is not on the device.
    pub(crate) fn first_missing(&self, keys: &[BlockKey]) -> Option<StateKey> {
        let missing = keys.iter().find(|&key| !self.by_key.contains_key(key));
        let last = || keys.last().map(|&key| StateKey::snapshot(key));
        missing.map(|&key| StateKey::block(key)).or_else(last)
    }

    /// Holds the blocks of a prefix that are on the device, and takes room for the others and for
    /// the snapshot. `None` if no snapshot slot can be had now.
    pub(crate) fn begin_load(&mut self, found: LookUp, keys: &[BlockKey]) -> Option<BegunLoad> {
        let snapshot = if found.snapshot == NO_SNAPSHOT { self.take_snapshot()? } else { 0 };
        let mut begun = BegunLoad { items: Vec::new(), blocks: Vec::new(), pinned: None };
        // All that are there first: taking room evicts idle blocks.
        for key in keys {
            let present = self.by_key.get(key).copied();
            present.into_iter().for_each(|block| self.pool.retain(block));
            begun.blocks.push(present.unwrap_or(u32::MAX));
        }
        if found.snapshot != NO_SNAPSHOT {
            self.snapshots.pin(found.snapshot);
            begun.pinned = Some(found.snapshot);
        }
        for (block, &key) in begun.blocks.iter_mut().zip(keys) {
            if *block == u32::MAX {
                let id = self.allocate().expect("a sequence fits only if its blocks do");
                *block = id;
                begun.items.push(LoadItem { state: StateKey::block(key), id });
            }
        }
        if let Some(&key) = keys.last()
            && found.snapshot == NO_SNAPSHOT
        {
            begun.items.push(LoadItem { state: StateKey::snapshot(key), id: snapshot });
        }
        Some(begun)
    }

    /// A hash of the first block of `tokens` without their scope.
    pub(crate) fn unscoped(&self, tokens: &[TokenId]) -> u64 {
        self.hasher.unscoped(block_tokens(tokens, 0))
    }

    /// Gives up a table's references and empties it. With `discard`, blocks that nobody else holds
    /// lose their content: it must not be reused.
    pub(crate) fn release(&mut self, table: &mut Vec<u32>, discard: bool) {
        self.version += 1;
        // Last block first: of one sequence's blocks, those nearest its start are evicted last.
        while let Some(block) = table.pop() {
            if discard && self.pool.references(block) == 1 {
                if let Some(of) = self.published[block as usize]
                    && self.has_lower
                {
                    for state in [StateKey::block(of.key), StateKey::snapshot(of.key)] {
                        self.lower.set(state, false);
                        self.drops.push(state);
                    }
                }
                self.unpublish(block);
            }
            self.pool.release(block, self.published[block as usize].is_some());
        }
    }

    /// Makes a full block shareable. If its content is published already, the block stays private.
    pub(crate) fn publish(&mut self, block: u32, index: u32, key: BlockKey, tokens: &[TokenId]) {
        if self.by_key.contains_key(&key) {
            return;
        }
        let unscoped = (index == 0).then(|| self.unscoped(tokens));
        self.publish_loaded(block, key, unscoped);
        self.offer(StateKey::block(key), block, SaveReason::Published);
    }

    /// As [`PrefixCache::publish`], of a block that came from a lower tier; a first block comes with
    /// the hash of its tokens without their scope.
    pub(crate) fn publish_loaded(&mut self, block: u32, key: BlockKey, unscoped: Option<u64>) {
        if self.by_key.contains_key(&key) {
            return;
        }
        if let Some(hash) = unscoped {
            *self.unscoped.entry(hash).or_insert(0) += 1;
        }
        self.by_key.insert(key, block);
        self.published[block as usize] = Some(Published { key, snapshot: NO_SNAPSHOT, unscoped });
    }

    fn unpublish(&mut self, block: u32) {
        let Some(published) = self.published[block as usize].take() else { return };
        self.by_key.remove(&published.key);
        if published.snapshot != NO_SNAPSHOT {
            self.snapshots.discard(published.snapshot);
        }
        if let Some(hash) = published.unscoped
            && let Some(count) = self.unscoped.get_mut(&hash)
        {
            *count -= 1;
            if *count == 0 {
                self.unscoped.remove(&hash);
            }
        }
    }

    /// Reserves a snapshot slot for the prefix `key`, unless it has a snapshot already or all
    /// slots are in use by the current step.
    pub(crate) fn begin_capture(&mut self, key: BlockKey) -> Option<u32> {
        let published = self.by_key.get(&key).and_then(|&block| self.published[block as usize]);
        if published.is_some_and(|of| of.snapshot != NO_SNAPSHOT) {
            return None;
        }
        self.take_snapshot()
    }

    /// Reserves a snapshot slot, evicting the least recently used one if none is free.
    pub(crate) fn take_snapshot(&mut self) -> Option<u32> {
        let capture = self.snapshots.begin_capture()?;
        if let Some(block) = capture.evicted_from
            && let Some(published) = &mut self.published[block as usize]
        {
            published.snapshot = NO_SNAPSHOT;
            let state = StateKey::snapshot(published.key);
            self.offer(state, capture.snapshot, SaveReason::Evicted);
        }
        Some(capture.snapshot)
    }

    /// Attaches a captured snapshot to its prefix. Returns whether it was kept: it is not if the
    /// prefix is unpublished, or got another snapshot in the same step.
    pub(crate) fn finish_capture(&mut self, snapshot: u32, key: BlockKey) -> bool {
        let block = self.by_key.get(&key).copied();
        if let Some(block) = block
            && let Some(published) = &mut self.published[block as usize]
            && published.snapshot == NO_SNAPSHOT
        {
            published.snapshot = snapshot;
            self.snapshots.finish_capture(snapshot, block);
            return true;
        }
        self.snapshots.unpin(snapshot);
        false
    }

    /// Ends the pin of a restore, or gives up a capture.
    pub(crate) fn unpin(&mut self, snapshot: u32) {
        self.snapshots.unpin(snapshot);
    }

    /// Drops the snapshot of the prefix `key` if it is still the one in slot `snapshot`.
    pub(crate) fn drop_snapshot(&mut self, snapshot: u32, key: BlockKey) {
        if let Some(&block) = self.by_key.get(&key)
            && let Some(published) = &mut self.published[block as usize]
            && published.snapshot == snapshot
            && !self.snapshots.is_pinned(snapshot)
        {
            published.snapshot = NO_SNAPSHOT;
            self.snapshots.discard(snapshot);
        }
    }

    /// Forgets everything that is cached: what the device holds can no longer be trusted.
    pub(crate) fn clear(&mut self) {
        self.version += 1;
        self.saves.clear();
        for block in 0..self.pool.n_blocks() {
            self.unpublish(block);
            self.pool.forget(block);
        }
    }
}

/// The keys of recently evicted blocks, bounded: tells a miss by eviction from one by novelty.
#[derive(Debug)]
struct Evicted {
    keys: HashSet<BlockKey, ByHash>,
    order: VecDeque<BlockKey>,
    capacity: usize,
}

impl Evicted {
    fn new(capacity: usize) -> Self {
        // Twice the capacity keeps the table from growing while entries come and go.
        let keys = HashSet::with_capacity_and_hasher(2 * capacity, ByHash::default());
        Self { keys, order: VecDeque::with_capacity(capacity), capacity }
    }

    fn contains(&self, key: BlockKey) -> bool {
        self.keys.contains(&key)
    }

    fn insert(&mut self, key: BlockKey) {
        if !self.keys.insert(key) {
            return;
        }
        if self.order.len() == self.capacity
            && let Some(oldest) = self.order.pop_front()
        {
            self.keys.remove(&oldest);
        }
        self.order.push_back(key);
    }
}
