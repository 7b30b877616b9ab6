//! Snapshots of a slot and the bytes of blocks: what the prefix cache and its lower tiers move.
//!
//! A snapshot at `n` (a multiple of 128) holds, layer by layer, the window rows of positions
//! `n - 128 .. n` in that order and, on ratio-4 layers, the "a" half of `u` and `s` of positions
//! `n - 4 .. n` for attention, then for the indexer. Together with the blocks up to `n` that is
//! everything a sequence needs to go on; nothing in it depends on the slot it came from.
//!
//! Row `t` of an MTP block depends on token `t + 1`. Where one drafts, the snapshot has its rows up to
//! `n - 2` only, and at the end the copies of row `n - 1`, from which that row is run when token `n`
//! is known: two sequences may share a prefix and differ right after it.
//!
//! Not here: which snapshots exist and which are evicted (`scheduler`).

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};

use crate::OpError;
use crate::cache_spec::CacheSpec;
use crate::cpu::cache::CpuCache;
use crate::error::check_len;

/// Positions of the previous ratio-4 group, whose "a" half the next entry reads.
const OVERLAP: usize = LayerKind::Csa.ratio();

impl CpuCache {
    pub(crate) fn capture(
        &mut self,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(), OpError> {
        let (slot, position) = self.check_resume("capture", slot, position, snapshot)?;
        let mut bytes = std::mem::take(&mut self.snapshots[snapshot as usize]);
        bytes.clear();
        bytes.reserve_exact(self.spec.snapshot_bytes());
        for (index, layer) in self.layers.iter().enumerate() {
            for p in (position - WINDOW..).take(self.spec.snapshot_rows(index)) {
                bytes.extend_from_slice(self.window_row(index, slot, p));
            }
            for (ring, width) in overlaps(layer.kind, &layer.state, &layer.key_state) {
                for p in position - OVERLAP..position {
                    let (u, s) = ring.get(slot, p);
                    let values = u[..width].iter().chain(&s[..width]);
                    bytes.extend(values.flat_map(|x| x.to_le_bytes()));
                }
            }
        }
        if self.spec.draft_width > 0 {
            bytes.extend_from_slice(self.copies_row(slot, position - 1));
        }
        self.snapshots[snapshot as usize] = bytes;
        Ok(())
    }

    pub(crate) fn restore(
        &mut self,
        snapshot: u32,
        slot: u32,
        position: u32,
    ) -> Result<(), OpError> {
        const OP: &str = "restore";
        let (slot, position) = self.check_resume(OP, slot, position, snapshot)?;
        let bytes = std::mem::take(&mut self.snapshots[snapshot as usize]);
        check_len(OP, "snapshot", bytes.len(), self.spec.snapshot_bytes())?;
        let mut rest = bytes.as_slice();
        let row_bytes = self.spec.kv.row_bytes();
        for index in 0..self.layers.len() {
            for p in (position - WINDOW..).take(self.spec.snapshot_rows(index)) {
                let (row, tail) = rest.split_at(row_bytes);
                self.window_row_mut(index, slot, p).copy_from_slice(row);
                rest = tail;
            }
            let layer = &mut self.layers[index];
            for (ring, width) in overlaps(layer.kind, &mut layer.state, &mut layer.key_state) {
                for p in position - OVERLAP..position {
                    let (u, s) = ring.get_mut(slot, p);
                    for half in [&mut u[..width], &mut s[..width]] {
                        let (values, tail) = rest.split_at(4 * width);
                        let values = values.as_chunks::<4>().0;
                        half.iter_mut().zip(values).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
                        rest = tail;
                    }
                }
            }
        }
        if self.spec.draft_width > 0 {
            self.copies_row_mut(slot, position - 1).copy_from_slice(rest);
        }
        self.snapshots[snapshot as usize] = bytes;
        Ok(())
    }

    pub(crate) fn read_snapshot(&self, snapshot: u32) -> Result<Vec<u8>, OpError> {
        let (got, limit) = (snapshot as usize, self.snapshots.len());
        let stored = self.snapshots.get(got).filter(|bytes| !bytes.is_empty());
        stored.cloned().ok_or(OpError::OutOfRange {
            op: "read_snapshot",
            what: "snapshot",
            got,
            limit,
        })
    }

    pub(crate) fn write_snapshot(&mut self, snapshot: u32, bytes: &[u8]) -> Result<(), OpError> {
        const OP: &str = "write_snapshot";
        check_len(OP, "bytes", bytes.len(), self.spec.snapshot_bytes())?;
        below(OP, "snapshot", snapshot, self.snapshots.len())?;
        self.snapshots[snapshot as usize] = bytes.to_vec();
        Ok(())
    }

    /// For each layer: its entries, then its keys.
    pub(crate) fn read_block(&self, block: u32) -> Result<Vec<u8>, OpError> {
        below("read_block", "block", block, self.spec.n_blocks)?;
        let mut bytes = Vec::with_capacity(self.spec.block_bytes());
        for layer in &self.layers {
            for (store, len) in
                [&layer.entries, &layer.keys].into_iter().zip(self.part_bytes(layer.kind))
            {
                bytes.extend_from_slice(&store[block as usize * len..][..len]);
            }
        }
        Ok(bytes)
    }

    pub(crate) fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), OpError> {
        const OP: &str = "write_block";
        below(OP, "block", block, self.spec.n_blocks)?;
        check_len(OP, "bytes", bytes.len(), self.spec.block_bytes())?;
        let mut rest = bytes;
        for index in 0..self.layers.len() {
            let lens = self.part_bytes(self.layers[index].kind);
            let layer = &mut self.layers[index];
            for (store, len) in [&mut layer.entries, &mut layer.keys].into_iter().zip(lens) {
                let (part, tail) = rest.split_at(len);
                store[block as usize * len..][..len].copy_from_slice(part);
                rest = tail;
            }
        }
        Ok(())
    }

    /// Bytes of one block's entries and keys in a layer of `kind`.
    fn part_bytes(&self, kind: LayerKind) -> [usize; 2] {
        let rows = CacheSpec::rows_per_block(kind);
        let keys = if kind.has_indexer() { self.spec.index_keys.row_bytes() } else { 0 };
        [rows * self.spec.kv.row_bytes(), rows * keys]
    }

    fn check_resume(
        &self,
        op: &'static str,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(usize, usize), OpError> {
        below(op, "slot", slot, self.spec.n_slots)?;
        below(op, "snapshot", snapshot, self.snapshots.len())?;
        let got = position as usize;
        if got == 0 || !got.is_multiple_of(WINDOW) {
            return Err(OpError::OutOfRange { op, what: "unaligned position", got, limit: WINDOW });
        }
        Ok((slot as usize, got))
    }
}

/// The state rings of a layer that a snapshot covers, with the width of their "a" half.
fn overlaps<R>(kind: LayerKind, state: R, key_state: R) -> impl Iterator<Item = (R, usize)> {
    let both = kind.has_indexer().then_some([(state, HEAD_DIM), (key_state, INDEX_HEAD_DIM)]);
    both.into_iter().flatten()
}

fn below(op: &'static str, what: &'static str, got: u32, limit: usize) -> Result<(), OpError> {
    let got = got as usize;
    if got < limit { Ok(()) } else { Err(OpError::OutOfRange { op, what, got, limit }) }
}
