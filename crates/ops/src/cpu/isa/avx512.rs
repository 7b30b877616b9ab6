//! The kernels' operations with AVX-512: the 16 lanes are one register.

use std::arch::x86_64::*;

use super::{BLOCK, Block, GROUP, Isa, LANES, Lanes, RAW_BYTES, STEPS, Task};

/// Proof that the CPU has AVX-512F and BW, AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        has.then_some(Self(()))
    }

    /// The first half of a sum of lanes, for four accumulators at once: four lanes of the first, third,
    /// second and fourth each. Each round adds the halves of runs of lanes, those of two accumulators
    /// at once: one shuffle lines up what a blend left crossed.
    #[inline(always)]
    fn fours(self, acc: &[Lanes; GROUP]) -> __m512 {
        let (a, b) = (self.load(&acc[0], 0), self.load(&acc[1], 0));
        let (c, d) = (self.load(&acc[2], 0), self.load(&acc[3], 0));
        // SAFETY: the CPU has AVX-512F.
        unsafe {
            // Lanes i and i + 8.
            let ab = _mm512_add_ps(
                _mm512_mask_blend_ps(0xff00, a, b),
                _mm512_shuffle_f32x4::<0x4e>(a, b),
            );
            let cd = _mm512_add_ps(
                _mm512_mask_blend_ps(0xff00, c, d),
                _mm512_shuffle_f32x4::<0x4e>(c, d),
            );
            // i and i + 4.
            let order =
                _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
            _mm512_add_ps(
                _mm512_mask_blend_ps(0xf0f0, ab, cd),
                _mm512_permutex2var_ps(ab, order, cd),
            )
        }
    }
}

impl Isa for Avx512 {
    type Vector = __m512;
    type Raw = __m512i;
    const PARTS: usize = 1;
    const TILE_TOKENS: usize = 3;
    const FEW: usize = 7;
    const HEADS: usize = 4;

