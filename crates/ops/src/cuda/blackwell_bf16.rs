//! Launchers of the layers of bf16 activations for sm_100f and many tokens: bf16 matrices, several of one
//! input at once, and FP8 matrices whose scales are powers of two.
//!
//! Not here: what the kernels do (`kernels/linear/linear100_bf16.cu`); few tokens, and where results must
//! not depend on their number (`linear`).

use super::blackwell::{THREADS, TILE_ROWS};
use super::device::Arg;
use super::linear::{DeviceLinear, LinearData, Part};
use super::memory::Buffer;
use super::ops::{Call, CudaOps};
use super::tensor::{DeviceTensor, Element};
use super::tensor_map::{MapElement, TensorMap};
use crate::OpError;

/// Multiprocessors of the largest card of the family.
const MAX_BLOCKS: usize = 148;
/// Matrices of a launch.
const MAX_MATRICES: usize = 5;
/// Bytes of a row of weights or of x in a slot.
const ROW_BYTES: usize = 128;
/// Bytes of the codes that are on their way to being expanded.
const CODES: usize = 2 * TILE_ROWS * 128;

/// One form of the kernels, for segments of K in a cluster or one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    bf16: &'static str,
    wo: &'static str,
    /// Tokens of a block, slots of both, blocks of a cluster.
    tokens: usize,
    slots: [usize; 2],
    cluster: usize,
}

/// For 1, 2 and 4 segments: fewer tokens and many.
const FORMS: [[Form; 2]; 3] = [
    [
        Form::new(["linear100_bf16_64_c1", "linear100_wo_64_c1"], 64, [4, 3], 1),
        Form::new(["linear100_bf16_256_s1", "linear100_wo_256_s1"], 256, [2, 4], 1),
    ],
    [
        Form::new(["linear100_bf16_64_c2", "linear100_wo_64_c2"], 64, [4, 3], 2),
        Form::new(["linear100_bf16_256_s2", "linear100_wo_256_s2"], 256, [4, 4], 1),
    ],
    [
        Form::new(["linear100_bf16_64_c4", "linear100_wo_64_c4"], 64, [4, 3], 4),
        Form::new(["linear100_bf16_128_s4", "linear100_wo_128_s4"], 128, [6, 6], 1),
    ],
];

impl Form {
    const fn new(
        [bf16, wo]: [&'static str; 2],
        tokens: usize,
        slots: [usize; 2],
        cluster: usize,
    ) -> Self {
        Self { bf16, wo, tokens, slots, cluster }
    }

    /// Shared memory of `Pipeline` (`kernels/include/pipeline100.cuh`).
    const fn shared_bytes(&self, is_wo: bool) -> u32 {
        let (slots, codes) = if is_wo { (self.slots[1], CODES) } else { (self.slots[0], 0) };
        let slot = (TILE_ROWS + self.tokens) * ROW_BYTES + 16;
        (codes + slots * slot + 48).next_multiple_of(1024) as u32
    }
}

/// The form for `n_tiles` row tiles (of all groups or matrices). How K is divided follows from these
/// alone, so a token's bits do not depend on how many there are.
fn form_of(n_tiles: usize, rows: usize) -> Form {
    let [few, many] = match n_tiles {
        120.. => FORMS[0],
        60..120 => FORMS[1],
        _ => FORMS[2],
    };
    let blocks = n_tiles * rows.div_ceil(many.tokens);
    // One block of fewer tokens reads weights once, too, and has more of them on their way.
    if rows > few.tokens && 4 * blocks >= 3 * MAX_BLOCKS { many } else { few }
}

impl CudaOps {
    /// Whether layers of bf16 activations have a form for many tokens here. Their sums are ordered
    /// otherwise than those of few tokens.
    pub(crate) fn has_tensor_bf16(&self) -> bool {
        self.memory.device().arch() == "sm_100f" && !self.is_deterministic()
    }

    /// A map of a matrix with boxes of 128 rows and 128 bytes.
    fn weights_map(&self, w: &DeviceLinear, values: &Buffer) -> Result<TensorMap, OpError> {
        let (element, bytes) = match w.data {
            LinearData::Bf16(_) => (MapElement::Bf16, 2),
            _ => (MapElement::U8, 1),
        };
        let box_dims = [(ROW_BYTES / bytes) as u32, TILE_ROWS as u32];
        self.tensor_map(element, values, &[w.cols, w.rows], &[bytes * w.cols], &box_dims)
    }

    /// A map of bf16 rows for blocks of `tokens`.
    fn rows_map(&self, x: &DeviceTensor, tokens: usize) -> Result<TensorMap, OpError> {
        let dims = [x.cols, x.rows];
        self.tensor_map(MapElement::Bf16, &x.values, &dims, &[2 * x.cols], &[64, tokens as u32])
    }

    /// `x W^T` of up to five bf16 matrices; `x` has their columns as [`Self::linear_each`] checks.
    pub(crate) fn linear100_each(
        &self,
        matrices: &[(DeviceLinear, Element)],
        x: &DeviceTensor,
    ) -> Result<Vec<DeviceTensor>, OpError> {
        const OP: &str = "linear100_bf16";
        let mut outs = Vec::new();
        for (w, element) in matrices {
            x.expect(OP, "x", x.rows, w.cols, Element::Bf16)?;
            outs.push(self.tensor(x.rows, w.rows, *element)?);
        }
        let bound = matrices.iter().zip(&outs).map(|((w, _), out)| Ok((w, w.bf16(OP, "W")?, out)));
        let bound = bound.collect::<Result<Vec<_>, OpError>>()?;
        let Some((w, ..)) = bound.first() else { return Ok(outs) };
        // Of several matrices all rows are taken.
        self.linear100_bf16(&bound, Part { n_rows: w.rows, n_groups: 1 }, x)?;
        Ok(outs)
    }

