//! Rows of `x` in the order in which the lanes take them.

use super::isa::{BLOCK, Block, Isa, Task};

/// Packs rows `first..first + n` of `x [n_rows, cols]`.
///
/// The packed form is block-major, `[blocks, n_rows]`: a block of all rows lies together, which
/// is what a product of many rows goes through (row-major, the rows of a block would lie at
/// distances of a power of two and evict each other from the cache).
pub(super) struct Pack<'a> {
    pub(super) x: &'a [f32],
    pub(super) cols: usize,
    /// Distance between the columns of neighbouring lanes.
    pub(super) stride: usize,
    /// Blocks `first_block..`, as many as `out` holds.
    pub(super) first_block: usize,
    pub(super) out: &'a mut [Block],
}

impl Task for Pack<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let n_rows = self.x.len() / self.cols;
        for (block, packed) in (self.first_block..).zip(self.out.chunks_exact_mut(n_rows)) {
            let start = block * BLOCK;
            let len = BLOCK.min(self.cols - start);
            for (row, packed) in self.x.chunks_exact(self.cols).zip(packed) {
                let values = &row[start..start + len];
                match values.as_array::<BLOCK>() {
                    Some(values) => isa.deinterleave(values, self.stride, packed),
                    None => {
                        let mut padded = [0.0; BLOCK];
                        padded[..len].copy_from_slice(values);
                        isa.deinterleave(&padded, self.stride, packed);
                    }
                }
            }
        }
    }
}
