//! Pages: the rows of one block and layer as FP8 attention kernels read them.
//!
//! Kernels for this cache (FlashMLA and what follows its layout) want the rows of a page apart from
//! their scales, so that a row's data is aligned:
//!
//! | rows | data | scales | bytes of a page |
//! |---|---|---|---|
//! | KV, 584 bytes | `n` x 576: 448 E4M3, 64 bf16 | then `n` x 8: 7 E8M0 and a zero | rounded up to 576 |
//! | indexer keys, 132 bytes | `n` x 128 E4M3 | then `n` x 4: one f32 | not rounded |
//!
//! The stores of this crate keep each row in one piece; a page holds the same bytes, moved. Packing is
//! its own inverse's inverse: nothing is computed, so nothing can be lost.
//!
//! Not here: what a row holds (`row_formats`), who keeps pages.

use crate::OpError;
use crate::error::check_len;
use crate::row_formats::{IndexKeyFormat, KvFormat};

/// How the rows of a page lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLayout {
    n_rows: usize,
    data_bytes: usize,
    scale_bytes: usize,
    align: usize,
}

impl PageLayout {
    /// A page of `n_rows` FP8 KV rows.
    #[must_use]
    pub const fn kv(n_rows: usize) -> Self {
        Self { n_rows, data_bytes: 576, scale_bytes: 8, align: 576 }
    }

    /// A page of `n_rows` FP8 indexer keys.
    #[must_use]
    pub const fn index_keys(n_rows: usize) -> Self {
        Self { n_rows, data_bytes: 128, scale_bytes: 4, align: 1 }
    }

    /// Bytes of one row in one piece.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.data_bytes + self.scale_bytes
    }

    /// Where the data of row `row` begins in the page.
    #[must_use]
    pub const fn data_offset(&self, row: usize) -> usize {
        row * self.data_bytes
    }

    /// Where the scales of row `row` begin in the page.
    #[must_use]
    pub const fn scale_offset(&self, row: usize) -> usize {
        self.n_rows * self.data_bytes + row * self.scale_bytes
    }

    /// Bytes of the page, padding included.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        (self.n_rows * self.row_bytes()).next_multiple_of(self.align)
    }

    /// Lays rows out as a page; padding becomes zero.
    ///
    /// # Errors
    /// [`OpError::Shape`] if `rows` or `page` has another size than the layout says.
    pub fn pack(&self, rows: &[u8], page: &mut [u8]) -> Result<(), OpError> {
        self.check("pack_page", rows, page)?;
        page[self.n_rows * self.row_bytes()..].fill(0);
        for (index, row) in rows.chunks_exact(self.row_bytes()).enumerate() {
            let (data, scales) = row.split_at(self.data_bytes);
            page[self.data_offset(index)..][..self.data_bytes].copy_from_slice(data);
            page[self.scale_offset(index)..][..self.scale_bytes].copy_from_slice(scales);
        }
        Ok(())
    }

    /// Takes a page apart into its rows.
    ///
    /// # Errors
    /// As [`PageLayout::pack`].
    pub fn unpack(&self, page: &[u8], rows: &mut [u8]) -> Result<(), OpError> {
        self.check("unpack_page", rows, page)?;
        for (index, row) in rows.chunks_exact_mut(self.row_bytes()).enumerate() {
            let (data, scales) = row.split_at_mut(self.data_bytes);
            data.copy_from_slice(&page[self.data_offset(index)..][..self.data_bytes]);
            scales.copy_from_slice(&page[self.scale_offset(index)..][..self.scale_bytes]);
        }
        Ok(())
    }

    fn check(&self, op: &'static str, rows: &[u8], page: &[u8]) -> Result<(), OpError> {
        check_len(op, "rows", rows.len(), self.n_rows * self.row_bytes())?;
        check_len(op, "page", page.len(), self.page_bytes())
    }
}

// The layouts above are those of the rows that the stores keep.
const _: () = assert!(PageLayout::kv(1).row_bytes() == KvFormat::Fp8.row_bytes());
const _: () = assert!(PageLayout::index_keys(1).row_bytes() == IndexKeyFormat::Fp8.row_bytes());

