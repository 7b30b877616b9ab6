//! All cache stores of one rank in device memory, in the CPU's layout, byte for byte.
//!
//! Snapshots and blocks move through host memory here: they are rare, and their bytes are what the
//! lower cache tiers keep. Nothing in a step does.

use std::sync::Arc;

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};

use super::device::{Buffer, Device};
use crate::OpError;
use crate::cache_spec::{BLOCK_TOKENS, CacheSpec};
use crate::cpu::unpack_rows;
use crate::error::check_len;
use crate::row_formats::{IndexKeyFormat, KvFormat};

/// Positions of the previous ratio-4 group, whose "a" half the next entry reads.
const OVERLAP: usize = LayerKind::Csa.ratio();

/// A layer's stores.
#[derive(Debug)]
pub(crate) struct LayerStores {
    pub(crate) kind: LayerKind,
    /// `[n_slots][window_rows]` KV rows.
    pub(crate) window: Buffer,
    /// `[n_blocks][rows_per_block]` KV rows.
    pub(crate) entries: Buffer,
    /// `[n_blocks][rows_per_block]` indexer keys.
    pub(crate) keys: Buffer,
    pub(crate) state: StateStore,
    pub(crate) key_state: StateStore,
    /// This step's KV rows as they will enter the window.
    pub(crate) pending: Option<Buffer>,
}

/// Raw `u` and `s` rows of a compressor, `[n_slots][rows][width]` f32 each.
#[derive(Debug)]
pub(crate) struct StateStore {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) u: Buffer,
    pub(crate) s: Buffer,
}

/// All cache stores of one rank.
#[derive(Debug)]
pub struct DeviceCache {
    pub(crate) spec: CacheSpec,
    pub(crate) layers: Vec<LayerStores>,
    /// `[n_slots][copies_rows]` rows of copies, bf16.
    pub(crate) copies: Buffer,
    /// Empty until first captured.
    snapshots: Vec<Vec<u8>>,
}

impl DeviceCache {
    /// Zeroed stores.
    ///
    /// # Errors
    /// [`OpError::Shape`] for formats other than FP8 rows and MXFP4 keys; [`OpError::Device`] if
    /// there is no room.
    pub(crate) fn new(device: &Arc<dyn Device>, spec: &CacheSpec) -> Result<Self, OpError> {
        const OP: &str = "new_cache";
        check_len(OP, "bytes of a KV row", spec.kv.row_bytes(), KvFormat::Fp8.row_bytes())?;
        let key_bytes = IndexKeyFormat::Mxfp4.row_bytes();
        check_len(OP, "bytes of an indexer key", spec.index_keys.row_bytes(), key_bytes)?;
        let zeros = |bytes: usize| Buffer::from_bytes(device, &vec![0; bytes]);
        let layer = |&kind: &LayerKind| {
            let rows = CacheSpec::rows_per_block(kind) * spec.n_blocks;
            let (state_rows, indexed) = (spec.state_rows(kind), usize::from(kind.has_indexer()));
            let state = |rows: usize, dim: usize| {
                let width = kind.compressor_width() * dim;
                let bytes = spec.n_slots * rows * width * 4;
                Ok::<_, OpError>(StateStore { rows, width, u: zeros(bytes)?, s: zeros(bytes)? })
            };
            Ok(LayerStores {
                kind,
                window: zeros(spec.n_slots * spec.window_rows() * spec.kv.row_bytes())?,
                entries: zeros(rows * spec.kv.row_bytes())?,
                keys: zeros(rows * indexed * key_bytes)?,
                state: state(state_rows, HEAD_DIM)?,
                key_state: state(state_rows * indexed, INDEX_HEAD_DIM)?,
                pending: None,
            })
        };
        Ok(Self {
            spec: spec.clone(),
            layers: spec.layers.iter().map(layer).collect::<Result<_, OpError>>()?,
            copies: zeros(spec.n_slots * spec.copies_rows() * spec.copies_row_bytes())?,
            snapshots: vec![Vec::new(); spec.n_snapshots],
        })
    }

    fn window_offset(&self, slot: usize, position: usize) -> usize {
        let ring = self.spec.window_rows();
        (slot * ring + position % ring) * self.spec.kv.row_bytes()
    }

    /// Row of the ring of copies that holds `position`; there must be such a ring.
    pub(crate) fn copies_row(&self, slot: usize, position: usize) -> usize {
        let rows = self.spec.copies_rows();
        slot * rows + position % rows
    }

