//! What a GPU does per second at best: measured in this process, beside what the card is known for.
//!
//! The ceiling of products is what the instruction does with nothing in its way. Beside it our own linear
//! layers multiply large matrices ([`large_products`]); they are no ceiling, or a kernel would be
//! measured against itself, and what it loses would not show.
//!
//! Not here: what an operator or a step must move and multiply (`kernels`, `slice`).

use anyhow::{Context, Result};
use fathom_ops::cuda::CudaOps;
use fathom_ops::cuda::check::bench;
use serde_json::{Value, json};

use crate::gpu::Gpu;

/// Bytes of each of the two buffers whose copy is the ceiling: 4.3 GB are read and written.
const COPY_BYTES: usize = 2 << 30;
/// Rows, columns and tokens of the large products.
const LARGE: usize = 8192;
/// Blocks and rounds of the bare products: some milliseconds on any card.
const PRODUCT_BLOCKS: u32 = 132 * 8;
const PRODUCT_ROUNDS: u32 = 4096;

/// What a machine does per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rates {
    /// Bytes, read and written.
    pub(super) bytes: f64,
    /// Multiplications and additions of FP8 values.
    pub(super) fp8: f64,
    /// The same of bf16 values.
    pub(super) bf16: f64,
}

/// One H200, as the design's tables take it.
pub(super) const H200: Rates = Rates { bytes: 4.3e12, fp8: 1580e12, bf16: 790e12 };

/// What cards can be expected to reach, by a part of their names: 0.896 of the data sheet's bandwidth,
/// 0.80 of its dense rates; where there is no FP8, that of bf16.
const KNOWN: [(&str, Rates); 5] = [
    ("A100", Rates { bytes: 1.83e12, fp8: 250e12, bf16: 250e12 }),
    ("H200", H200),
    ("H100", Rates { bytes: 3.00e12, fp8: 1580e12, bf16: 790e12 }),
    ("B200", Rates { bytes: 7.17e12, fp8: 3600e12, bf16: 1800e12 }),
    ("B300", Rates { bytes: 7.17e12, fp8: 3600e12, bf16: 1800e12 }),
];

/// What is known of the card `name`.
fn known(name: &str) -> Option<Rates> {
    KNOWN.iter().find(|(part, _)| name.contains(part)).map(|&(_, rates)| rates)
}

/// How long ceilings are measured; the emulator gets the least in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Enough to see that it works.
    Small,
    /// A quarter of all products.
    Quick,
    /// Until it is sure.
    Full,
}

/// What the device does per second at best.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ceilings {
    /// Measured here where that says something, else of the design's table.
    pub(super) rates: Rates,
    /// Of the design's table, for a card that it has.
    pub(super) reference: Option<Rates>,
    products: (f64, bool),
    are_products_measured: bool,
}

impl Ceilings {
    pub(super) fn line(&self) -> String {
        let Rates { bytes, fp8, bf16 } = self.rates;
        let source = if self.are_products_measured { "measured" } else { "as the card is known" };
        format!(
            "ceilings: copy {:.2} TB/s measured, products {:.0} FP8 and {:.0} bf16 TFLOP/s {source}",
            bytes / 1e12,
            fp8 / 1e12,
            bf16 / 1e12,
        )
    }

    pub(super) fn json(&self) -> Value {
        let rates = |rates: Rates| {
            let Rates { bytes, fp8, bf16 } = rates;
            json!({ "bytes_per_s": bytes, "fp8_flops": fp8, "bf16_flops": bf16 })
        };
        let (rate, is_fp8) = self.products;
        json!({
            "used": rates(self.rates),
            "reference": self.reference.map(rates),
            "bare_products_flops": rate,
            "bare_products": if is_fp8 { "e4m3 wgmma" } else { "bf16 mma.sync" },
            "are_products_measured": self.are_products_measured,
        })
    }
}

/// Copies memory and multiplies, as fast as the device can.
///
/// # Errors
/// What the device fails with.
pub(super) fn ceilings(gpu: &Gpu, extent: Extent) -> Result<Ceilings> {
    let ops = CudaOps::new(std::sync::Arc::clone(&gpu.device), gpu.activations);
    let (bytes, blocks, rounds) = match extent {
        _ if gpu.is_emulator => (1 << 16, 1, 1),
        Extent::Small => (1 << 16, 1, 1),
        Extent::Quick => (COPY_BYTES, PRODUCT_BLOCKS, PRODUCT_ROUNDS / 4),
        Extent::Full => (COPY_BYTES, PRODUCT_BLOCKS, PRODUCT_ROUNDS),
    };
    let copied = ops.copy_rate(bytes).context("measuring how fast memory is copied")?;
    let products = ops.product_rate(blocks, rounds).context("measuring products")?;
    let reference = known(&gpu.device.name());
    // Elsewhere than on Hopper and Ampere there are faster instructions than those measured.
    let are_products_measured =
        matches!(gpu.device.arch(), "sm_90a" | "sm_80") || reference.is_none();
    let (rate, is_fp8) = products;
    let rates = match reference {
        Some(reference) if !are_products_measured => Rates { bytes: copied, ..reference },
        // FP8 has twice the rate of bf16; without FP8 both are bf16's.
        _ => Rates { bytes: copied, fp8: rate, bf16: if is_fp8 { rate / 2.0 } else { rate } },
    };
    Ok(Ceilings { rates, reference, products, are_products_measured })
}

/// What our linear layers reach on random values where nothing but products counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct LargeProducts {
    size: usize,
    /// Operations per second.
    fp8: f64,
    bf16: f64,
}

impl LargeProducts {
    pub(super) fn line(&self, rates: &Rates) -> String {
        let Self { size, fp8, bf16 } = *self;
        format!(
            "our {size}^3: {:.0} FP8 and {:.0} bf16 TFLOP/s, {:.2} and {:.2} of the ceiling",
            fp8 / 1e12,
            bf16 / 1e12,
            fp8 / rates.fp8,
            bf16 / rates.bf16,
        )
    }

    pub(super) fn json(&self) -> Value {
        json!({ "size": self.size, "fp8_flops": self.fp8, "bf16_flops": self.bf16 })
    }
}

/// Multiplies large random matrices with the linear layers of a model.
///
/// # Errors
/// What the device fails with.
pub(super) fn large_products(gpu: &Gpu, is_small: bool) -> Result<LargeProducts> {
    let size = if is_small { 128 } else { LARGE };
    let (mut fp8, mut bf16) = (0.0, 0.0);
    let shapes = bench::large_products(size);
    bench::run(&gpu.device, gpu.activations, &shapes, is_small, &mut |measured| {
        let rate = if measured.is_fp8 { &mut fp8 } else { &mut bf16 };
        *rate = measured.flops / measured.timed.median;
    })
    .context("measuring large products")?;
    Ok(LargeProducts { size, fp8, bf16 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_a_part_of_their_names() {
        assert_eq!(known("NVIDIA H200"), Some(H200));
        assert_eq!(known("NVIDIA A100-SXM4-80GB").map(|rates| rates.fp8), Some(250e12));
        assert_eq!(known("Some other card"), None);
    }
}
