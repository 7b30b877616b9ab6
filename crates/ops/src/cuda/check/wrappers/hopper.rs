//! Barriers in shared memory, bulk copies, clusters, elected threads, registers and codes (sm_90a, sm_100f).

use fathom_core::num::{e4m3_from_f32, e4m3_to_f32};

use super::super::Report;
use super::{Check, words};
use crate::OpError;

/// Several phases of a ring of two slots, filled by a bulk copy and by stores.
pub(super) fn pipeline(report: &mut Report<'_>) -> Result<(), OpError> {
    const N: usize = 252 + 6 * 32;
    let input = words(report, N);
    let check = Check { kernel: "check_pipeline", blocks: 1, threads: 128, shared_bytes: 2048 };
    // SAFETY: 252 words and 32 for each of six phases, as input and as output.
    let got = unsafe { check.run(report, &input, N)? };
    report.mostly_equal("bulk_load, mbarrier_*", &got[..252], &input[..252], 0.0);
    report.mostly_equal("stores before mbarrier_arrive", &got[252..], &input[252..], 0.0);
    Ok(())
}

/// Every block of a cluster stores to every other, and to itself.
pub(super) fn clusters(report: &mut Report<'_>) -> Result<(), OpError> {
    const BLOCKS: usize = 8;
    for (n, kernel) in [(2, "check_cluster_2"), (4, "check_cluster_4")] {
        let input = words(report, BLOCKS * n * 2);
        let check = Check { kernel, blocks: BLOCKS, threads: 64, shared_bytes: 32 };
        // SAFETY: for each block and each of its cluster two words of input and three of output.
        let got = unsafe { check.run(report, &input, BLOCKS * n * 3)? };
        let expected: Vec<u32> = (0..BLOCKS * n)
            .flat_map(|i| {
                let (block, from) = (i / n, i % n);
                let rank = block % n;
                let sent = ((block - rank + from) * n + rank) * 2;
                [input[sent], input[sent + 1], rank as u32]
            })
            .collect();
        let what = format!("cluster_store, cluster_rank, clusters of {n}");
        report.mostly_equal(what, &got, &expected, 0.0);
    }
    Ok(())
}

/// One lane of a warp, twice the same; budgets of registers.
pub(super) fn threads(report: &mut Report<'_>) -> Result<(), OpError> {
    let check = Check { kernel: "check_elect", blocks: 1, threads: 128, shared_bytes: 0 };
    // SAFETY: one word of input, one of output for each thread.
    let got = unsafe { check.run(report, &[40], 128)? };
    let chosen: Vec<Vec<u32>> = got
        .chunks(32)
        .map(|warp| warp.iter().map(|x| x.wrapping_sub(40)).filter(|&x| x != 0).collect())
        .collect();
    report.mostly_equal("elect", &chosen, &vec![vec![3]; 4], 0.0);
    let input = words(report, 384);
    let expected: Vec<u32> =
        input.iter().zip(0..).map(|(x, t)| x.wrapping_mul(3).wrapping_add(t / 128)).collect();
    for kernel in ["check_registers", "check_registers_3"] {
        let check = Check { kernel, blocks: 1, threads: 384, shared_bytes: 0 };
        // SAFETY: one word of input and of output for each thread.
        let got = unsafe { check.run(report, &input, 384)? };
        report.mostly_equal(kernel, &got, &expected, 0.0);
    }
    Ok(())
}

/// Pairs of E4M3 codes: of every code its value, the middle to the next one and what lies beside them; special and
/// random values.
pub(super) fn codes(report: &mut Report<'_>) -> Result<(), OpError> {
    let mut values =
        vec![0.0, f32::INFINITY, f32::NAN, f32::MAX, 448.0, 463.9, 464.0, 480.0, 1e-40];
    for code in 0..0x7e {
        let (value, next) = (e4m3_to_f32(code), e4m3_to_f32(code + 1));
        let middle = f32::midpoint(value, next);
        values.extend([value, middle, middle.next_up(), middle.next_down()]);
    }
    values.extend(values.clone().iter().map(|x| -x));
    let rest = values.len().next_multiple_of(128) + 128 - values.len();
    values.extend(words(report, rest).into_iter().map(f32::from_bits));
    // Each value comes in both places.
    let n = values.len();
    let pairs: Vec<[f32; 2]> = (0..n).map(|i| [values[i], values[(i + 17) % n]]).collect();
    let input: Vec<u32> = pairs.as_flattened().iter().map(|x| x.to_bits()).collect();
    // SAFETY: two words of input and one of output for each thread.
    let got = unsafe { Check::over("check_pack", n).run(report, &input, n)? };
    let same_nan = |code: u32| if code & 0x7f == 0x7f { 0x7f } else { code };
    let form = |pair: u32| same_nan(pair >> 8) << 8 | same_nan(pair & 255) | pair >> 16 << 16;
    let got: Vec<u32> = got.into_iter().map(form).collect();
    let code = |x: f32| u32::from(e4m3_from_f32(x));
    let expected: Vec<u32> =
        pairs.iter().map(|&[low, high]| form(code(high) << 8 | code(low))).collect();
    report.mostly_equal("pack_e4m3x2", &got, &expected, 0.0);
    Ok(())
}
