//! Number formats: conversions and expansions of `kernels/include/formats.cuh`, exhaustively.

use fathom_core::num::{
    Ue8m0, e2m1_from_f32, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32, fp4_block_scale,
    fp8_block_scale, round_bf16,
};

use super::Report;
use crate::OpError;
use crate::cuda::device::Arg;
use crate::cuda::memory::Buffer;
use crate::cuda::ops::Call;
use crate::cuda::tensor::{f32_bytes, f32_values};

/// Every bf16 value, and what lies around the ties between bf16 values.
fn inputs() -> Vec<f32> {
    (0..=0xffff_u32)
        .flat_map(|high| {
            [high << 16, high << 16 | 0x7fff, high << 16 | 0x8000, high << 16 | 0x8001]
        })
        .map(f32::from_bits)
        .collect()
}

/// Conversions of every bf16 value and expansions of every code.
pub(super) fn formats(report: &mut Report<'_>) -> Result<(), OpError> {
    let ops = report.ops;
    let x = inputs();
    let n = x.len();
    let input = ops.uploaded(&f32_bytes(&x))?;
    let outs = [1, 1, 2, 1, 1].map(|width| ops.buffer(n * width));
    let [e4m3, e2m1, rounded, fp8, fp4] = outs;
    let outs = [e4m3?, e2m1?, rounded?, fp8?, fp4?];
    let mut args = vec![Arg::from(&input)];
    args.extend(outs.iter().map(Arg::from));
    args.push(Arg::U32(n as u32));
    // SAFETY: n inputs, and 1, 1, 2, 1, 1 bytes of output for each.
    unsafe { check_kernel(report, "check_formats", n, &args)? };
    let read = |buffer: &Buffer| buffer.read(0, buffer.len());
    let [e4m3, e2m1, rounded, fp8, fp4] = outs.each_ref().map(read);
    let (e4m3, e2m1, rounded, fp8, fp4) = (e4m3?, e2m1?, rounded?, fp8?, fp4?);
    report.mostly_equal("f32 to e4m3", &e4m3, &map(&x, e4m3_from_f32), 0.0);
    report.mostly_equal("f32 to e2m1", &e2m1, &map(&x, e2m1_from_f32), 0.0);
    // NaNs may differ in their payload.
    let numbers: Vec<usize> = (0..n).filter(|&i| !x[i].is_nan()).collect();
    let got: Vec<u32> = numbers
        .iter()
        .map(|&i| u32::from(u16::from_le_bytes([rounded[2 * i], rounded[2 * i + 1]])) << 16)
        .collect();
    let expected: Vec<u32> = numbers.iter().map(|&i| round_bf16(x[i]).to_bits()).collect();
    report.mostly_equal("f32 to bf16", &got, &expected, 0.0);
    let finite: Vec<usize> = (0..n).filter(|&i| x[i].is_finite()).collect();
    for (what, got, scale) in [
        ("FP8 block scale", &fp8, fp8_block_scale as fn(f32) -> Ue8m0),
        ("FP4 block scale", &fp4, fp4_block_scale as fn(f32) -> Ue8m0),
    ] {
        let got: Vec<u8> = finite.iter().map(|&i| got[i]).collect();
        let expected: Vec<u8> = finite.iter().map(|&i| scale(x[i].abs()).byte()).collect();
        report.mostly_equal(what, &got, &expected, 0.0);
    }
    [0, 1, 60, 120, 127, 128].into_iter().try_for_each(|scale| expansions(report, scale))?;
    super::copies::tensor_copies(report)
}

fn map(x: &[f32], convert: impl Fn(f32) -> u8) -> Vec<u8> {
    x.iter().map(|&x| convert(x)).collect()
}

/// Every code at each of its places, FP4 codes times the E8M0 scale `scale`.
fn expansions(report: &mut Report<'_>, scale: u8) -> Result<(), OpError> {
    let ops = report.ops;
    // Every byte at each of the four places, its neighbours different.
    let codes: Vec<u8> =
        (0..=255_u8).flat_map(|c| [c, c.wrapping_add(85), c.wrapping_mul(3), !c]).collect();
    let n = codes.len() / 4;
    let input = ops.uploaded(&codes)?;
    let [a, b, c, d] = [4, 8, 4, 8].map(|values| ops.buffer(4 * values * n));
    let outs = [a?, b?, c?, d?];
    let mut args = vec![Arg::from(&input), Arg::U32(scale.into())];
    args.extend(outs.iter().map(Arg::from));
    args.push(Arg::U32(n as u32));
    // SAFETY: n words of 4 codes; 4, 8, 4 and 8 f32 values of output for each.
    unsafe { check_kernel(report, "check_expand", n, &args)? };
    let read = |buffer: &Buffer| Ok::<_, OpError>(f32_values(&buffer.read(0, buffer.len())?));
    let [e4m3, e2m1, e4m3_scalar, e2m1_scalar] = outs.each_ref().map(read);
    let factor = Ue8m0::from_exponent(i32::from(scale) - 127).to_f32();
    let fp8: Vec<f32> = codes.iter().map(|&code| e4m3_to_f32(code)).collect();
    let fp4: Vec<f32> = codes
        .iter()
        .flat_map(|&code| [0, 4].map(|shift| e2m1_to_f32(code >> shift & 15) * factor))
        .collect();
    // NaN codes are not expanded: the loader refuses them.
    let is_number: Vec<usize> = (0..fp8.len()).filter(|&i| !fp8[i].is_nan()).collect();
    let numbers = |values: &[f32]| is_number.iter().map(|&i| values[i]).collect::<Vec<f32>>();
    for (what, got) in [("e4m3 expansion", e4m3?), ("e4m3 value", e4m3_scalar?)] {
        report.mostly_equal(what, &numbers(&got), &numbers(&fp8), 0.0);
    }
    for (what, got) in [("e2m1 expansion", e2m1?), ("e2m1 value", e2m1_scalar?)] {
        report.mostly_equal(format!("{what} times 2^({scale} - 127)"), &got, &fp4, 0.0);
    }
    Ok(())
}

/// # Safety
/// As [`Device::launch`](crate::cuda::Device::launch).
unsafe fn check_kernel(
    report: &Report<'_>,
    kernel: &'static str,
    n: usize,
    args: &[Arg],
) -> Result<(), OpError> {
    let grid = [n.div_ceil(128), 1, 1];
    // SAFETY: the caller's promise is the one asked for.
    unsafe { report.ops.launch(Call { kernel, grid, threads: 128, shared_bytes: 0, args }) }
}
