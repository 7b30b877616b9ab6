//! Tensor copies: where the bytes of a box come to lie, and zeros outside of the tensor.

use super::Report;
use crate::OpError;
use crate::cuda::device::Arg;
use crate::cuda::ops::Call;
use crate::cuda::tensor_map::{MapElement, Swizzle, TensorMapSpec};

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
            let out = ops.buffer(box_bytes)?;
            let first = at.map(|n: usize| (n as u32).to_le_bytes());
            let first = ops.uploaded(first.as_flattened())?;
            let sizes = [box_bytes, counted].map(|n| Arg::U32(n as u32));
            let args = [Arg::Map(map), (&first).into(), (&out).into(), sizes[0], sizes[1]];
            let shared_bytes = box_bytes.max(1024) as u32 + 1024;
            // SAFETY: the box of the map has `box_bytes` bytes, as the buffer and shared memory do.
            unsafe {
                ops.launch(Call {
                    kernel: "check_tensor_copy",
                    grid: [1; 3],
                    threads: 128,
                    shared_bytes,
                    args: &args,
                })?;
            }
            let mut got = out.read(0, box_bytes)?;
            if is_fp4 {
                // What lies in the gaps is nobody's business.
                got.chunks_mut(16).for_each(|piece| piece[8..].fill(0));
            }
            let expected = boxed(&bytes, at, columns, bits, row_bytes, swizzle.bytes() as usize);
            let what = format!("tensor copy, {element:?}, {swizzle:?}, from {at:?}");
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
