//! Rows of `x` in the order in which the lanes take them.

use std::ops::Range;

use crate::cpu::isa::{BLOCK, Block, Isa, Task};

/// Packs columns of the rows of a panel, `x [n_rows, width]`, for a format of stride `stride`.
///
/// The packed form is block-major, `[blocks, n_rows]`, and ends with a block padded with zeros if
/// the columns are no whole blocks. A product of many rows goes through it from start to end.
/// (Row-major, the rows of a block would lie at distances of a power of two and evict each other
/// from the cache.)
pub(super) struct Pack<'a> {
    pub(super) x: &'a [f32],
    pub(super) width: usize,
    pub(super) columns: Range<usize>,
    /// Distance between the columns of neighbouring lanes.
    pub(super) stride: usize,
    pub(super) out: &'a mut [Block],
}

impl Task for Pack<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.stride {
            1 => pack::<I, 1>(isa, self),
            2 => pack::<I, 2>(isa, self),
            _ => pack::<I, 8>(isa, self),
        }
    }
}

#[inline(always)]
fn pack<I: Isa, const STRIDE: usize>(isa: I, args: Pack<'_>) {
    let n_rows = args.x.len() / args.width;
    for (row_id, row) in args.x.chunks_exact(args.width).enumerate() {
        let row = &row[args.columns.clone()];
        let (blocks, rest) = row.as_chunks::<BLOCK>();
        let mut packed = args.out.iter_mut().skip(row_id).step_by(n_rows);
        for (block, packed) in blocks.iter().zip(&mut packed) {
            isa.deinterleave::<STRIDE>(block, packed);
        }
        if let Some(packed) = packed.next() {
            let mut padded = [0.0; BLOCK];
            padded[..rest.len()].copy_from_slice(rest);
            isa.deinterleave::<STRIDE>(&padded, packed);
        }
    }
}
