//! The copies that an MTP block reads: keeping them by position, and finding them again.
//!
//! Rows are moved by `gather_rows`, one launch for each run of rows that lie together on the writing
//! side: one or two per sequence.
//!
//! Not here: where a row is (`crate::copies`), copies in snapshots (`cache`).

use super::DeviceCache;
use super::device::Arg;
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::step::Shape;
use super::tensor::{DeviceTensor, Element, u32_bytes};
use crate::copies::{CopiesAt, locate};
use crate::error::check_len;
use crate::{Batch, OpError};

impl CudaOps {
    /// See [`HeadOps::keep_copies`](crate::HeadOps::keep_copies).
    pub(super) fn store_copies(
        &self,
        batch: &Batch,
        x: &DeviceTensor,
        cache: &DeviceCache,
    ) -> Result<(), OpError> {
        let (width, ring) = (cache.spec.draft_width, cache.spec.copies_rows());
        x.expect("keep_copies", "x", batch.n_tokens(), width, Element::Bf16)?;
        for sequence in &batch.sequences {
            let keep = sequence.rows().len().min(ring);
            let first = sequence.positions().end - keep;
            let rows: Vec<u32> =
                (sequence.rows().end - keep..sequence.rows().end).map(|row| row as u32).collect();
            let before_wrap = keep.min(ring - first % ring);
            for (rows, position) in
                [(&rows[..before_wrap], first), (&rows[before_wrap..], first + before_wrap)]
            {
                let target = cache.copies_row(sequence.slot as usize, position);
                self.gather(&x.values, rows, &cache.copies, target, 2 * width)?;
            }
        }
        Ok(())
    }

    /// See [`HeadOps::kept_copies`](crate::HeadOps::kept_copies).
    pub(super) fn load_copies(
        &self,
        rows: &Batch,
        current: Option<(&Batch, &DeviceTensor)>,
        cache: &DeviceCache,
    ) -> Result<DeviceTensor, OpError> {
        const OP: &str = "kept_copies";
        let width = cache.spec.draft_width;
        if let Some((batch, x)) = current {
            x.expect(OP, "x", batch.n_tokens(), width, Element::Bf16)?;
        }
        let out = self.tensor(rows.n_tokens(), width, Element::Bf16)?;
        let places = locate(rows, current.map(|(batch, _)| batch));
        let is_kept = |place: &CopiesAt| matches!(place, CopiesAt::Kept { .. });
        let mut row = 0;
        for run in places.chunk_by(|a, b| is_kept(a) == is_kept(b)) {
            let list: Vec<u32> = run
                .iter()
                .map(|place| match *place {
                    CopiesAt::Row(row) => row as u32,
                    CopiesAt::Kept { slot, position } => cache.copies_row(slot, position) as u32,
                })
                .collect();
            let source = match current {
                Some((_, x)) if !is_kept(&run[0]) => &x.values,
                _ => &cache.copies,
            };
            self.gather(source, &list, &out.values, row, 2 * width)?;
            row += run.len();
        }
        Ok(out)
    }

    /// Puts the copies `x [T, 4 * D]` where recorded passes over `cache` read them, with as many rows
    /// as the shape that `batch` is rounded up to; `None` if it is rounded up to none.
    pub(super) fn stage_copies(
        &self,
        batch: &Batch,
        x: &DeviceTensor,
        cache: &DeviceCache,
    ) -> Result<Option<DeviceTensor>, OpError> {
        const OP: &str = "stage_copies";
        let width = cache.spec.draft_width;
        let Some(shape) = Shape::in_memory(&self.memory, batch).filter(|_| width > 0) else {
            return Ok(None);
        };
        x.expect(OP, "x", batch.n_tokens(), width, Element::Bf16)?;
        // Rows beyond the batch repeat the first.
        let n_repeated = shape.rows - x.rows;
        let list: Vec<u32> = (0..x.rows as u32).chain(std::iter::repeat_n(0, n_repeated)).collect();
        self.gather(&x.values, &list, &cache.staged, 0, 2 * width)?;
        let values = cache.staged.part(0, 2 * width * shape.rows)?;
        DeviceTensor::of(shape.rows, width, Element::Bf16, values).map(Some)
    }

    /// Copies the rows `list` of `source` to the rows of `target` from `first` on.
    fn gather(
        &self,
        source: &Buffer,
        list: &[u32],
        target: &Buffer,
        first: usize,
        row_bytes: usize,
    ) -> Result<(), OpError> {
        const OP: &str = "gather_rows";
        if list.is_empty() {
            return Ok(());
        }
        check_len(OP, "bytes of a row beyond whole words", row_bytes % 4, 0)?;
        let within = |op, rows: usize, buffer: &Buffer| {
            let (got, limit) = (rows * row_bytes, buffer.len());
            let what = "byte of copies";
            if got <= limit { Ok(()) } else { Err(OpError::OutOfRange { op, what, got, limit }) }
        };
        let n_rows = list.iter().max().map_or(0, |&row| row as usize + 1);
        within("read copies", n_rows, source)?;
        within("write copies", first + list.len(), target)?;
        let rows = self.uploaded(&u32_bytes(list))?;
        // SAFETY: every listed row lies in `source`, and `target` has room for all from `first` on.
        unsafe {
            self.launch(Call {
                kernel: OP,
                grid: [list.len(), 1, 1],
                threads: 128,
                shared_bytes: 0,
                args: &[
                    source.into(),
                    (&rows).into(),
                    Arg::Address(target.address() + (first * row_bytes) as u64),
                    (row_bytes as u32 / 4).into(),
                ],
            })
        }
    }
}
