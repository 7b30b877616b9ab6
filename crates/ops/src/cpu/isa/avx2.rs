//! The kernels' operations with AVX2 and FMA: the 16 lanes are two registers, done one after the
//! other, so that a tile has all 16 registers for one half of its lanes.

use std::arch::x86_64::*;

use super::{BLOCK, Block, GROUP, Isa, LANES, Lanes, RAW_BYTES, Task};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

impl Isa for Avx2 {
    type Vector = __m256;
    type Raw = __m256i;
    const PARTS: usize = 2;
    const TILE_TOKENS: usize = 3;
    const FEW: usize = 2;
    const HEADS: usize = 2;

    #[inline(always)]
    fn zero(self) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, lanes: &Lanes, part: usize) -> __m256 {
        let half: &[f32; 8] = &lanes.0.as_chunks().0[part];
        // SAFETY: the CPU has AVX2, and `half` is 32 bytes; `Lanes` are aligned to 64.
        unsafe { _mm256_load_ps(half.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m256, lanes: &mut Lanes, part: usize) {
        let half: &mut [f32; 8] = &mut lanes.0.as_chunks_mut().0[part];
        // SAFETY: the CPU has AVX2, and `half` is 32 bytes; `Lanes` are aligned to 64.
        unsafe { _mm256_store_ps(half.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn read(self, values: &[f32; LANES], part: usize) -> __m256 {
        let half: &[f32; 8] = &values.as_chunks().0[part];
        // SAFETY: the CPU has AVX2, and `half` has the 32 bytes of an unaligned load.
        unsafe { _mm256_loadu_ps(half.as_ptr()) }
    }

    #[inline(always)]
    fn write(self, value: __m256, values: &mut [f32; LANES], part: usize) {
        let half: &mut [f32; 8] = &mut values.as_chunks_mut().0[part];
        // SAFETY: the CPU has AVX2, and `half` has the 32 bytes of an unaligned store.
        unsafe { _mm256_storeu_ps(half.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the CPU has FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn dwords(self, codes: &[u8; RAW_BYTES], part: usize) -> __m256i {
        let half: &[u8; 32] = &codes.as_chunks().0[part];
        // SAFETY: the CPU has AVX2, and the array has the 32 bytes of an unaligned load.
        unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
    }

    #[inline(always)]
    fn words(self, codes: &[u8; RAW_BYTES], part: usize) -> __m256i {
        let quarters: &[[u8; 16]] = codes.as_chunks().0;
        let (low, high) = (&quarters[part], &quarters[part + 2]);
        // SAFETY: the CPU has AVX2, and the arrays have the 16 bytes of an unaligned load.
        unsafe { _mm256_loadu2_m128i(high.as_ptr().cast(), low.as_ptr().cast()) }
    }

    #[inline(always)]
    fn e2m1(self, raw: __m256i, step: usize) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe {
            // The upper two bytes of each value as f32, from tables; the lower two are zero.
            let upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41, -0x41, -0x41, -0x40,
                -0x40, -0x40, -0x40,
            ));
            let lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40, 0, 0, -0x80, -0x40, 0, 0x40, -0x80,
                -0x40,
            ));
            // In each half, byte 0 of the four dwords, then byte 1, 2, 3.
            let by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
            ));
            let bytes = _mm256_shuffle_epi8(raw, by_byte);
            let shifted =
                if step.is_multiple_of(2) { bytes } else { _mm256_srli_epi16::<4>(bytes) };
            let codes = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
            let (upper, lower) =
                (_mm256_shuffle_epi8(upper, codes), _mm256_shuffle_epi8(lower, codes));
            let words = if step < 4 {
                _mm256_unpacklo_epi8(lower, upper)
            } else {
                _mm256_unpackhi_epi8(lower, upper)
            };
            let zero = _mm256_setzero_si256();
            _mm256_castsi256_ps(if step % 4 < 2 {
                _mm256_unpacklo_epi16(zero, words)
            } else {
                _mm256_unpackhi_epi16(zero, words)
            })
        }
    }

    #[inline(always)]
    fn e4m3_by_256(self, raw: __m256i, step: usize) -> __m256 {
        // SAFETY: the CPU has AVX2 and F16C.
        unsafe {
            // As f16: see the AVX-512 version.
            let top = if step.is_multiple_of(2) { _mm256_slli_epi16::<8>(raw) } else { raw };
            let spread = _mm256_srai_epi16::<1>(top);
            let halves = _mm256_and_si256(spread, _mm256_set1_epi16(0xbf80_u16 as i16));
            _mm256_cvtph_ps(if step / 2 == 0 {
                _mm256_castsi256_si128(halves)
            } else {
                _mm256_extracti128_si256::<1>(halves)
            })
        }
    }

    #[inline(always)]
    fn bf16(self, raw: __m256i, step: usize) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe {
            _mm256_castsi256_ps(if step == 0 {
                _mm256_slli_epi32::<16>(raw)
            } else {
                _mm256_and_si256(raw, _mm256_set1_epi32(0xffff_0000_u32 as i32))
            })
        }
    }

    #[inline(always)]
    fn f32(self, raw: __m256i) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe { _mm256_castsi256_ps(raw) }
    }

    #[inline(always)]
    fn group_scales(self, bytes: [u8; 4], part: usize) -> __m256 {
        // SAFETY: the CPU has AVX2.
        unsafe {
            let two = i32::from_le_bytes(bytes) >> (16 * part);
            let shift = _mm256_setr_epi32(0, 0, 0, 0, 8, 8, 8, 8);
            let bytes = _mm256_srlv_epi32(_mm256_set1_epi32(two), shift);
            let byte = _mm256_and_si256(bytes, _mm256_set1_epi32(255));
            // Byte 0 is the subnormal 2^-127.
            let exponent = _mm256_slli_epi32::<23>(byte);
            _mm256_castsi256_ps(_mm256_max_epi32(exponent, _mm256_set1_epi32(1 << 22)))
        }
    }

    #[inline(always)]
    fn sum(self, acc: &[Lanes; GROUP]) -> [f32; GROUP] {
        // SAFETY: the CPU has AVX2; `out` has the 16 bytes of an unaligned store.
        unsafe {
            // Lanes i and i + 8, then i and i + 4.
            let mut quarters = [_mm_setzero_ps(); 4];
            for (quarter, lanes) in quarters.iter_mut().zip(acc) {
                let half = _mm256_add_ps(self.load(lanes, 0), self.load(lanes, 1));
                let (low, high) = (_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
                *quarter = _mm_add_ps(low, high);
            }
            let [a, b, c, d] = quarters;
            // i and i + 2, of two accumulators side by side.
            let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
            let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
            // i and i + 1.
            let sums = _mm_add_ps(_mm_shuffle_ps::<0x88>(ab, cd), _mm_shuffle_ps::<0xdd>(ab, cd));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }

    #[inline(always)]
    fn deinterleave<const STRIDE: usize>(self, values: &[f32; BLOCK], out: &mut Block) {
        super::portable::deinterleave::<STRIDE>(values, out);
    }

    #[inline(always)]
    fn prefetch(self, byte: *const u8) {
        // SAFETY: a prefetch reads nothing and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(byte.cast()) }
    }

    #[inline(always)]
    fn enter<T: Task>(self, task: T) {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<T: Task>(isa: Avx2, task: T) {
            task.run(isa);
        }
        // SAFETY: the CPU has AVX2, FMA and F16C.
        unsafe { compiled(self, task) }
    }
}
