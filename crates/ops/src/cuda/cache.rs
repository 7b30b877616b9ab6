//! All cache stores of one rank in device memory, in the CPU's layout, byte for byte.
//!
//! Snapshots are in device memory too. What moves between slots, snapshots, blocks and the host is a
//! list of short pieces, copied by one launch.

use fathom_core::LayerKind;
use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM, WINDOW};

use super::memory::{Buffer, Memory, Place};
use super::ops::{Call, CudaOps};
use super::replay::Recordings;
use super::step::rounded_up;
use super::store::Pending;
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
    pub(crate) pending: Option<Pending>,
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
    /// Copies that a recorded pass of the MTP block reads, a row for each slot, rounded up.
    pub(crate) staged: Buffer,
    /// `[n_snapshots][snapshot_bytes]`.
    snapshots: Buffer,
    /// Which of them hold something.
    is_captured: Vec<bool>,
    /// Steps over these stores that can be replayed.
    pub(crate) recordings: Recordings,
}

/// Bytes at one address that belong at another; whole words.
#[derive(Debug, Clone, Copy)]
struct Piece {
    from: u64,
    to: u64,
    bytes: usize,
}

impl DeviceCache {
    /// Zeroed stores.
    ///
    /// # Errors
    /// [`OpError::Shape`] for formats other than FP8 rows and MXFP4 keys; [`OpError::Device`] if
    /// there is no room.
    pub(crate) fn new(memory: &Memory, spec: &CacheSpec) -> Result<Self, OpError> {
        const OP: &str = "new_cache";
        check_len(OP, "bytes of a KV row", spec.kv.row_bytes(), KvFormat::Fp8.row_bytes())?;
        let key_bytes = IndexKeyFormat::Mxfp4.row_bytes();
        check_len(OP, "bytes of an indexer key", spec.index_keys.row_bytes(), key_bytes)?;
        let zeros = |bytes: usize| {
            let buffer = memory.buffer(Place::Cache, bytes)?;
            buffer.fill(0)?;
            Ok::<_, OpError>(buffer)
        };
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
            staged: zeros(2 * rounded_up(spec.n_slots) * spec.draft_width)?,
            snapshots: memory.buffer(Place::Cache, spec.n_snapshots * spec.snapshot_bytes())?,
            is_captured: vec![false; spec.n_snapshots],
            recordings: Recordings::default(),
        })
    }

    /// What it was made for.
    #[must_use]
    pub const fn spec(&self) -> &CacheSpec {
        &self.spec
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

    /// Runs `body(address, bytes)` over everything a snapshot covers, in its order.
    fn snapshot_parts(&self, slot: usize, position: usize, mut body: impl FnMut(u64, usize)) {
        let row_bytes = self.spec.kv.row_bytes();
        for (index, layer) in self.layers.iter().enumerate() {
            for p in (position - WINDOW..).take(self.spec.snapshot_rows(index)) {
                let offset = self.window_offset(slot, p);
                body(layer.window.address() + offset as u64, row_bytes);
            }
            if !layer.kind.has_indexer() {
                continue;
            }
            for (state, half) in [(&layer.state, HEAD_DIM), (&layer.key_state, INDEX_HEAD_DIM)] {
                for p in position - OVERLAP..position {
                    let offset = (4 * (slot * state.rows + p % state.rows) * state.width) as u64;
                    body(state.u.address() + offset, 4 * half);
                    body(state.s.address() + offset, 4 * half);
                }
            }
        }
        if self.spec.draft_width > 0 {
            let bytes = self.spec.copies_row_bytes();
            let offset = self.copies_row(slot, position - 1) * bytes;
            body(self.copies.address() + offset as u64, bytes);
        }
    }

    /// What a snapshot covers in `slot`, with its place in `snapshot`; rows that follow each other
    /// are one piece.
    fn snapshot_pieces(&self, slot: usize, position: usize, snapshot: usize) -> Vec<Piece> {
        let mut to = self.snapshots.address() + (snapshot * self.spec.snapshot_bytes()) as u64;
        let mut pieces: Vec<Piece> = Vec::new();
        self.snapshot_parts(slot, position, |from, bytes| {
            match pieces.last_mut() {
                Some(last) if last.from + last.bytes as u64 == from => last.bytes += bytes,
                _ => pieces.push(Piece { from, to, bytes }),
            }
            to += bytes as u64;
        });
        pieces
    }

    pub(crate) fn read_snapshot(&self, snapshot: u32) -> Result<Vec<u8>, OpError> {
        const OP: &str = "read_snapshot";
        below(OP, "snapshot", snapshot, self.is_captured.len())?;
        self.check_captured(OP, snapshot)?;
        let bytes = self.spec.snapshot_bytes();
        self.snapshots.read(snapshot as usize * bytes, bytes)
    }

    pub(crate) fn write_snapshot(&mut self, snapshot: u32, bytes: &[u8]) -> Result<(), OpError> {
        const OP: &str = "write_snapshot";
        check_len(OP, "bytes", bytes.len(), self.spec.snapshot_bytes())?;
        below(OP, "snapshot", snapshot, self.is_captured.len())?;
        self.snapshots.write(snapshot as usize * bytes.len(), bytes)?;
        self.is_captured[snapshot as usize] = true;
        Ok(())
    }

    fn check_captured(&self, op: &'static str, snapshot: u32) -> Result<(), OpError> {
        if self.is_captured[snapshot as usize] {
            return Ok(());
        }
        let (got, limit) = (snapshot as usize, self.is_captured.len());
        Err(OpError::OutOfRange { op, what: "empty snapshot", got, limit })
    }

    /// For each layer its entries, then its keys, of `block`, with their places in a copy of the
    /// whole block at `copy`.
    fn block_pieces(&self, block: u32, copy: u64) -> Vec<Piece> {
        let mut to = copy;
        let mut pieces = Vec::new();
        for (store, bytes) in self.layers.iter().flat_map(|layer| self.block_parts(layer)) {
            if bytes > 0 {
                let from = store.address() + (block as usize * bytes) as u64;
                pieces.push(Piece { from, to, bytes });
                to += bytes as u64;
            }
        }
        pieces
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
        below(op, "snapshot", snapshot, self.is_captured.len())?;
        let got = position as usize;
        if got == 0 || !got.is_multiple_of(WINDOW) {
            return Err(OpError::OutOfRange { op, what: "unaligned position", got, limit: WINDOW });
        }
        Ok((slot as usize, got))
    }
}

