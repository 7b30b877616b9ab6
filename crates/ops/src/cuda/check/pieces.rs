//! Functions that several kernels share, each by itself against its definition in f64: rotary embedding, Sinkhorn's
//! iterations, the sums of attention's parts, the steps of a selection.

use fathom_core::model_config::{HEAD_DIM, INDEX_HEAD_DIM};
use fathom_core::num::round_bf16;

use super::{BF16_STEP, Report, Size};
use crate::OpError;
use crate::cuda::device::Arg;
use crate::cuda::memory::Buffer;
use crate::cuda::ops::Call;
use crate::cuda::tensor::{f32_bytes, f32_values, u32_bytes, u32_values};

/// Channels of a row that are rotated.
const ROPE_DIM: usize = 64;
const LANES: usize = 32;
const BINS: usize = 256;

/// All of them.
pub(super) fn pieces(report: &mut Report<'_>) -> Result<(), OpError> {
    let n = if report.size == Size::Small { 37 } else { 4096 };
    rope(report, n)?;
    sinkhorn(report, n)?;
    [1, 2, 5, 33, 40].into_iter().try_for_each(|n_splits| merge(report, n, n_splits))?;
    selection(report, n)
}

/// One warp per case, four to a block.
///
/// # Safety
/// As [`Device::launch`](crate::cuda::Device::launch).
unsafe fn run(
    report: &Report<'_>,
    kernel: &'static str,
    n: usize,
    args: &[Arg],
) -> Result<(), OpError> {
    let grid = [n.div_ceil(4), 1, 1];
    // SAFETY: the caller's promise is the one asked for.
    unsafe { report.ops.launch(Call { kernel, grid, threads: 128, shared_bytes: 0, args }) }
}

fn floats(buffer: &Buffer) -> Result<Vec<f32>, OpError> {
    Ok(f32_values(&buffer.read(0, buffer.len())?))
}

/// Rows of `width` channels rotated by `direction` times their positions' angles, in f64; to bf16.
fn rotated(
    x: &[f32],
    width: usize,
    positions: &[u32],
    frequencies: &[f32],
    direction: f64,
) -> Vec<f32> {
    let mut out = x.to_vec();
    for (row, &position) in out.chunks_exact_mut(width).zip(positions) {
        let pairs = row[width - ROPE_DIM..].chunks_exact_mut(2);
        for (pair, &frequency) in pairs.zip(frequencies) {
            // The angle is an f32 by definition.
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            let (re, im, sin) = (f64::from(pair[0]), f64::from(pair[1]), sin * direction);
            pair[0] = round_bf16((re * cos - im * sin) as f32);
            pair[1] = round_bf16((re * sin + im * cos) as f32);
        }
    }
    out
}

fn rope(report: &mut Report<'_>, n: usize) -> Result<(), OpError> {
    let ops = report.ops.clone();
    let x = report.random.values(n * HEAD_DIM, 4.0);
    let frequencies: Vec<f32> =
        (0..ROPE_DIM / 2).map(|i| 160_000_f32.powf(-2.0 * i as f32 / ROPE_DIM as f32)).collect();
    // The first, the last of a million, and others.
    let mut positions: Vec<u32> = (0..n).map(|_| report.random.below(1 << 20) as u32).collect();
    positions[0] = 0;
    positions[n - 1] = (1 << 20) - 1;
    let inputs = [f32_bytes(&x), f32_bytes(&frequencies), u32_bytes(&positions)]
        .map(|bytes| ops.uploaded(&bytes));
    let [a, b, c] = inputs;
    let (a, b, c) = (a?, b?, c?);
    let outs = [HEAD_DIM, HEAD_DIM, INDEX_HEAD_DIM, INDEX_HEAD_DIM].map(|w| ops.buffer(4 * n * w));
    let [forth, back, short_forth, short_back] = outs;
    let outs = [forth?, back?, short_forth?, short_back?];
    let mut args = vec![Arg::from(&a), Arg::from(&b), Arg::from(&c)];
    args.extend(outs.iter().map(Arg::from));
    args.push(Arg::U32(n as u32));
    // SAFETY: n rows of 512 channels and n positions; 32 frequencies; two outputs of 512 channels and two
    // of 128 for each row.
    unsafe { run(report, "check_rope", n, &args)? };
    let tails = |rows: &[f32]| -> Vec<f32> {
        rows.chunks_exact(HEAD_DIM)
            .flat_map(|row| row[HEAD_DIM - INDEX_HEAD_DIM..].to_vec())
            .collect()
    };
    let widths = [(HEAD_DIM, x.clone()), (INDEX_HEAD_DIM, tails(&x))];
    for ((width, x), pair) in widths.into_iter().zip(outs.chunks_exact(2)) {
        let (forth, back) = (floats(&pair[0])?, floats(&pair[1])?);
        let expected = rotated(&x, width, &positions, &frequencies, 1.0);
        // Nearly all round alike; one that does not moves by a step of its own size.
        report.close(format!("rotation of {width} channels"), &forth, &expected, BF16_STEP);
        report.mostly_equal(
            format!("rotation of {width} channels, bits"),
            &forth,
            &expected,
            0.002,
        );
        let expected = rotated(&forth, width, &positions, &frequencies, -1.0);
        report.close(format!("rotation of {width} channels back"), &back, &expected, BF16_STEP);
        report.mostly_equal(format!("rotation back of {width}, bits"), &back, &expected, 0.002);
        let rest = |rows: &[f32]| -> Vec<f32> {
            rows.chunks_exact(width).flat_map(|row| row[..width - ROPE_DIM].to_vec()).collect()
        };
        report.mostly_equal(format!("what {width} channels keep"), &rest(&back), &rest(&x), 0.0);
    }
    Ok(())
}