#[cfg(test)]
mod tests {
    use fathom_core::num::{e4m3_from_f32, round_bf16};
    use half::bf16;

    use super::*;
    use crate::cpu::pack_rows;

    /// A page of KV rows written from values, byte by byte, as the cache specification describes it;
    /// shares no code with the packer under test.
    fn reference_page(values: &[f32], n_rows: usize) -> Vec<u8> {
        let padded = (n_rows * 584).div_ceil(576) * 576;
        let mut page = vec![0; padded];
        for row in 0..n_rows {
            let channels = &values[row * 512..][..512];
            for block in 0..7 {
                let amax = (0..64).map(|i| channels[block * 64 + i].abs()).fold(1e-4, f32::max);
                // The smallest e with 2^e >= amax / 448.
                let exponent = (-127..=127).find(|e| 448.0 * 2.0_f32.powi(*e) >= amax).unwrap();
                for i in 0..64 {
                    let code = e4m3_from_f32(channels[block * 64 + i] / 2.0_f32.powi(exponent));
                    page[row * 576 + block * 64 + i] = code;
                }
                page[n_rows * 576 + row * 8 + block] = u8::try_from(exponent + 127).unwrap();
            }
            for i in 0..64 {
                let [low, high] = bf16::from_f32(channels[448 + i]).to_le_bytes();
                page[row * 576 + 448 + 2 * i] = low;
                page[row * 576 + 448 + 2 * i + 1] = high;
            }
        }
        page
    }

    fn values(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| {
                let wave = ((i * 37 + i * i % 101) % 199) as f32 / 99.0 - 1.0;
                round_bf16(wave * 2.0_f32.powi((i / 64 % 9) as i32 - 4))
            })
            .collect()
    }

    #[test]
    fn a_packed_page_is_the_reference_page_for_every_block_and_window_size() {
        for n_rows in [1, 2, 64, 128] {
            let values = values(n_rows * 512);
            let layout = PageLayout::kv(n_rows);
            let rows = pack_rows(KvFormat::Fp8, &values);
            let mut page = vec![0xaa; layout.page_bytes()];
            layout.pack(&rows, &mut page).unwrap();
            assert_eq!(page, reference_page(&values, n_rows), "{n_rows} rows");

            let mut back = vec![0; rows.len()];
            layout.unpack(&page, &mut back).unwrap();
            assert_eq!(back, rows);
        }
    }

    #[test]
    fn offsets_and_sizes_are_those_of_the_cache_specification() {
        let page = PageLayout::kv(64);
        assert_eq!((page.data_offset(0), page.data_offset(63)), (0, 36_288));
        assert_eq!((page.scale_offset(0), page.scale_offset(1)), (36_864, 36_872));
        // 37,376 bytes of rows, 64 bytes of padding; two rows of a ratio-128 layer.
        assert_eq!((page.page_bytes(), PageLayout::kv(2).page_bytes()), (37_440, 1_728));
        let keys = PageLayout::index_keys(64);
        assert_eq!((keys.page_bytes(), keys.scale_offset(0)), (8_448, 8_192));
    }

    #[test]
    fn the_pad_byte_and_the_padding_are_zero_whatever_was_there() {
        let layout = PageLayout::kv(2);
        let rows = pack_rows(KvFormat::Fp8, &values(2 * 512));
        let mut page = vec![0xff; layout.page_bytes()];
        layout.pack(&rows, &mut page).unwrap();
        assert_eq!((page[2 * 576 + 7], page[2 * 576 + 15]), (0, 0));
        assert!(page[2 * 584..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn other_sizes_are_refused_by_name() {
        let layout = PageLayout::kv(2);
        let error = layout.pack(&[0; 584], &mut [0; 1728]).unwrap_err().to_string();
        assert!(error.contains("rows") && error.contains("1168"), "{error}");
        assert!(layout.unpack(&[0; 1168], &mut [0; 1168]).is_err());
    }
}
