//! State snapshots: which snapshot slot holds what, and which may be reused.
//!
//! A snapshot is the window KV and compressor state of one sequence after exactly `n` tokens, `n`
//! a multiple of `BLOCK_TOKENS`. KV blocks alone cannot resume a sequence; blocks and a snapshot
//! at their end can. A snapshot belongs to the published block that ends at `n`.
//!
//! Invariants:
//! - a slot is free, being captured, or kept for one block; only kept ones are ever restored;
//! - a pinned slot (part of a planned step) is never reused.
//!
//! Not here: the prefix a block stands for (`prefix_cache`), the bytes (the model's cache).

use crate::lru::LruList;

const NO_BLOCK: u32 = u32::MAX;

/// All snapshot slots.
#[derive(Debug)]
pub(crate) struct SnapshotPool {
    /// The block whose end each slot describes, or `NO_BLOCK`.
    block: Vec<u32>,
    pins: Vec<u32>,
    free: Vec<u32>,
    /// Kept and unpinned slots.
    idle: LruList,
}

/// A slot to capture into, and the block that loses its snapshot by that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capture {
    pub(crate) snapshot: u32,
    pub(crate) evicted_from: Option<u32>,
}

impl SnapshotPool {
    pub(crate) fn new(n_snapshots: u32) -> Self {
        Self {
            block: vec![NO_BLOCK; n_snapshots as usize],
            pins: vec![0; n_snapshots as usize],
            free: (0..n_snapshots).rev().collect(),
            idle: LruList::new(n_snapshots),
        }
    }

    pub(crate) fn n_snapshots(&self) -> u32 {
        self.block.len() as u32
    }

    pub(crate) fn n_used(&self) -> u32 {
        self.n_snapshots() - self.free.len() as u32
    }

    pub(crate) fn is_pinned(&self, snapshot: u32) -> bool {
        self.pins[snapshot as usize] > 0
    }

    /// Reserves a slot to capture into, the least recently used one if none is free.
    pub(crate) fn begin_capture(&mut self) -> Option<Capture> {
        let capture = match self.free.pop() {
            Some(snapshot) => Capture { snapshot, evicted_from: None },
            None => {
                let snapshot = self.idle.pop_oldest()?;
                let block = std::mem::replace(&mut self.block[snapshot as usize], NO_BLOCK);
                Capture { snapshot, evicted_from: Some(block) }
            }
        };
        self.pins[capture.snapshot as usize] = 1;
        Some(capture)
    }

    /// Keeps what was captured as the snapshot of `block`.
    pub(crate) fn finish_capture(&mut self, snapshot: u32, block: u32) {
        self.block[snapshot as usize] = block;
        self.unpin(snapshot);
    }

    /// Pins a kept slot: it is about to be restored from.
    pub(crate) fn pin(&mut self, snapshot: u32) {
        self.idle.remove(snapshot);
        self.pins[snapshot as usize] += 1;
    }

    /// Ends one pin. A slot without a block (a capture given up) becomes free.
    pub(crate) fn unpin(&mut self, snapshot: u32) {
        let pins = &mut self.pins[snapshot as usize];
        *pins = pins.checked_sub(1).expect("a snapshot is unpinned once per pin");
        if *pins == 0 {
            if self.block[snapshot as usize] == NO_BLOCK {
                self.free.push(snapshot);
            } else {
                self.idle.push_newest(snapshot);
            }
        }
    }

    /// Drops what a kept slot holds; if pinned, when the last pin ends.
    pub(crate) fn discard(&mut self, snapshot: u32) {
        self.block[snapshot as usize] = NO_BLOCK;
        if !self.is_pinned(snapshot) {
            self.idle.remove(snapshot);
            self.free.push(snapshot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_snapshot_is_not_captured_over() {
        let mut pool = SnapshotPool::new(2);
        for block in [10, 11] {
            let capture = pool.begin_capture().unwrap();
            pool.finish_capture(capture.snapshot, block);
        }
        pool.pin(0);
        let capture = pool.begin_capture().unwrap();
        assert_eq!(capture, Capture { snapshot: 1, evicted_from: Some(11) });
        assert_eq!(pool.begin_capture(), None);

        pool.unpin(0);
        assert_eq!(pool.begin_capture().unwrap().snapshot, 0);
    }

    #[test]
    fn a_snapshot_whose_block_went_away_while_pinned_is_free_after_the_pin() {
        let mut pool = SnapshotPool::new(1);
        let capture = pool.begin_capture().unwrap();
        pool.finish_capture(capture.snapshot, 3);
        pool.pin(0);
        pool.discard(0);
        assert_eq!(pool.n_used(), 1);
        pool.unpin(0);
        assert_eq!(pool.n_used(), 0);
    }
}