    /// Runs `body(buffer, offset, bytes)` over everything a snapshot covers, in its order.
    fn snapshot_parts(
        &self,
        slot: usize,
        position: usize,
        mut body: impl FnMut(&Buffer, usize, usize) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        for (index, layer) in self.layers.iter().enumerate() {
            for p in (position - WINDOW..).take(self.spec.snapshot_rows(index)) {
                body(&layer.window, self.window_offset(slot, p), self.spec.kv.row_bytes())?;
            }
            if !layer.kind.has_indexer() {
                continue;
            }
            for (state, half) in [(&layer.state, HEAD_DIM), (&layer.key_state, INDEX_HEAD_DIM)] {
                for p in position - OVERLAP..position {
                    let offset = 4 * (slot * state.rows + p % state.rows) * state.width;
                    body(&state.u, offset, 4 * half)?;
                    body(&state.s, offset, 4 * half)?;
                }
            }
        }
        if self.spec.draft_width > 0 {
            let bytes = self.spec.copies_row_bytes();
            body(&self.copies, self.copies_row(slot, position - 1) * bytes, bytes)?;
        }
        Ok(())
    }

    pub(crate) fn capture(
        &mut self,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(), OpError> {
        let (slot, position) = self.check_resume("capture", slot, position, snapshot)?;
        let mut bytes = Vec::with_capacity(self.spec.snapshot_bytes());
        self.snapshot_parts(slot, position, |buffer, offset, len| {
            bytes.extend(buffer.read(offset, len)?);
            Ok(())
        })?;
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
        let bytes = &self.snapshots[snapshot as usize];
        check_len(OP, "snapshot", bytes.len(), self.spec.snapshot_bytes())?;
        let mut rest = bytes.as_slice();
        self.snapshot_parts(slot, position, |buffer, offset, len| {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            buffer.write(offset, part)
        })
    }

    pub(crate) fn read_snapshot(&self, snapshot: u32) -> Result<Vec<u8>, OpError> {
        let (got, limit) = (snapshot as usize, self.snapshots.len());
        let stored = self.snapshots.get(got).filter(|bytes| !bytes.is_empty());
        let (op, what) = ("read_snapshot", "snapshot");
        stored.cloned().ok_or(OpError::OutOfRange { op, what, got, limit })
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
            for (store, len) in self.block_parts(layer) {
                bytes.extend(store.read(block as usize * len, len)?);
            }
        }
        Ok(bytes)
    }

    pub(crate) fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), OpError> {
        const OP: &str = "write_block";
        below(OP, "block", block, self.spec.n_blocks)?;
        check_len(OP, "bytes", bytes.len(), self.spec.block_bytes())?;
        let mut rest = bytes;
        for layer in &self.layers {
            for (store, len) in self.block_parts(layer) {
                let (part, tail) = rest.split_at(len);
                store.write(block as usize * len, part)?;
                rest = tail;
            }
        }
        Ok(())
    }

    /// A layer's block stores with their bytes per block.
    fn block_parts<'a>(&self, layer: &'a LayerStores) -> [(&'a Buffer, usize); 2] {
        let rows = CacheSpec::rows_per_block(layer.kind);
        let keys = if layer.kind.has_indexer() { self.spec.index_keys.row_bytes() } else { 0 };
        [(&layer.entries, rows * self.spec.kv.row_bytes()), (&layer.keys, rows * keys)]
    }

    pub(crate) fn read_entry(
        &self,
        layer: usize,
        blocks: &[u32],
        entry: usize,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), OpError> {
        let stores = &self.layers[layer];
        let limit = stores.kind.n_entries(blocks.len() * BLOCK_TOKENS);
        if entry >= limit {
            let (op, what) = ("read_entry", "compressed entry");
            return Err(OpError::OutOfRange { op, what, got: entry, limit });
        }
        let per_block = CacheSpec::rows_per_block(stores.kind);
        let row = blocks[entry / per_block] as usize * per_block + entry % per_block;
        let (kv, key) = (self.spec.kv.row_bytes(), self.spec.index_keys.row_bytes());
        let stored = stores.entries.read(row * kv, kv)?;
        let has_key = stores.kind.has_indexer();
        let stored_key = if has_key { Some(stores.keys.read(row * key, key)?) } else { None };
        Ok(unpack_rows(&self.spec, &stored, stored_key.as_deref()))
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

fn below(op: &'static str, what: &'static str, got: u32, limit: usize) -> Result<(), OpError> {
    let got = got as usize;
    if got < limit { Ok(()) } else { Err(OpError::OutOfRange { op, what, got, limit }) }
}