    /// Groups of rows of one bf16 matrix times groups of columns of `x`, or all rows of up to five times
    /// `x`: matrices with their values and outputs. The caller has checked the shapes.
    pub(crate) fn linear100_bf16(
        &self,
        matrices: &[(&DeviceLinear, &Buffer, &DeviceTensor)],
        part: Part,
        x: &DeviceTensor,
    ) -> Result<(), OpError> {
        let [(first, ..), rest @ ..] = matrices else { return Ok(()) };
        let n_rows = |index: usize, w: &DeviceLinear| if index == 0 { part.n_rows } else { w.rows };
        let all = matrices.iter().enumerate();
        let n_tiles: usize = all.clone().map(|(i, (w, ..))| n_rows(i, w).div_ceil(TILE_ROWS)).sum();
        debug_assert!(rest.is_empty() || part.n_groups == 1, "several matrices have one group");
        let form = form_of(part.n_groups * n_tiles, x.rows);
        let mut args = vec![Arg::Map(self.rows_map(x, form.tokens)?)];
        args.extend([first.cols, x.rows].map(|n| Arg::U32(n as u32)));
        for (index, (w, values, out)) in all {
            args.push(Arg::Map(self.weights_map(w, values)?));
            args.push((&out.values).into());
            args.extend([n_rows(index, w), out.cols].map(|n| Arg::U32(n as u32)));
            args.push(Arg::U32(u32::from(out.element == Element::F32)));
        }
        for _ in matrices.len()..MAX_MATRICES {
            args.extend([Arg::Map(TensorMap::NONE), Arg::NULL]);
            args.extend([Arg::U32(0), Arg::U32(0), Arg::U32(0)]);
        }
        // SAFETY: the caller's checks; copies end with the tensors of their maps, every matrix has an
        // output of its own, and kernels guard ragged tokens and rows themselves.
        unsafe { self.launch100(form, false, [n_tiles, x.rows, part.n_groups], &args) }
    }

    /// Groups of rows of an FP8 matrix, whose scales are powers of two, times groups of columns of a
    /// bf16 `x`: codes and scales. The caller has checked the shapes.
    pub(crate) fn linear100_wo(
        &self,
        w: &DeviceLinear,
        (codes, scales): (&Buffer, &Buffer),
        part: Part,
        x: &DeviceTensor,
        out: &DeviceTensor,
    ) -> Result<(), OpError> {
        let Part { n_rows, n_groups } = part;
        let n_tiles = n_rows.div_ceil(TILE_ROWS);
        let form = form_of(n_groups * n_tiles, x.rows);
        let mut args = vec![Arg::Map(self.rows_map(x, form.tokens)?)];
        args.extend([w.cols, x.rows].map(|n| Arg::U32(n as u32)));
        args.extend([Arg::Map(self.weights_map(w, codes)?), scales.into(), (&out.values).into()]);
        args.extend([n_rows, out.cols].map(|n| Arg::U32(n as u32)));
        args.push(Arg::U32(u32::from(out.element == Element::F32)));
        // SAFETY: as above; scales are those of the matrix, one for each 128 x 128.
        unsafe { self.launch100(form, true, [n_tiles, x.rows, n_groups], &args) }
    }

    /// Launches a form for row tiles, tokens and groups.
    ///
    /// # Safety
    /// As [`CudaOps::launch`].
    unsafe fn launch100(
        &self,
        form: Form,
        is_wo: bool,
        [n_tiles, rows, n_groups]: [usize; 3],
        args: &[Arg],
    ) -> Result<(), OpError> {
        let call = Call {
            kernel: if is_wo { form.wo } else { form.bf16 },
            grid: [form.cluster * n_tiles, rows.div_ceil(form.tokens), n_groups],
            threads: THREADS,
            shared_bytes: form.shared_bytes(is_wo),
            args,
        };
        // SAFETY: the caller's promise.
        unsafe { self.launch(call) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_follow_from_the_matrix_and_many_tokens_take_wide_blocks() {
        for n_tiles in [1, 21, 59, 60, 119, 120, 1010] {
            let segments = |rows| {
                let form = form_of(n_tiles, rows);
                let number = form.bf16.as_bytes().last().copied();
                assert_eq!(number, form.wo.as_bytes().last().copied());
                number
            };
            assert!([9, 64, 300, 8192].into_iter().all(|rows| segments(rows) == segments(9)));
        }
        assert_eq!(form_of(21, 512).bf16, "linear100_bf16_64_c4");
        assert_eq!(form_of(21, 1024).bf16, "linear100_bf16_128_s4");
        assert_eq!(form_of(64, 128).wo, "linear100_wo_64_c2");
        assert_eq!(form_of(64, 8192).wo, "linear100_wo_256_s2");
        assert_eq!(form_of(1010, 64).bf16, "linear100_bf16_64_c1");
        assert_eq!(form_of(1010, 65).bf16, "linear100_bf16_256_s1");
    }

    #[test]
    fn blocks_fit_a_multiprocessor_once_or_where_they_should_twice() {
        const SM_BYTES: u32 = 228 << 10;
        // The system takes a KiB of each block's.
        for [few, many] in FORMS {
            for is_wo in [false, true] {
                assert!(2 * (few.shared_bytes(is_wo) + 1024) <= SM_BYTES);
                assert!(many.shared_bytes(is_wo) + 1024 <= SM_BYTES);
            }
        }
        assert!(2 * (FORMS[0][1].shared_bytes(false) + 1024) <= SM_BYTES);
    }
}
