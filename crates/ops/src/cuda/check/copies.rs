//! Tensor copies: where the bytes of a box come to lie, and zeros outside of the tensor.

use super::Report;
use crate::OpError;
use crate::cuda::device::Arg;
use crate::cuda::ops::Call;
use crate::cuda::tensor_map::{MapElement, Swizzle, TensorMap, TensorMapSpec};

/// Rows and bytes of a row of the tensor, rows of the box.
const ROWS: usize = 21;
const ROW_BYTES: usize = 192;
const BOX_ROWS: usize = 16;

/// Every swizzle and element, from inside of the tensor and over its edges; only on architectures
/// that have tensor copies.
pub(super) fn tensor_copies(report: &mut Report<'_>) -> Result<(), OpError> {
    let ops = report.ops;
    if !matches!(ops.memory().device().arch(), "sm_90a" | "sm_100f") {
        return Ok(());
    }
    let bytes: Vec<u8> = (0..ROWS * ROW_BYTES).map(|_| report.random.bits() as u8).collect();
    let tensor = ops.uploaded(&bytes)?;
    for (element, swizzle, row_bytes) in [
        (MapElement::U8, Swizzle::None, 80),
        (MapElement::U8, Swizzle::B32, 32),
        (MapElement::Bf16, Swizzle::B64, 64),
        (MapElement::U8, Swizzle::B128, 128),
        (MapElement::Padded4, Swizzle::B128, 128),
    ] {
        let bits = element.bits() as usize;
        let is_fp4 = element == MapElement::Padded4;
        // 4-bit values only exist on sm_100f, in rows of 128.
        if is_fp4 && ops.memory().device().arch() == "sm_90a" {
            continue;
        }
        let columns = if is_fp4 { 128 } else { row_bytes * 8 / bits };
        let n_columns = ROW_BYTES * 8 / bits;
        let spec = TensorMapSpec {
            element,
            address: tensor.address(),
            dims: &[n_columns as u64, ROWS as u64],
            strides: &[ROW_BYTES as u64],
            box_dims: &[columns as u32, BOX_ROWS as u32],
            swizzle,
        };
        let map = ops.memory().device().encode(&spec).map_err(OpError::device)?;
        let (box_bytes, counted) = (BOX_ROWS * row_bytes, BOX_ROWS * columns * bits / 8);
        for at in [[0, 0], [if is_fp4 { 256 } else { n_columns - columns / 2 }, 9]] {
            // SAFETY: the box of the map has `box_bytes` bytes.
            let mut got =
                unsafe { copied(report, "check_tensor_copy", map, &at, box_bytes, counted)? };
            if is_fp4 {
                // What lies in the gaps is nobody's business.
                got.chunks_mut(16).for_each(|piece| piece[8..].fill(0));
            }
            let expected = boxed(&bytes, at, columns, bits, row_bytes, swizzle.bytes() as usize);
            let what = format!("tensor copy, {element:?}, {swizzle:?}, from {at:?}");
            report.mostly_equal(what, &got, &expected, 0.0);
        }
    }
    copies_of_more_dimensions(report)
}

/// The box at `at` as a kernel finds it in shared memory.
///
/// # Safety
/// The box of `map` has `box_bytes` bytes.
unsafe fn copied(
    report: &Report<'_>,
    kernel: &'static str,
    map: TensorMap,
    at: &[usize],
    box_bytes: usize,
    counted: usize,
) -> Result<Vec<u8>, OpError> {
    let ops = report.ops;
    let out = ops.buffer(box_bytes)?;
    let first: Vec<u8> = at.iter().flat_map(|&n| (n as u32).to_le_bytes()).collect();
    let first = ops.uploaded(&first)?;
    let sizes = [box_bytes, counted].map(|n| Arg::U32(n as u32));
    let args = [Arg::Map(map), (&first).into(), (&out).into(), sizes[0], sizes[1]];
    let shared_bytes = box_bytes.max(2048) as u32 + 1024;
    // SAFETY: the caller's promise; the buffer and shared memory have as many bytes.
    unsafe { ops.launch(Call { kernel, grid: [1; 3], threads: 128, shared_bytes, args: &args })? };
    out.read(0, box_bytes)
}

/// Three and five dimensions, of which the innermost are as far apart as those around them demand.
fn copies_of_more_dimensions(report: &mut Report<'_>) -> Result<(), OpError> {
    const DIMS: [usize; 5] = [48, 5, 4, 3, 2];
    const BOX: [usize; 5] = [32, 3, 2, 2, 2];
    const STRIDES: [usize; 5] = [1, 64, 64 * 5, 64 * 20, 64 * 60];
    let ops = report.ops;
    let bytes: Vec<u8> = (0..64 * 120).map(|_| report.random.bits() as u8).collect();
    let tensor = ops.uploaded(&bytes)?;
    for (kernel, rank) in [("check_tensor_copy_3", 3), ("check_tensor_copy_5", 5)] {
        let wide = |numbers: &[usize]| numbers.iter().map(|&n| n as u64).collect::<Vec<u64>>();
        let spec = TensorMapSpec {
            element: MapElement::U8,
            address: tensor.address(),
            dims: &wide(&DIMS[..rank]),
            strides: &wide(&STRIDES[1..rank]),
            box_dims: &BOX[..rank].iter().map(|&n| n as u32).collect::<Vec<u32>>(),
            swizzle: Swizzle::None,
        };
        let map = ops.memory().device().encode(&spec).map_err(OpError::device)?;
        let box_bytes = BOX[..rank].iter().product();
        for at in [[16, 1, 2, 1, 0], [32, 3, 3, 2, 1]] {
            // SAFETY: as many bytes as the box has elements of one byte.
            let got = unsafe { copied(report, kernel, map, &at[..rank], box_bytes, box_bytes)? };
            let element = |mut i: usize| {
                let (mut from, mut is_inside) = (0, true);
                for d in 0..rank {
                    let place = at[d] + i % BOX[d];
                    i /= BOX[d];
                    is_inside &= place < DIMS[d];
                    from += place * STRIDES[d];
                }
                if is_inside { bytes[from] } else { 0 }
            };
            let expected: Vec<u8> = (0..box_bytes).map(element).collect();
            let what = format!("tensor copy, {rank} dimensions, from {:?}", &at[..rank]);
            report.mostly_equal(what, &got, &expected, 0.0);
        }
    }
    Ok(())
}

/// The box at `at` as it lies in shared memory.
fn boxed(
    tensor: &[u8],
    at: [usize; 2],
    columns: usize,
    bits: usize,
    row_bytes: usize,
    span: usize,
) -> Vec<u8> {
    let mut out = vec![0; BOX_ROWS * row_bytes];
    for row in 0..BOX_ROWS {
        for i in 0..columns * bits / 8 {
            let from = at[0] * bits / 8 + i;
            if at[1] + row >= ROWS || from >= ROW_BYTES {
                continue;
            }
            let to = row * row_bytes + if bits == 4 { i / 8 * 16 + i % 8 } else { i };
            // Pieces of 16 bytes are exchanged by the number of the 128 bytes they lie in.
            let exchanged = if span == 0 { 0 } else { to / 128 % (span / 16) * 16 };
            out[to ^ exchanged] = tensor[(at[1] + row) * ROW_BYTES + from];
        }
    }
    out
}
