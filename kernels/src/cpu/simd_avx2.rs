//! [`Simd`] on AVX2 with FMA and F16C: two registers per vector, `vpmaddubsw` for the integer dot products.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each method's short body is covered by the contract of the trait"
)]

use std::arch::x86_64::*;

use super::simd::Simd;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[inline(always)]
unsafe fn broadcast4(x: *const i8) -> __m256i {
    _mm256_set1_epi32(x.cast::<i32>().read_unaligned())
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    // 16-bit sums of pairs: 8 * 2 * 15 * 127 = 30,480 fits, so the widening is done once per block.
    type D = [__m256i; 2];

    const TILE_ROWS: usize = 4;
    const BF16_DOT: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [_mm256_set1_ps(value); 2]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        _mm256_storeu_ps(to, value[0]);
        _mm256_storeu_ps(to.add(8), value[1]);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        [
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
        ]
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
        [
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
        ]
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        let wide = |from: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())));
        [wide(from), wide(from.add(8))]
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, a: Self::F) {
        _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a[0]));
        _mm_storeu_si128(
            to.add(8).cast(),
            _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a[1]),
        );
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, a: Self::F) {
        let round = |a| {
            let bits = _mm256_castps_si256(a);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half))
        };
        let narrow = _mm256_packus_epi32(round(a[0]), round(a[1]));
        _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(narrow));
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2] {
        let mask = _mm256_set1_epi32(-65_536);
        let low = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
        let high = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
        [[low(pairs[0]), low(pairs[1])], [high(pairs[0]), high(pairs[1])]]
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [
            _mm256_fmadd_ps(a[0], b[0], c[0]),
            _mm256_fmadd_ps(a[1], b[1], c[1]),
        ]
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])]
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: Self::F, n: Self::F) -> Self::F {
        let bias = _mm256_set1_epi32(127);
        let power = |n| {
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                _mm256_cvtps_epi32(n),
                bias,
            )))
        };
        [_mm256_mul_ps(a[0], power(n[0])), _mm256_mul_ps(a[1], power(n[1]))]
    }
    #[inline(always)]
    unsafe fn lanes_or(a: Self::F, from: usize, to: usize, other: Self::F) -> Self::F {
        let lanes = [
            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
            _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15),
        ];
        let (from, to) = (_mm256_set1_epi32(from as i32 - 1), _mm256_set1_epi32(to as i32));
        std::array::from_fn(|i| {
            let kept = _mm256_and_si256(
                _mm256_cmpgt_epi32(lanes[i], from),
                _mm256_cmpgt_epi32(to, lanes[i]),
            );
            _mm256_blendv_ps(other[i], a[i], _mm256_castsi256_ps(kept))
        })
    }
    #[inline(always)]
    unsafe fn scale_pow2_above(a: Self::F, n: Self::F, x: Self::F, limit: f32) -> Self::F {
        let limit = _mm256_set1_ps(limit);
        let scaled = Self::scale_pow2(a, n);
        std::array::from_fn(|i| _mm256_and_ps(scaled[i], _mm256_cmp_ps::<_CMP_GT_OQ>(x[i], limit)))
    }
    #[inline(always)]
    unsafe fn any_above(a: Self::F, limit: f32) -> bool {
        let limit = _mm256_set1_ps(limit);
        let above = |a| _mm256_cmp_ps::<_CMP_GT_OQ>(a, limit);
        _mm256_movemask_ps(_mm256_or_ps(above(a[0]), above(a[1]))) != 0
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        let eight = _mm256_add_ps(a[0], a[1]);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        let eight = _mm256_max_ps(a[0], a[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
    #[inline(always)]
    unsafe fn at_least(a: Self::F, b: Self::F) -> u16 {
        let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a[0], b[0]));
        let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a[1], b[1]));
        (low | (high << 8)) as u16
    }
    #[inline(always)]
    unsafe fn keep_from(key: Self::F, floor: Self::F, value: Self::F) -> Self::F {
        [
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(key[0], floor[0]), value[0]),
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(key[1], floor[1]), value[1]),
        ]
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, a: Self::F) {
        let wide = _mm256_packs_epi32(_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1]));
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(wide);
        let narrow = _mm_packs_epi16(
            _mm256_castsi256_si128(ordered),
            _mm256_extracti128_si256::<1>(ordered),
        );
        _mm_storeu_si128(to.cast(), narrow);
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        [
            _mm256_loadu_si256(from.cast()),
            _mm256_loadu_si256(from.add(32).cast()),
        ]
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: Self::B) -> Self::B {
        let mask = _mm256_set1_epi8(15);
        [_mm256_and_si256(a[0], mask), _mm256_and_si256(a[1], mask)]
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: Self::B) -> Self::B {
        Self::low_nibbles([_mm256_srli_epi16::<4>(a[0]), _mm256_srli_epi16::<4>(a[1])])
    }
    #[inline(always)]
    unsafe fn byte(a: Self::B, j: i32) -> Self::F {
        let (shift, mask) = (_mm256_set1_epi32(8 * j), _mm256_set1_epi32(255));
        let pick = |v| _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(v, shift), mask));
        [pick(a[0]), pick(a[1])]
    }
    #[inline(always)]
    unsafe fn nibble_zero() -> Self::D {
        [_mm256_setzero_si256(); 2]
    }
    #[inline(always)]
    unsafe fn nibble_dot(sum: Self::D, w: Self::B, x: *const i8) -> Self::D {
        let x = broadcast4(x);
        [
            _mm256_add_epi16(sum[0], _mm256_maddubs_epi16(w[0], x)),
            _mm256_add_epi16(sum[1], _mm256_maddubs_epi16(w[1], x)),
        ]
    }
    #[inline(always)]
    unsafe fn nibble_sum(sum: Self::D) -> Self::I {
        let ones = _mm256_set1_epi16(1);
        [_mm256_madd_epi16(sum[0], ones), _mm256_madd_epi16(sum[1], ones)]
    }
    #[inline(always)]
    unsafe fn byte_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I {
        // |w| * (x with w's sign): 2 * 128 * 127 fits 16 bits, (w + 128) * x would not.
        let (x, ones, flip) = (broadcast4(x), _mm256_set1_epi16(1), _mm256_set1_epi8(-128));
        let dot = |sum, w| {
            let signed = _mm256_xor_si256(w, flip);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones))
        };
        [dot(sum[0], w[0]), dot(sum[1], w[1])]
    }
    #[inline(always)]
    unsafe fn byte_start(_x_sum: i32) -> Self::I {
        [_mm256_setzero_si256(); 2]
    }
    #[inline(always)]
    unsafe fn join_bits(low: Self::B, bits: Self::B, left: i32, mask: u8) -> Self::B {
        let mask = _mm256_set1_epi8(mask.cast_signed());
        let join = |low, bits| {
            let moved = if left < 0 {
                _mm256_srlv_epi32(bits, _mm256_set1_epi32(-left))
            } else {
                _mm256_sllv_epi32(bits, _mm256_set1_epi32(left))
            };
            _mm256_or_si256(low, _mm256_and_si256(moved, mask))
        };
        [join(low[0], bits[0]), join(low[1], bits[1])]
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> Self::I {
        [_mm256_set1_epi32(value); 2]
    }
    #[inline(always)]
    unsafe fn small_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I {
        let (x, ones) = (broadcast4(x), _mm256_set1_epi16(1));
        let dot = |sum, w| _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
        [dot(sum[0], w[0]), dot(sum[1], w[1])]
    }
}
