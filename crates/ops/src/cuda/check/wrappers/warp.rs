//! What the threads of a warp or of a block do together, on every architecture.

use super::super::{Report, Size};
use super::{Check, bf16_bits, floats, integer, words};
use crate::OpError;

const LANES: usize = 32;

/// Shuffles and votes.
pub(super) fn exchanges(report: &mut Report<'_>) -> Result<(), OpError> {
    const N: usize = 512;
    let values = words(report, N);
    let lanes: Vec<usize> = (0..N).map(|_| report.random.below(LANES)).collect();
    let input: Vec<u32> =
        values.iter().zip(&lanes).flat_map(|(&value, &lane)| [value, lane as u32]).collect();
    // SAFETY: two words of input and 16 of output for each thread.
    let out = unsafe { Check::over("check_warp", N).run(report, &input, 16 * N)? };
    let expected: Vec<[u32; 16]> = (0..N)
        .map(|i| {
            let (lane, warp) = (i % LANES, &values[i / LANES * LANES..][..LANES]);
            let up = |delta| if lane >= delta { warp[lane - delta] } else { warp[lane] };
            let mut to = [0; 16];
            to[..2].fill(warp[lanes[i]]);
            (0..5).for_each(|j| to[2 + j] = warp[lane ^ (1 << j)]);
            to[7] = warp[lane ^ 31];
            (0..5).for_each(|j| to[8 + j] = up(1 << j));
            to[13] = up(31);
            to[14] = warp[lane];
            to[15] = warp.iter().enumerate().map(|(l, value)| (value & 1) << l).sum();
            to
        })
        .collect();
    for (name, columns) in
        [("shfl", 0..2), ("shfl_xor", 2..8), ("shfl_up", 8..15), ("ballot", 15..16)]
    {
        let part = |words: &[u32]| words[columns.clone()].to_vec();
        let got: Vec<u32> = out.chunks_exact(16).flat_map(part).collect();
        let expected: Vec<u32> = expected.iter().flat_map(|words| part(words)).collect();
        report.mostly_equal(name, &got, &expected, 0.0);
    }
    Ok(())
}

