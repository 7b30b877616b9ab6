//! The output of a product, written by several threads at once, each its own rectangle.

use std::marker::PhantomData;
use std::ops::Range;

use crate::cpu::isa::GROUP;

/// `[n_tokens, n_rows]`, row-major, to be handed out in rectangles.
#[derive(Debug)]
pub(super) struct Output<'a> {
    values: *mut f32,
    len: usize,
    n_rows: usize,
    exclusive: PhantomData<&'a mut [f32]>,
}

// SAFETY: what is handed out are rectangles that do not overlap, by the contract of `rectangle`.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub(super) fn new(values: &'a mut [f32], n_rows: usize) -> Self {
        let len = values.len();
        Self { values: values.as_mut_ptr(), len, n_rows, exclusive: PhantomData }
    }

    /// The weight rows `rows` of the tokens `tokens`.
    ///
    /// # Safety
    /// No two rectangles of an output that exist at once may overlap.
    ///
    /// # Panics
    /// If the rectangle is not part of the output.
    pub(super) unsafe fn rectangle(
        &self,
        rows: Range<usize>,
        tokens: Range<usize>,
    ) -> Rectangle<'_> {
        assert!(
            rows.end <= self.n_rows && tokens.end * self.n_rows <= self.len,
            "not in the output"
        );
        Rectangle { output: self, rows, tokens }
    }
}

/// Part of an output that has one owner.
#[derive(Debug)]
pub(super) struct Rectangle<'a> {
    output: &'a Output<'a>,
    rows: Range<usize>,
    tokens: Range<usize>,
}

impl Rectangle<'_> {
    /// The weight rows `rows` of token `token`.
    #[inline(always)]
    pub(super) fn run(&mut self, token: usize, rows: Range<usize>) -> &mut [f32] {
        let inside = self.tokens.contains(&token) && self.rows.start <= rows.start;
        assert!(inside && rows.end <= self.rows.end, "outside the rectangle");
        assert!(rows.start < rows.end, "a run of rows");
        // SAFETY: the assertions keep the run inside the rectangle, which is inside the output, and
        // nobody else has a part of it.
        unsafe {
            let first = self.output.values.add(token * self.output.n_rows + rows.start);
            std::slice::from_raw_parts_mut(first, rows.len())
        }
    }

    /// Writes the first `n` sums to weight rows `row..` of token `token`.
    #[inline(always)]
    pub(super) fn write(&mut self, token: usize, row: usize, n: usize, sums: [f32; GROUP]) {
        let inside = self.tokens.contains(&token) && self.rows.start <= row;
        assert!(inside && row + n <= self.rows.end, "outside the rectangle");
        // SAFETY: the assertion keeps the targets inside the rectangle, which is inside the output,
        // and nobody else has a part of it.
        unsafe {
            let target = self.output.values.add(token * self.output.n_rows + row);
            if n == GROUP {
                target.cast::<[f32; GROUP]>().write_unaligned(sums);
            } else {
                for (i, sum) in sums.into_iter().enumerate().take(n) {
                    target.add(i).write(sum);
                }
            }
        }
    }
}
