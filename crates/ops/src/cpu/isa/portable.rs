//! The kernels' operations in plain Rust: the definition the vector sets must equal bit for bit.

use fathom_core::num::{Ue8m0, e2m1_to_f32};

use super::{BLOCK, Block, GROUP, Isa, LANES, Lanes, RAW_BYTES, Task};

/// Any CPU. `f32::mul_add` rounds once, in software where the CPU cannot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Isa for Portable {
    type Vector = [f32; LANES];
    type Raw = [u32; LANES];
    const PARTS: usize = 1;
    const TILE_TOKENS: usize = 1;
    const FEW: usize = 1;
    const HEADS: usize = 1;

    #[inline(always)]
    fn zero(self) -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, lanes: &Lanes, _part: usize) -> [f32; LANES] {
        lanes.0
    }

    #[inline(always)]
    fn store(self, value: [f32; LANES], lanes: &mut Lanes, _part: usize) {
        lanes.0 = value;
    }

    #[inline(always)]
    fn read(self, values: &[f32; LANES], _part: usize) -> [f32; LANES] {
        *values
    }

    #[inline(always)]
    fn write(self, value: [f32; LANES], values: &mut [f32; LANES], _part: usize) {
        *values = value;
    }

    #[inline(always)]
    fn mul(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn dwords(self, codes: &[u8; RAW_BYTES], _part: usize) -> [u32; LANES] {
        let dwords = codes.as_chunks::<4>().0;
        std::array::from_fn(|i| u32::from_le_bytes(dwords[i]))
    }

    #[inline(always)]
    fn words(self, codes: &[u8; RAW_BYTES], _part: usize) -> [u32; LANES] {
        let words = codes.as_chunks::<2>().0;
        std::array::from_fn(|i| {
            let [low, high] = [words[i], words[i + LANES]].map(u16::from_le_bytes);
            u32::from(low) | u32::from(high) << 16
        })
    }

    #[inline(always)]
    fn e2m1(self, raw: [u32; LANES], step: usize) -> [f32; LANES] {
        raw.map(|dword| e2m1_to_f32((dword >> (4 * step)) as u8))
    }

    #[inline(always)]
    fn e4m3_by_256(self, raw: [u32; LANES], step: usize) -> [f32; LANES] {
        // Sign to bit 31, exponent and mantissa 20 bits lower than f32 has them: off by 2^120,
        // and 2^8 of it are wanted.
        let scale = f32::from_bits((112 + 127) << 23);
        raw.map(|word| {
            let spread = ((word << (24 - 8 * step)) as i32 >> 4) as u32;
            f32::from_bits(spread & 0x87f0_0000) * scale
        })
    }

    #[inline(always)]
    fn bf16(self, raw: [u32; LANES], step: usize) -> [f32; LANES] {
        raw.map(|dword| f32::from_bits((dword << (16 * (1 - step))) & 0xffff_0000))
    }

    #[inline(always)]
    fn f32(self, raw: [u32; LANES]) -> [f32; LANES] {
        raw.map(f32::from_bits)
    }

    #[inline(always)]
    fn group_scales(self, bytes: [u8; 4], _part: usize) -> [f32; LANES] {
        let scales = bytes.map(|byte| Ue8m0::from_byte(byte).map_or(f32::NAN, Ue8m0::to_f32));
        std::array::from_fn(|i| scales[i / 4])
    }

    #[inline(always)]
    fn sum(self, acc: &[Lanes; GROUP]) -> [f32; GROUP] {
        acc.map(|lanes| {
            let mut sum = lanes.0;
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    sum[i] += sum[i + half];
                }
            }
            sum[0]
        })
    }

    #[inline(always)]
    fn deinterleave<const STRIDE: usize>(self, values: &[f32; BLOCK], out: &mut Block) {
        deinterleave::<STRIDE>(values, out);
    }

    #[inline(always)]
    fn prefetch(self, _byte: *const u8) {}

    fn enter<T: Task>(self, task: T) {
        task.run(self);
    }
}

/// [`Isa::deinterleave`], one value at a time.
#[inline(always)]
pub(crate) fn deinterleave<const STRIDE: usize>(values: &[f32; BLOCK], out: &mut Block) {
    let runs = values.chunks_exact(LANES * STRIDE).zip(out.0.chunks_exact_mut(STRIDE));
    for (values, steps) in runs {
        for (step, lanes) in steps.iter_mut().enumerate() {
            for (lane, out) in lanes.0.iter_mut().enumerate() {
                *out = values[lane * STRIDE + step];
            }
        }
    }
}