/// `comb` of 16 products in f64, by the definition's steps.
fn comb(mix: &[f32], scale: f32, base: &[f32], n_iters: u32, eps: f64) -> Vec<f32> {
    let mut c: Vec<f64> = mix
        .iter()
        .zip(base)
        .map(|(&mix, &base)| f64::from(mix) * f64::from(scale) + f64::from(base))
        .collect();
    for row in c.chunks_exact_mut(4) {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        row.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|x| *x = *x / sum + eps);
    }
    for iter in 0..n_iters {
        if iter > 0 {
            for row in c.chunks_exact_mut(4) {
                let sum = row.iter().sum::<f64>() + eps;
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }
        for column in 0..4 {
            let sum = (0..4).map(|row| c[4 * row + column]).sum::<f64>() + eps;
            (0..4).for_each(|row| c[4 * row + column] /= sum);
        }
    }
    c.into_iter().map(|x| x as f32).collect()
}

fn sinkhorn(report: &mut Report<'_>, n: usize) -> Result<(), OpError> {
    let ops = report.ops.clone();
    let (base, scale, n_iters, eps) = (report.random.values(16, 0.5), 0.9, 20, 1e-6);
    let mut mix = report.random.values(n * 16, 8.0);
    // Equal ones, and one that is far above the others.
    mix[..16].fill(0.0);
    mix[16..32].fill(-40.0);
    mix[21] = 40.0;
    let (a, b) = (ops.uploaded(&f32_bytes(&mix))?, ops.uploaded(&f32_bytes(&base))?);
    let out = ops.buffer(4 * n * LANES)?;
    let args = [
        (&a).into(),
        (&b).into(),
        (&out).into(),
        scale.into(),
        n_iters.into(),
        (eps as f32).into(),
        Arg::U32(n as u32),
    ];
    // SAFETY: 16 products and 32 results for each of n, 16 biases.
    unsafe { run(report, "check_sinkhorn", n, &args)? };
    let got = floats(&out)?;
    let expected: Vec<f32> = mix
        .chunks_exact(16)
        .flat_map(|mix| {
            let comb = comb(mix, scale, &base, n_iters, eps);
            // Both halves of the warp have it.
            [comb.clone(), comb].concat()
        })
        .collect();
    report.close(format!("Sinkhorn of {n}"), &got, &expected, 4e-6);
    Ok(())
}

