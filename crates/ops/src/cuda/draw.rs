//! Weights and cache rows that the device draws, for benches over models that nobody has to carry.
//!
//! A memory that draws ([`Memory::drawing`]) hands out weights with random values of the right format
//! and size instead of a checkpoint's: FP4 codes uniform, FP8 and bf16 values from a clipped normal,
//! scales such that products keep the size of their inputs.
//!
//! Not here: small vectors and tables of expert ids, which the host draws (`fathom-weights`).

use std::sync::atomic::{AtomicU32, Ordering};

use super::cache::{DeviceCache, StateStore};
use super::device::{Arg, Launch};
use super::memory::{Buffer, Memory};
use super::ops::CudaOps;
use crate::traits::Drawing;
use crate::{OpError, WeightSource};

/// Threads of a block of `draw`, and blocks that keep any card's memory busy.
const THREADS: u32 = 256;
const MAX_BLOCKS: usize = 132 * 8;
/// Root mean square of the sixteen E2M1 values.
const FP4_RMS: f32 = 2.926;

/// What to draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Values {
    Fp4Codes,
    Fp8Codes,
    Bf16 {
        deviation: f32,
    },
    F32 {
        deviation: f32,
    },
    /// E8M0 bytes, this or one less.
    Exponents {
        largest: u8,
    },
    /// f32 powers of two with this E8M0 byte or one less.
    PowersOfTwo {
        largest: u8,
    },
    KvRows,
    KeyRows,
}

/// How many tensors were drawn from which seed.
#[derive(Debug)]
pub(crate) struct Draws {
    pub(crate) drawing: Drawing,
    next: AtomicU32,
}

impl Draws {
    pub(crate) fn new(drawing: Drawing) -> Self {
        Self { drawing, next: AtomicU32::new(0) }
    }
}

/// The E8M0 byte that brings values of size `rms` to about 1/sqrt(`n_inputs`).
pub(crate) fn exponent(rms: f32, n_inputs: usize) -> u8 {
    let wanted = 1.0 / (rms * (n_inputs.max(1) as f32).sqrt());
    (127.0 + wanted.log2().round()).clamp(2.0, 253.0) as u8
}

impl Values {
    /// Scales of an FP4 matrix with `n_inputs` columns.
    pub(crate) fn fp4_exponents(n_inputs: usize) -> Self {
        Self::Exponents { largest: exponent(FP4_RMS, n_inputs) }
    }

    /// Scales of an FP8 matrix, as f32.
    pub(crate) fn fp8_scales(n_inputs: usize) -> Self {
        Self::PowersOfTwo { largest: exponent(1.0, n_inputs) }
    }

    /// Deviation of the values of an unquantised matrix: rows of an embedding are inputs themselves.
    pub(crate) fn deviation(source: &WeightSource) -> f32 {
        if source.name == "embed.weight" { 1.0 } else { (source.n_cols() as f32).sqrt().recip() }
    }

    /// Kind, spread and largest exponent as the kernel takes them.
    fn args(self) -> (u32, f32, u32) {
        match self {
            Self::Fp4Codes => (0, 0.0, 0),
            Self::Fp8Codes => (1, 1.0, 0),
            Self::Bf16 { deviation } => (2, deviation, 0),
            Self::F32 { deviation } => (3, deviation, 0),
            Self::Exponents { largest } => (4, 0.0, largest.into()),
            Self::PowersOfTwo { largest } => (5, 0.0, largest.into()),
            Self::KvRows => (6, 0.0, 0),
            Self::KeyRows => (7, 0.0, 0),
        }
    }
}

impl Memory {
    /// Fills bytes of `buffer` with drawn values; a memory that does not draw leaves them.
    ///
    /// # Errors
    /// [`OpError::OutOfRange`] if the bytes are not in the buffer or no whole words;
    /// [`OpError::Device`].
    pub(crate) fn draw(
        &self,
        buffer: &Buffer,
        start: usize,
        len: usize,
        values: Values,
    ) -> Result<(), OpError> {
        const OP: &str = "draw";
        let Some(draws) = self.draws() else { return Ok(()) };
        let part = buffer.part(start, len)?;
        let misaligned = (start % 4) | (len % 4);
        if misaligned != 0 {
            let what = "byte beyond whole words";
            return Err(OpError::OutOfRange { op: OP, what, got: misaligned, limit: 0 });
        }
        let n_words = u32::try_from(len / 4).map_err(|_| OpError::OutOfRange {
            op: OP,
            what: "word",
            got: len / 4,
            limit: u32::MAX as usize,
        })?;
        if n_words == 0 {
            return Ok(());
        }
        // Tensors have seeds of their own; which of them is which depends on the order of loading.
        let number = draws.next.fetch_add(1, Ordering::Relaxed);
        let seed = draws.drawing.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number);
        let (kind, spread, largest) = values.args();
        let blocks = (n_words as usize).div_ceil(THREADS as usize).min(MAX_BLOCKS) as u32;
        let launch = Launch {
            kernel: OP,
            grid: [blocks, 1, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            args: &[
                Arg::from(&part),
                n_words.into(),
                kind.into(),
                seed.into(),
                spread.into(),
                largest.into(),
            ],
        };
        // SAFETY: `part` has n_words words.
        unsafe { self.device().launch(launch) }.map_err(OpError::device)
    }
}

impl CudaOps {
    /// Fills every store of `cache` with rows that could have been written there.
    ///
    /// # Errors
    /// [`OpError::Device`]; nothing happens in a memory that does not draw.
    pub fn draw_cache(&self, cache: &DeviceCache) -> Result<(), OpError> {
        let draw =
            |buffer: &Buffer, values| self.memory.draw(buffer, 0, buffer.len() / 4 * 4, values);
        let state = |state: &StateStore| {
            draw(&state.u, Values::F32 { deviation: 1.0 })?;
            draw(&state.s, Values::F32 { deviation: 1.0 })
        };
        for layer in &cache.layers {
            draw(&layer.window, Values::KvRows)?;
            draw(&layer.entries, Values::KvRows)?;
            draw(&layer.keys, Values::KeyRows)?;
            state(&layer.state)?;
            state(&layer.key_state)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Place;
    use super::super::rehearsal::Rehearsal;
    use super::*;

    #[test]
    fn scales_bring_rows_to_unit_size() {
        // 2^-6 times 1 over 4,096 inputs: 1/64.
        assert_eq!(exponent(1.0, 4096), 121);
        assert_eq!(Values::fp4_exponents(4096), Values::Exponents { largest: 119 });
    }

    #[test]
    fn only_whole_words_of_the_buffer_are_drawn() {
        let memory = Rehearsal::memory("sm_80").drawing(Drawing { seed: 1, zipf: false });
        let buffer = memory.buffer(Place::Weights, 16).unwrap();
        assert!(memory.draw(&buffer, 4, 12, Values::Fp8Codes).is_ok());
        assert!(memory.draw(&buffer, 4, 16, Values::Fp8Codes).is_err());
        assert!(memory.draw(&buffer, 2, 4, Values::Fp8Codes).is_err());
    }
}