    #[inline(always)]
    fn zero(self) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, lanes: &Lanes, _part: usize) -> __m512 {
        // SAFETY: the CPU has AVX-512F, and `Lanes` are 64 bytes aligned to 64.
        unsafe { _mm512_load_ps(lanes.0.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m512, lanes: &mut Lanes, _part: usize) {
        // SAFETY: the CPU has AVX-512F, and `Lanes` are 64 bytes aligned to 64.
        unsafe { _mm512_store_ps(lanes.0.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn read(self, values: &[f32; LANES], _part: usize) -> __m512 {
        // SAFETY: the CPU has AVX-512F, and `values` has the 64 bytes of an unaligned load.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn write(self, value: __m512, values: &mut [f32; LANES], _part: usize) {
        // SAFETY: the CPU has AVX-512F, and `values` has the 64 bytes of an unaligned store.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn dwords(self, codes: &[u8; RAW_BYTES], _part: usize) -> __m512i {
        // SAFETY: the CPU has AVX-512F, and the array has the 64 bytes of an unaligned load.
        unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn words(self, codes: &[u8; RAW_BYTES], part: usize) -> __m512i {
        self.dwords(codes, part)
    }

    #[inline(always)]
    fn e2m1(self, raw: __m512i, step: usize) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe {
            let values = _mm512_setr_ps(
                0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0,
                -6.0,
            );
            // The permutation looks at the low four bits of each index only.
            let index = _mm512_srlv_epi32(raw, _mm512_set1_epi32(4 * step as i32));
            _mm512_permutexvar_ps(index, values)
        }
    }

    #[inline(always)]
    fn e4m3_by_256(self, raw: __m512i, step: usize) -> __m512 {
        // SAFETY: the CPU has AVX-512F and AVX-512BW.
        unsafe {
            // As f16, whose exponent is biased by 8 more: subnormal codes are subnormal there too,
            // and cost nothing to convert (as f32 they would, on many CPUs).
            let top = if step.is_multiple_of(2) { _mm512_slli_epi16::<8>(raw) } else { raw };
            let spread = _mm512_srai_epi16::<1>(top);
            let halves = _mm512_and_si512(spread, _mm512_set1_epi16(0xbf80_u16 as i16));
            _mm512_cvtph_ps(if step / 2 == 0 {
                _mm512_castsi512_si256(halves)
            } else {
                _mm512_extracti64x4_epi64::<1>(halves)
            })
        }
    }

    #[inline(always)]
    fn bf16(self, raw: __m512i, step: usize) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe {
            _mm512_castsi512_ps(if step == 0 {
                _mm512_slli_epi32::<16>(raw)
            } else {
                _mm512_and_si512(raw, _mm512_set1_epi32(0xffff_0000_u32 as i32))
            })
        }
    }

    #[inline(always)]
    fn f32(self, raw: __m512i) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe { _mm512_castsi512_ps(raw) }
    }

    #[inline(always)]
    fn group_scales(self, bytes: [u8; 4], _part: usize) -> __m512 {
        // SAFETY: the CPU has AVX-512F.
        unsafe {
            // The byte of each lane goes to the exponent field; byte 0 is the subnormal 2^-127.
            let to_exponent =
                _mm512_setr_epi32(23, 23, 23, 23, 15, 15, 15, 15, 7, 7, 7, 7, 31, 31, 31, 31);
            let all = _mm512_set1_epi32(i32::from_le_bytes(bytes));
            let rotated = _mm512_rolv_epi32(all, to_exponent);
            let exponent = _mm512_and_si512(rotated, _mm512_set1_epi32(0x7f80_0000));
            _mm512_castsi512_ps(_mm512_max_epi32(exponent, _mm512_set1_epi32(1 << 22)))
        }
    }

    #[inline(always)]
    fn sum(self, acc: &[Lanes; GROUP]) -> [f32; GROUP] {
        let fours = self.fours(acc);
        // SAFETY: the CPU has AVX-512F; `out` has the 16 bytes of an unaligned store.
        unsafe {
            // i and i + 2, i and i + 1.
            let pairs = _mm512_add_ps(fours, _mm512_permute_ps::<0x4e>(fours));
            let sums = _mm512_add_ps(pairs, _mm512_permute_ps::<0xb1>(pairs));
            let mut out = [0.0; 4];
            let first = _mm512_setr_epi32(0, 8, 4, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let packed = _mm512_permutexvar_ps(first, sums);
            _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(packed));
            out
        }
    }

    #[inline(always)]
    fn sum_all(self, acc: &[Lanes; LANES], out: &mut [f32]) {
        let (groups, _) = acc.as_chunks::<GROUP>();
        let (a, b) = (self.fours(&groups[0]), self.fours(&groups[1]));
        let (c, d) = (self.fours(&groups[2]), self.fours(&groups[3]));
        // SAFETY: the CPU has AVX-512F; the stores have the 64 bytes that they write.
        unsafe {
            // i and i + 2.
            let ab =
                _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps::<0x4e>(a, b));
            let cd =
                _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, c, d), _mm512_shuffle_ps::<0x4e>(c, d));
            // i and i + 1.
            let sums =
                _mm512_add_ps(_mm512_shuffle_ps::<0x88>(ab, cd), _mm512_shuffle_ps::<0xdd>(ab, cd));
            // Accumulators 4 i, 4 i + 2, 4 i + 1 and 4 i + 3 are in lane i of each quarter.
            let order = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
            let sums = _mm512_permutexvar_ps(order, sums);
            if let Some(out) = out.first_chunk_mut::<LANES>() {
                _mm512_storeu_ps(out.as_mut_ptr(), sums);
            } else {
                let mut lanes = Lanes::ZERO;
                _mm512_store_ps(lanes.0.as_mut_ptr(), sums);
                out.copy_from_slice(&lanes.0[..out.len()]);
            }
        }
    }

    #[inline(always)]
    fn deinterleave<const STRIDE: usize>(self, values: &[f32; BLOCK], out: &mut Block) {
        // SAFETY: the CPU has AVX-512F, each chunk of 16 values is the 64 bytes of an unaligned
        // load, and the lanes of `out` are 64 bytes aligned to 64.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
            let mut steps = [_mm512_setzero_ps(); STEPS];
            for (step, values) in steps.iter_mut().zip(values.as_chunks::<LANES>().0) {
                *step = _mm512_loadu_ps(values.as_ptr());
            }
            // Each round splits neighbours `apart` steps from each other into even and odd places.
            let mut apart = 1;
            while apart < STRIDE {
                for first in (0..STEPS).step_by(2 * apart) {
                    for i in first..first + apart {
                        let (a, b) = (steps[i], steps[i + apart]);
                        steps[i] = _mm512_permutex2var_ps(a, even, b);
                        steps[i + apart] = _mm512_permutex2var_ps(a, odd, b);
                    }
                }
                apart *= 2;
            }
            for (lanes, step) in out.0.iter_mut().zip(steps) {
                _mm512_store_ps(lanes.0.as_mut_ptr(), step);
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, byte: *const u8) {
        // SAFETY: a prefetch reads nothing and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(byte.cast()) }
    }

    #[inline(always)]
    fn enter<T: Task>(self, task: T) {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
        fn compiled<T: Task>(isa: Avx512, task: T) {
            task.run(isa);
        }
        // SAFETY: the CPU has AVX-512F and BW, AVX2 and FMA.
        unsafe { compiled(self, task) }
    }
}