fn merge(report: &mut Report<'_>, n: usize, n_splits: usize) -> Result<(), OpError> {
    let ops = report.ops.clone();
    let n = n.min(64);
    let mut acc = report.random.values(n * n_splits * HEAD_DIM, 4.0);
    let sinks = report.random.values(n, 6.0);
    let maxima = report.random.values(n * n_splits, 20.0);
    let mut stats: Vec<f32> =
        maxima.iter().flat_map(|&max| [max, 1.0 + report.random.below(64) as f32 / 3.0]).collect();
    for row in 0..n {
        for split in 1..n_splits {
            // Without keys: nothing was written there.
            if (row + split) % 3 == 0 {
                let part = row * n_splits + split;
                stats[2 * part] = f32::NEG_INFINITY;
                stats[2 * part + 1] = 0.0;
                acc[part * HEAD_DIM..(part + 1) * HEAD_DIM].fill(f32::NAN);
            }
        }
    }
    let [a, b, c] = [&acc, &stats, &sinks].map(|values| ops.uploaded(&f32_bytes(values)));
    let (a, b, c) = (a?, b?, c?);
    let (merged, alone) = (ops.buffer(4 * n * HEAD_DIM)?, ops.buffer(4 * n * HEAD_DIM)?);
    let mut args: Vec<Arg> = [&a, &b, &c, &merged, &alone].map(Arg::from).into();
    args.extend([n_splits, n].map(|n| Arg::U32(n as u32)));
    // SAFETY: n heads of n_splits parts of 512 channels, two statistics for each, a sink for each head.
    unsafe { run(report, "check_merge", n, &args)? };
    let mut expected = Vec::with_capacity(n * HEAD_DIM);
    for (row, &sink) in sinks.iter().enumerate() {
        let parts = row * n_splits..(row + 1) * n_splits;
        let max_of = |part: usize| f64::from(stats[2 * part]);
        let sink = f64::from(sink);
        let max = parts.clone().map(max_of).fold(sink, f64::max);
        let weight = |part: usize| (max_of(part) - max).exp();
        let denominator: f64 = (sink - max).exp()
            + parts.clone().map(|p| f64::from(stats[2 * p + 1]) * weight(p)).sum::<f64>();
        let with_keys: Vec<usize> = parts.filter(|&part| max_of(part).is_finite()).collect();
        for channel in 0..HEAD_DIM {
            let value = |&part: &usize| f64::from(acc[part * HEAD_DIM + channel]) * weight(part);
            let sum: f64 = with_keys.iter().map(value).sum();
            expected.push(round_bf16((sum / denominator) as f32));
        }
    }
    let got = floats(&merged)?;
    report.close(format!("{n_splits} parts of attention added up"), &got, &expected, BF16_STEP);
    if n_splits == 1 {
        report.mostly_equal("the only part of attention", &floats(&alone)?, &got, 0.0);
    }
    Ok(())
}

fn selection(report: &mut Report<'_>, n: usize) -> Result<(), OpError> {
    let ops = report.ops.clone();
    // Any bits that are a number, equal ones among them.
    let mut values: Vec<f32> = (0..1000)
        .map(|_| f32::from_bits(report.random.bits() << 8 ^ report.random.bits()))
        .filter(|x| !x.is_nan())
        .collect();
    let special =
        [0.0, -0.0, f32::MIN_POSITIVE, -1e-45, f32::INFINITY, f32::NEG_INFINITY, 1.0, 1.0];
    values.extend(special);
    let mut bins = vec![0_u32; n * BINS];
    let mut wanted = Vec::with_capacity(n);
    for counts in bins.chunks_exact_mut(BINS) {
        let n_full = 1 + report.random.below(BINS);
        for _ in 0..n_full {
            counts[report.random.below(BINS)] += report.random.below(900) as u32;
        }
        counts[report.random.below(BINS)] += 1;
        let total: u32 = counts.iter().sum();
        wanted.push(1 + report.random.below(total as usize) as u32);
    }
    // The first, and all.
    wanted[0] = 1;
    wanted[1] = bins[BINS..2 * BINS].iter().sum();
    let a = ops.uploaded(&f32_bytes(&values))?;
    let (b, c) = (ops.uploaded(&u32_bytes(&bins))?, ops.uploaded(&u32_bytes(&wanted))?);
    let (order, found) = (ops.buffer(4 * values.len())?, ops.buffer(8 * n)?);
    let args = [
        (&a).into(),
        (&order).into(),
        Arg::U32(values.len() as u32),
        (&b).into(),
        (&c).into(),
        (&found).into(),
        Arg::U32(n as u32),
    ];
    // SAFETY: an integer for each value; 256 counts, a number and two results for each of n.
    unsafe { run(report, "check_top_k", n, &args)? };
    let integers = u32_values(&order.read(0, order.len())?);
    let mut by_value: Vec<usize> = (0..values.len()).collect();
    by_value.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let expected: Vec<bool> = by_value
        .windows(2)
        .map(|pair| values[pair[0]].to_bits() == values[pair[1]].to_bits())
        .collect();
    let is_ascending = |pair: &[usize]| integers[pair[0]] <= integers[pair[1]];
    let ascending: Vec<bool> = by_value.windows(2).map(is_ascending).collect();
    report.mostly_equal(
        "integers in the order of floats",
        &ascending,
        &vec![true; ascending.len()],
        0.0,
    );
    let same: Vec<bool> =
        by_value.windows(2).map(|pair| integers[pair[0]] == integers[pair[1]]).collect();
    report.mostly_equal("equal integers for equal floats alone", &same, &expected, 0.0);
    let expected: Vec<u32> = bins
        .chunks_exact(BINS)
        .zip(&wanted)
        .flat_map(|(counts, &wanted)| {
            let mut before = 0;
            for bin in (0..BINS).rev() {
                if before + counts[bin] >= wanted {
                    return [bin as u32, wanted - before];
                }
                before += counts[bin];
            }
            [u32::MAX; 2]
        })
        .collect();
    let got = u32_values(&found.read(0, found.len())?);
    report.mostly_equal("bin of the last one chosen", &got, &expected, 0.0);
    Ok(())
}