/// The way back.
fn reversed(pieces: Vec<Piece>) -> Vec<Piece> {
    let turn = |Piece { from, to, bytes }| Piece { from: to, to: from, bytes };
    pieces.into_iter().map(turn).collect()
}

impl CudaOps {
    /// Copies every piece. Each lies in live buffers on both sides and none overlaps another.
    fn copy_pieces(&self, pieces: &[Piece]) -> Result<(), OpError> {
        let words = pieces.iter().flat_map(|p| [p.from, p.to, p.bytes as u64 / 4]);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let list = self.uploaded(&bytes)?;
        // SAFETY: the callers, all in this file, name parts of the cache's stores and of buffers
        // they hold, at multiples of 4 bytes, and check slots, blocks and snapshots first.
        unsafe {
            self.launch(Call {
                kernel: "copy_pieces",
                grid: [pieces.len(), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[(&list).into()],
            })
        }
    }

    pub(crate) fn capture_state(
        &self,
        cache: &mut DeviceCache,
        slot: u32,
        position: u32,
        snapshot: u32,
    ) -> Result<(), OpError> {
        let (slot, position) = cache.check_resume("capture", slot, position, snapshot)?;
        self.copy_pieces(&cache.snapshot_pieces(slot, position, snapshot as usize))?;
        cache.is_captured[snapshot as usize] = true;
        Ok(())
    }

    pub(crate) fn restore_state(
        &self,
        cache: &DeviceCache,
        snapshot: u32,
        slot: u32,
        position: u32,
    ) -> Result<(), OpError> {
        const OP: &str = "restore";
        let (slot, position) = cache.check_resume(OP, slot, position, snapshot)?;
        cache.check_captured(OP, snapshot)?;
        self.copy_pieces(&reversed(cache.snapshot_pieces(slot, position, snapshot as usize)))
    }

    /// For each layer: its entries, then its keys.
    pub(crate) fn block_bytes(&self, cache: &DeviceCache, block: u32) -> Result<Vec<u8>, OpError> {
        below("read_block", "block", block, cache.spec.n_blocks)?;
        let bytes = cache.spec.block_bytes();
        let copy = self.buffer(bytes)?;
        self.copy_pieces(&cache.block_pieces(block, copy.address()))?;
        copy.read(0, bytes)
    }

    pub(crate) fn set_block_bytes(
        &self,
        cache: &DeviceCache,
        block: u32,
        bytes: &[u8],
    ) -> Result<(), OpError> {
        const OP: &str = "write_block";
        below(OP, "block", block, cache.spec.n_blocks)?;
        check_len(OP, "bytes", bytes.len(), cache.spec.block_bytes())?;
        let copy = self.uploaded(bytes)?;
        self.copy_pieces(&reversed(cache.block_pieces(block, copy.address())))
    }
}

fn below(op: &'static str, what: &'static str, got: u32, limit: usize) -> Result<(), OpError> {
    let got = got as usize;
    if got < limit { Ok(()) } else { Err(OpError::OutOfRange { op, what, got, limit }) }
}
