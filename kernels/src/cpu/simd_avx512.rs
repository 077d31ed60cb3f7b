//! [`Simd`] on AVX-512 with VNNI: one register per vector, `vpdpbusd` for the integer dot products.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each method's short body is covered by the contract of the trait"
)]

use std::arch::x86_64::*;

use super::simd::Simd;

/// AVX-512 F, BW, VL, DQ and VNNI; with `BF16` also BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>;

#[inline(always)]
unsafe fn broadcast4(x: *const i8) -> __m512i {
    _mm512_set1_epi32(x.cast::<i32>().read_unaligned())
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type D = __m512i;

    const TILE_ROWS: usize = 8;
    const BF16_DOT: bool = BF16;
    const STREAMS: bool = true;

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        _mm512_set1_ps(value)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        _mm512_storeu_ps(to, value);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, a: Self::F) {
        _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, a: Self::F) {
        if BF16 {
            to.cast::<__m256bh>().write_unaligned(_mm512_cvtneps_pbh(a));
        } else {
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2] {
        let high = _mm512_and_si512(pairs, _mm512_set1_epi32(-65_536));
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
            _mm512_castsi512_ps(high),
        ]
    }
    #[inline(always)]
    unsafe fn dot_bf16(sum: Self::F, pairs: Self::B, x: *const u16) -> Self::F {
        if BF16 {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            // SAFETY: the same 64 bytes under another name.
            let (pairs, x) = (
                std::mem::transmute::<__m512i, __m512bh>(pairs),
                std::mem::transmute::<__m512i, __m512bh>(x),
            );
            return _mm512_dpbf16_ps(sum, pairs, x);
        }
        let [a, b] = Self::widen_bf16(pairs);
        let wide = |bits: u16| _mm512_set1_ps(f32::from_bits(u32::from(bits) << 16));
        Self::fma(b, wide(*x.add(1)), Self::fma(a, wide(*x), sum))
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(a)
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: Self::F, n: Self::F) -> Self::F {
        _mm512_scalef_ps(a, n)
    }
    #[inline(always)]
    unsafe fn lanes_or(a: Self::F, from: usize, to: usize, other: Self::F) -> Self::F {
        let kept = (1_u32 << to) - (1_u32 << from);
        _mm512_mask_blend_ps(kept as u16, other, a)
    }
    #[inline(always)]
    unsafe fn scale_pow2_above(a: Self::F, n: Self::F, x: Self::F, limit: f32) -> Self::F {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(limit));
        _mm512_maskz_scalef_ps(above, a, n)
    }
    #[inline(always)]
    unsafe fn any_above(a: Self::F, limit: f32) -> bool {
        _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, _mm512_set1_ps(limit)) != 0
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        _mm512_reduce_add_ps(a)
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        _mm512_reduce_max_ps(a)
    }
    #[inline(always)]
    unsafe fn at_least(a: Self::F, b: Self::F) -> u16 {
        _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b)
    }
    #[inline(always)]
    unsafe fn keep_from(key: Self::F, floor: Self::F, value: Self::F) -> Self::F {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(key, floor), value)
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, a: Self::F) {
        _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        _mm512_loadu_si512(from.cast())
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: Self::B) -> Self::B {
        _mm512_and_si512(a, _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: Self::B) -> Self::B {
        _mm512_and_si512(_mm512_srli_epi16::<4>(a), _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn byte(a: Self::B, j: i32) -> Self::F {
        let shifted = _mm512_srlv_epi32(a, _mm512_set1_epi32(8 * j));
        _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)))
    }
    #[inline(always)]
    unsafe fn nibble_zero() -> Self::D {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn nibble_dot(sum: Self::D, w: Self::B, x: *const i8) -> Self::D {
        _mm512_dpbusd_epi32(sum, w, broadcast4(x))
    }
    #[inline(always)]
    unsafe fn nibble_sum(sum: Self::D) -> Self::I {
        sum
    }
    #[inline(always)]
    unsafe fn byte_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I {
        _mm512_dpbusd_epi32(sum, w, broadcast4(x))
    }
    #[inline(always)]
    unsafe fn byte_start(x_sum: i32) -> Self::I {
        _mm512_set1_epi32(-128 * x_sum)
    }
    #[inline(always)]
    unsafe fn join_bits(low: Self::B, bits: Self::B, left: i32, mask: u8) -> Self::B {
        let moved = if left < 0 {
            _mm512_srlv_epi32(bits, _mm512_set1_epi32(-left))
        } else {
            _mm512_sllv_epi32(bits, _mm512_set1_epi32(left))
        };
        let kept = _mm512_and_si512(moved, _mm512_set1_epi8(mask.cast_signed()));
        _mm512_or_si512(low, kept)
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> Self::I {
        _mm512_set1_epi32(value)
    }
    #[inline(always)]
    unsafe fn small_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I {
        _mm512_dpbusd_epi32(sum, w, broadcast4(x))
    }
}
