//! The routed experts of a layer in device memory: FP4 codes and exponents, expert after expert.

use std::sync::Arc;

use super::device::{Buffer, Device};
use super::hopper::ExpertTiles;
use super::linear::cut;
use crate::weight::WeightData;
use crate::{OpError, WeightSource};

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
    /// As in the checkpoint: codes and exponents of `w1`, `w3`, `w2`.
    Rows([(Buffer, Buffer); 3]),
    /// In tiles of `moe_pack_fp4`.
    Tiles(ExpertTiles),
}

/// The largest E8M0 byte the expansion to bf16 can fold: a factor of 2.
const MAX_EXPONENT: u8 = 128;

impl DeviceExperts {
    /// Uploads `[w1, w3, w2]` of each expert.
    ///
    /// # Errors
    /// [`OpError::Weight`] unless all are FP4 of one shape with scales up to 2.
    pub(crate) fn load(
        device: &Arc<dyn Device>,
        experts: &[[WeightSource; 3]],
        first_id: usize,
    ) -> Result<Self, OpError> {
        let shape = |w: &WeightSource| (w.n_rows(), w.n_cols());
        let (channels, width) = experts.first().map_or((0, 0), |[w1, ..]| shape(w1));
        let upload = |index: usize, expected: (usize, usize)| {
            let (mut codes, mut exponents) = (Vec::new(), Vec::new());
            for expert in experts {
                let source = &expert[index];
                let refused =
                    |reason: String| OpError::Weight { name: source.name.clone(), reason };
                if shape(source) != expected || !expected.1.is_multiple_of(32) {
                    let got = shape(source);
                    return Err(refused(format!(
                        "is {got:?}, expected {expected:?}, columns in 32s"
                    )));
                }
                let WeightData::Fp4 { codes: data, scales } = &source.data else {
                    return Err(refused("the CUDA backend takes FP4 experts only".to_owned()));
                };
                codes.extend(cut(source, data, |cols| cols / 2));
                let bytes = cut(source, scales, |cols| cols / 32);
                if let Some(byte) = bytes.iter().find(|&&byte| byte > MAX_EXPONENT) {
                    return Err(refused(format!("scale byte {byte} is above {MAX_EXPONENT}")));
                }
                exponents.extend(bytes);
            }
            Ok((Buffer::from_bytes(device, &codes)?, Buffer::from_bytes(device, &exponents)?))
        };
        let up = (channels, width);
        let matrices = [upload(0, up)?, upload(1, up)?, upload(2, (width, channels))?];
        let layout = ExpertLayout::Rows(matrices);
        Ok(Self { first_id, n_experts: experts.len(), channels, width, layout })
    }
}
