//! The routed experts of a layer in device memory, expert after expert: FP4 codes with E8M0 exponents
//! (the releases), or FP8 codes with f32 scales per 128 x 128 (-Base checkpoints).

use fathom_core::parallel::QUANT_BLOCK;

use super::blackwell::ExpertMaps;
use super::draw::Values;
use super::hopper::ExpertTiles;
use super::linear::{block_scales, upload_part};
use super::memory::{Buffer, Memory, Place};
use super::tensor::f32_bytes;
use crate::weight::WeightData;
use crate::{OpError, WeightSource};

/// How the values of the experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertFormat {
    Fp4,
    Fp8,
}

/// The routed experts of one layer on this rank.
#[derive(Debug, Clone)]
pub struct DeviceExperts {
    pub(crate) first_id: usize,
    pub(crate) n_experts: usize,
    /// Intermediate channels and hidden size.
    pub(crate) channels: usize,
    pub(crate) width: usize,
    pub(crate) layout: ExpertLayout,
}

/// How the matrices of the experts lie in memory.
#[derive(Debug, Clone)]
pub(crate) enum ExpertLayout {
    /// As in the checkpoint: codes and exponents (FP4) or scales (FP8) of `w1`, `w3`, `w2`.
    Rows(ExpertFormat, [(Buffer, Buffer); 3]),
    /// In tiles of `moe_pack_fp4`.
    Tiles(ExpertTiles),
    /// Gate beside up, as tensor maps see them.
    Maps(Box<ExpertMaps>),
}

/// The largest E8M0 byte the expansion to bf16 can fold: a factor of 2.
const MAX_EXPONENT: u8 = 128;

impl DeviceExperts {
    /// Uploads `[w1, w3, w2]` of each expert.
    ///
    /// # Errors
    /// [`OpError::Weight`] unless all have one format and one shape, FP4 with scales up to 2.
    pub(crate) fn load(
        memory: &Memory,
        experts: &[[WeightSource; 3]],
        first_id: usize,
    ) -> Result<Self, OpError> {
        let shape = |w: &WeightSource| (w.n_rows(), w.n_cols());
        let (channels, width) = experts.first().map_or((0, 0), |[w1, ..]| shape(w1));
        let is_fp8 = |w: &WeightSource| matches!(w.data, WeightData::Fp8 { .. });
        let format = if experts.first().is_some_and(|[w1, ..]| is_fp8(w1)) {
            ExpertFormat::Fp8
        } else {
            ExpertFormat::Fp4
        };
        let upload = |index: usize, expected: (usize, usize)| {
            let all = experts.iter().map(|expert| &expert[index]);
            for source in all.clone() {
                check_shape(source, expected)?;
            }
            match format {
                ExpertFormat::Fp4 => upload_fp4(memory, all, expected),
                ExpertFormat::Fp8 => upload_fp8(memory, all, expected),
            }
        };
        let up = (channels, width);
        let matrices = [upload(0, up)?, upload(1, up)?, upload(2, (width, channels))?];
        let layout = ExpertLayout::Rows(format, matrices);
        Ok(Self { first_id, n_experts: experts.len(), channels, width, layout })
    }
}

fn refused(source: &WeightSource, reason: impl Into<String>) -> OpError {
    OpError::Weight { name: source.name.clone(), reason: reason.into() }
}

fn check_shape(source: &WeightSource, expected: (usize, usize)) -> Result<(), OpError> {
    let got = (source.n_rows(), source.n_cols());
    if got == expected && expected.1.is_multiple_of(32) {
        return Ok(());
    }
    Err(refused(source, format!("is {got:?}, expected {expected:?}, columns in 32s")))
}

fn upload_fp4<'a>(
    memory: &Memory,
    sources: impl ExactSizeIterator<Item = &'a WeightSource>,
    (rows, cols): (usize, usize),
) -> Result<(Buffer, Buffer), OpError> {
    let (code_bytes, exponent_bytes) = (rows * cols / 2, rows * cols / 32);
    let codes = memory.buffer(Place::Weights, sources.len() * code_bytes)?;
    let exponents = memory.buffer(Place::Weights, sources.len() * exponent_bytes)?;
    for (index, source) in sources.enumerate() {
        let WeightData::Fp4 { codes: data, scales } = &source.data else {
            return Err(refused(source, "is not FP4, as the first expert is"));
        };
        if !memory.keeps_contents() {
            memory.draw(&codes, index * code_bytes, code_bytes, Values::Fp4Codes)?;
            let values = Values::fp4_exponents(cols);
            memory.draw(&exponents, index * exponent_bytes, exponent_bytes, values)?;
            continue;
        }
        upload_part(&codes, index * code_bytes, source, data, |cols| cols / 2)?;
        let stride = source.stored_cols / 32;
        for row in source.rows.clone() {
            let row = &scales[row * stride..(row + 1) * stride];
            let wanted = &row[source.cols.start / 32..source.cols.end / 32];
            if let Some(byte) = wanted.iter().find(|&&byte| byte > MAX_EXPONENT) {
                let reason = format!("scale byte {byte} is above {MAX_EXPONENT}");
                return Err(refused(source, reason));
            }
        }
        upload_part(&exponents, index * exponent_bytes, source, scales, |cols| cols / 32)?;
    }
    Ok((codes, exponents))
}

fn upload_fp8<'a>(
    memory: &Memory,
    sources: impl ExactSizeIterator<Item = &'a WeightSource>,
    (rows, cols): (usize, usize),
) -> Result<(Buffer, Buffer), OpError> {
    let n_scales = rows.div_ceil(QUANT_BLOCK) * cols.div_ceil(QUANT_BLOCK);
    let codes = memory.buffer(Place::Weights, sources.len() * rows * cols)?;
    let scales = memory.buffer(Place::Weights, sources.len() * 4 * n_scales)?;
    for (index, source) in sources.enumerate() {
        let WeightData::Fp8 { codes: data, scales: stored } = &source.data else {
            return Err(refused(source, "is not FP8, as the first expert is"));
        };
        if memory.keeps_contents() {
            upload_part(&codes, index * rows * cols, source, data, |cols| cols)?;
            let bytes = f32_bytes(&block_scales(source, stored)?);
            scales.write(index * 4 * n_scales, &bytes)?;
        } else {
            memory.draw(&codes, index * rows * cols, rows * cols, Values::Fp8Codes)?;
            let values = Values::fp8_scales(cols);
            memory.draw(&scales, index * 4 * n_scales, 4 * n_scales, values)?;
        }
    }
    Ok((codes, scales))
}
