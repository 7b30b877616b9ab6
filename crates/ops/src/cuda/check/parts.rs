//! Products, and what the cases of operators without a cache share.

use fathom_core::Numerics;

use super::{BF16_STEP, Report, Size, exact, pick, plain};
use crate::cpu::CpuOps;
use crate::traits::HeadOps;
use crate::{Activations, Backend, Batch, OpError, Solo};

/// Rows that the CPU computes of a large step.
pub(super) const CPU_ROWS: usize = 8;
/// Tokens that there are.
pub(super) const VOCAB: usize = 37;

/// The CPU's form of the operators that a report's device has.
pub(super) fn cpu(report: &Report<'_>) -> CpuOps {
    CpuOps::new(Numerics::Bf16).with_activations(report.ops.activations())
}

/// A step of one sequence with these tokens, for operators that look at tokens only.
pub(super) fn step<B: Backend>(ops: &B, tokens: &[u32]) -> Result<B::Step, OpError> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(256) as u32).collect();
    ops.prepare_step(&Batch::single(0, 0, tokens, &blocks))
}

/// `x W^T` through the head operator (bf16 and f32 results of every format).
pub(super) fn linear(report: &mut Report<'_>) -> Result<(), OpError> {
    // (rows of W, columns, rows of the input): ragged ones, then those of Flash and Pro.
    let real: &[usize] = &[1, 8, 61, 1024];
    let shapes: &[(usize, usize, &[usize])] = match report.size {
        // These have forms of their own for many tokens.
        Size::Small if matches!(report.ops.memory().device().arch(), "sm_90a" | "sm_100f") => {
            &[(70, 128, &[1, 9, 33]), (129, 384, &[1, 9, 33])]
        }
        // The last one is enough work for products of 64 tokens a block.
        Size::Small => &[(70, 128, &[1, 9, 33]), (129, 384, &[1, 9, 33]), (3400, 128, &[65])],
        // On sm_100f the last two take one and two segments of K, the others four.
        Size::Real => &[
            (1536, 4096, real),
            (4096, 8192, real),
            (2624, 4096, real),
            (7168, 16384, real),
            (16_160, 4096, real),
            (8192, 4096, real),
        ],
    };
    let (ops, cpu) = (report.ops, cpu(report));
    for &(n, k, row_counts) in shapes {
        let fp8 = report.random.fp8(n, k)?;
        let bf16 = report.random.bf16(n, k)?;
        let (head, cpu_head) = (ops.load_linear(&bf16)?, cpu.load_linear(&bf16)?);
        let (w, cpu_w) = (ops.load_linear(&fp8)?, cpu.load_linear(&fp8)?);
        for &rows in row_counts {
            let x = report.random.values(rows * k, 1.0);
            let checked = report.random.some_of(rows, CPU_ROWS);
            let device_x = ops.upload(rows, k, &x)?;
            let cpu_x = cpu.upload(checked.len(), k, &pick(&x, k, &checked))?;
            let places = exact::places(&mut report.random, report.size, (rows, n));
            // Products of many rows on sm_90a (and perhaps sm_100f) cut what they add instead of
            // rounding it.
            let limit = if rows > 8 { 5e-5 } else { 2e-5 };
            let rounded = exact::ROUNDED;
            let (logits, cpu_logits) =
                (ops.logits(&head, &device_x, &Solo)?, cpu.logits(&cpu_head, &cpu_x, &Solo)?);
            let (layer, cpu_layer) =
                (ops.quantised_linear(&w, &device_x)?, cpu.quantised_linear(&cpu_w, &cpu_x)?);
            // As the grouped output projection takes its input.
            let (by_bf16, cpu_by_bf16) =
                (ops.logits(&w, &device_x, &Solo)?, cpu.logits(&cpu_w, &cpu_x, &Solo)?);
            for (name, source, is_layer, (got, expected), [limit, exact_limit]) in [
                ("bf16", &bf16, false, (logits, cpu_logits), [limit, limit]),
                ("FP8", &fp8, true, (layer, cpu_layer), [BF16_STEP, rounded]),
                ("FP8 by bf16", &fp8, false, (by_bf16, cpu_by_bf16), [limit, limit]),
            ] {
                let what = format!("{name} [{rows}, {k}] x [{n}, {k}]");
                let got = ops.download(&got)?;
                report.close(what.as_str(), &pick(&got, n, &checked), &expected.data, limit);
                let activations = if is_layer { ops.activations() } else { Activations::Bf16 };
                let exact = exact::products(source, &x, activations, &places);
                let in_f64 = format!("{what}, {} outputs in f64", places.len());
                report.close(in_f64, &exact::at(&got, n, &places), &exact, exact_limit);
                if !plain::is_affordable(report.size, rows) {
                    continue;
                }
                let all = plain::product(report, source, &x, is_layer)?;
                let of_plain = format!("{what}, the plain kernel");
                report.close(of_plain, &pick(&all, n, &checked), &expected.data, limit);
                // The plain sum is not rounded, and more exact than either.
                let all_outputs = format!("{what}, all outputs as the plain kernel's");
                report.close(all_outputs, &got, &all, exact_limit);
            }
        }
    }
    Ok(())
}