/// Barriers of half a block and of a block, where every round another warp is late.
pub(super) fn barriers(report: &mut Report<'_>) -> Result<(), OpError> {
    let late = if report.size == Size::Small { 20 } else { 5000 };
    let mut x = words(report, 128);
    let input: Vec<u32> = std::iter::once(late).chain(x.iter().copied()).collect();
    let check = Check { kernel: "check_barriers", blocks: 1, threads: 128, shared_bytes: 1024 };
    // SAFETY: a word for the block, one of input and one of output for each thread.
    let got = unsafe { check.run(report, &input, 128)? };
    let delay = |x: &mut [u32], warp: usize| {
        for x in &mut x[warp * LANES..][..LANES] {
            *x = (0..late).fold(*x, |x, _| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        }
    };
    for round in 0..8 {
        delay(&mut x, round % 4);
        let y: Vec<u32> = (0..128).map(|t| x[t / 64 * 64 + 63 - t % 64]).collect();
        delay(&mut x, (round + 1) % 4);
        let both: Vec<u32> = (0..128).map(|t| x[t] ^ y[t]).collect();
        x.iter_mut().enumerate().for_each(|(t, x)| *x = x.wrapping_add(both[127 - t]));
    }
    report.mostly_equal("named_sync, block_sync", &got, &x, 0.0);
    Ok(())
}

/// Sums of all threads of several blocks, in memory and in shared memory.
pub(super) fn atomics(report: &mut Report<'_>) -> Result<(), OpError> {
    const BLOCKS: usize = 4;
    const N: usize = 128 * BLOCKS;
    let input = words(report, N);
    let check = Check { shared_bytes: 16, ..Check::over("check_atomics", N) };
    // SAFETY: a word of input for each thread; eight words of output, one per thread, four per block.
    let out = unsafe { check.run_from(report, &input, &[0; 8 + N + 4 * BLOCKS])? };
    let narrow = |x: &[u32]| x.iter().fold(0, |sum: u32, &x| sum.wrapping_add(x));
    let wide = |x: &[u32]| {
        let sum = x.iter().fold(0, |sum: u64, &x| sum.wrapping_add(u64::from(x) * 0x1_0000_0001));
        [sum as u32, (sum >> 32) as u32]
    };
    let [low, high] = wide(&input);
    let sums = [narrow(&input), 0, low, high, N as u32];
    report.mostly_equal("atomic_add, atomic_add64", &out[..5], &sums, 0.0);
    let mut counts = out[8..8 + N].to_vec();
    counts.sort_unstable();
    report.mostly_equal("what atomic_add returns", &counts, &Vec::from_iter(0..N as u32), 0.0);
    let expected: Vec<u32> =
        input.chunks(128).flat_map(|x| [[narrow(x), 0], wide(x)]).flatten().collect();
    report.mostly_equal("atomics of shared memory", &out[8 + N..], &expected, 0.0);
    Ok(())
}

/// What all blocks stored, as the block finds it that ends last; several times, for blocks in another order.
pub(super) fn last_block(report: &mut Report<'_>) -> Result<(), OpError> {
    let (blocks, rounds) = if report.size == Size::Small { (5, 2) } else { (500, 50) };
    let n = 128 * blocks;
    let check = Check { shared_bytes: 16, ..Check::over("check_last_block", n) };
    for _ in 0..rounds {
        let input = words(report, n);
        // SAFETY: a word of input for each thread; a count, 128 sums and a word for each thread of output.
        let out = unsafe { check.run_from(report, &input, &vec![0; 129 + n])? };
        let sum = |t| {
            input[t..].iter().step_by(128).fold(0_u32, |sum, x| sum.wrapping_add(x.wrapping_mul(3)))
        };
        let expected: Vec<u32> = std::iter::once(0).chain((0..128).map(sum)).collect();
        report.mostly_equal("atomic_add_ordered", &out[..129], &expected, 0.0);
    }
    Ok(())
}

/// Streamed loads; copies to shared memory in two groups, some of which bring zeros.
pub(super) fn copies(report: &mut Report<'_>) -> Result<(), OpError> {
    let mut input = words(report, 3 * 128 * 4);
    let valid: Vec<u32> = (0..256).map(|_| u32::from(report.random.below(4) > 0)).collect();
    let pieces: Vec<[u32; 4]> =
        input.chunks_exact(4).map(|piece| [piece[0], piece[1], piece[2], piece[3]]).collect();
    input.extend(&valid);
    let check = Check { kernel: "check_copies", blocks: 1, threads: 128, shared_bytes: 4096 };
    // SAFETY: three pieces of 16 bytes of input and of output for each thread, two words of input.
    let out = unsafe { check.run(report, &input, 3 * 128 * 4)? };
    let (loaded, copied) = out.split_at(512);
    report.mostly_equal("load_stream16", loaded, pieces[..128].as_flattened(), 0.0);
    let expected: Vec<u32> = (0..256)
        .map(|i| i / 128 * 128 + 127 - i % 128)
        .flat_map(|i| if valid[i] == 1 { pieces[128 + i] } else { [0; 4] })
        .collect();
    report.mostly_equal("cp_async16", copied, &expected, 0.0);
    Ok(())
}

/// Four 8 x 8 matrices, as they are and transposed: lane l gets of each the two values of row l / 4 from
/// column 2 (l % 4) on, or of the transposed one.
pub(super) fn matrix_loads(report: &mut Report<'_>) -> Result<(), OpError> {
    const BLOCKS: usize = 4;
    let input = words(report, BLOCKS * 128);
    let check = Check { kernel: "check_ldmatrix", blocks: BLOCKS, threads: 32, shared_bytes: 1536 };
    // SAFETY: four words of input and eight of output for each thread.
    let out = unsafe { check.run(report, &input, BLOCKS * 256)? };
    let value = |block: usize, matrix: usize, row: usize, column: usize| {
        let word = input[block * 128 + (matrix * 8 + row) * 4 + column / 2];
        word >> (column % 2 * 16) & 0xffff
    };
    for (name, first, transposed) in [("ldmatrix_x4", 0, false), ("ldmatrix_x4_trans", 4, true)] {
        let got: Vec<u32> =
            out.chunks_exact(8).flat_map(|words| words[first..first + 4].to_vec()).collect();
        let expected: Vec<u32> = (0..BLOCKS * LANES * 4)
            .map(|i| {
                let (block, lane, matrix) = (i / 128, i / 4 % LANES, i % 4);
                let (row, column) = (lane / 4, lane % 4 * 2);
                let half = |j| {
                    let (row, column) = (row, column + j);
                    if transposed {
                        value(block, matrix, column, row)
                    } else {
                        value(block, matrix, row, column)
                    }
                };
                half(0) | half(1) << 16
            })
            .collect();
        report.mostly_equal(name, &got, &expected, 0.0);
    }
    Ok(())
}

/// d[16][8] += a[16][16] b[16][8] in registers as the PTX manual lays them out.
pub(super) fn products(report: &mut Report<'_>) -> Result<(), OpError> {
    const BLOCKS: usize = 16;
    for is_exact in [true, false] {
        let mut values = |n: usize| -> Vec<f32> {
            if is_exact {
                (0..n).map(|_| integer(report, 64)).collect()
            } else {
                report.random.values(n, 1.0)
            }
        };
        let (mut input, mut expected) = (Vec::new(), Vec::new());
        for _ in 0..BLOCKS {
            let (a, b, d) = (values(256), values(128), values(128)); // [row][k], [column][k], [row][column]
            for lane in 0..LANES {
                let (g, t) = (lane / 4, lane % 4);
                let pair = |x: &[f32], row: usize, k: usize| {
                    bf16_bits(x[row * 16 + k]) | bf16_bits(x[row * 16 + k + 1]) << 16
                };
                input.extend((0..4).map(|i| pair(&a, g + i % 2 * 8, 2 * t + i / 2 * 8)));
                input.extend((0..2).map(|i| pair(&b, g, 2 * t + i * 8)));
                for i in 0..4 {
                    let (row, column) = (g + i / 2 * 8, 2 * t + i % 2);
                    let before = d[row * 8 + column];
                    input.push(before.to_bits());
                    let terms = (0..16).map(|k| f64::from(a[row * 16 + k] * b[column * 16 + k]));
                    expected.push((f64::from(before) + terms.sum::<f64>()) as f32);
                }
            }
        }
        let n = BLOCKS * LANES;
        let check = Check { kernel: "check_mma", blocks: BLOCKS, threads: 32, shared_bytes: 0 };
        // SAFETY: ten words of input and four of output for each thread.
        let got = floats(&unsafe { check.run(report, &input, 4 * n)? });
        if is_exact {
            report.mostly_equal("mma_bf16_16816, integers", &got, &expected, 0.0);
        } else {
            // Products are aligned to the largest of a sum and cut at 24 bits or so.
            report.close("mma_bf16_16816, real values", &got, &expected, 4e-6);
        }
    }
    Ok(())
}
