//! [`Simd`] on AVX-512 with VNNI: one register per vector, `vpdpbusd` for the integer dot products.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each method's short body is covered by the contract of the trait"
)]

use std::arch::x86_64::*;

use super::simd::Simd;

/// AVX-512 F, BW, VL, DQ and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

#[inline(always)]
unsafe fn broadcast4(x: *const i8) -> __m512i {
    _mm512_set1_epi32(x.cast::<i32>().read_unaligned())
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type D = __m512i;

    const TILE_ROWS: usize = 8;

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
    unsafe fn sum(a: Self::F) -> f32 {
        _mm512_reduce_add_ps(a)
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        _mm512_reduce_max_ps(a)
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
}
