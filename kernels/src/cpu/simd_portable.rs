//! [`Simd`] in plain Rust, for any machine. Knows no intrinsics; the compiler vectorises what it can.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each method's short body is covered by the contract of the trait"
)]

use half::{bf16, f16};

use super::simd::Simd;

/// No instruction set at all.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn map2(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type F = [f32; 16];
    type I = [i32; 16];
    type B = [u8; 64];
    type D = [i32; 16];

    const TILE_ROWS: usize = 4;
    const BF16_DOT: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; 16]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        from.cast::<[f32; 16]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        to.cast::<[f32; 16]>().write_unaligned(value);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::F {
        let bits = from.cast::<[u16; 16]>().read_unaligned();
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        let bits = from.cast::<[u16; 16]>().read_unaligned();
        bits.map(|b| bf16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::F {
        from.cast::<[i8; 16]>().read_unaligned().map(f32::from)
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, a: Self::F) {
        let bits = a.map(|v| f16::from_f32(v).to_bits());
        to.cast::<[u16; 16]>().write_unaligned(bits);
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, a: Self::F) {
        let bits = a.map(|v| bf16::from_f32(v).to_bits());
        to.cast::<[u16; 16]>().write_unaligned(bits);
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2] {
        let bits = |i: usize| {
            u32::from_le_bytes([pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]])
        };
        [
            std::array::from_fn(|i| f32::from_bits(bits(i) << 16)),
            std::array::from_fn(|i| f32::from_bits(bits(i) & 0xffff_0000)),
        ]
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Not mul_add: without the instruction that is a slow library call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        // Adding and taking off 1.5 * 2^23 rounds to nearest even for |a| < 2^22, without a library call.
        a.map(|v| (v + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: Self::F, n: Self::F) -> Self::F {
        map2(a, n, |a, n| {
            a * f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23)
        })
    }
    #[inline(always)]
    unsafe fn lanes_or(a: Self::F, from: usize, to: usize, other: Self::F) -> Self::F {
        std::array::from_fn(|i| if (from..to).contains(&i) { a[i] } else { other[i] })
    }
    #[inline(always)]
    unsafe fn scale_pow2_above(a: Self::F, n: Self::F, x: Self::F, limit: f32) -> Self::F {
        map2(Self::scale_pow2(a, n), x, |a, x| if x > limit { a } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn any_above(a: Self::F, limit: f32) -> bool {
        a.into_iter().any(|a| a > limit)
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    unsafe fn max_lane(a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn at_least(a: Self::F, b: Self::F) -> u16 {
        (0..16).fold(0, |mask, i| mask | (u16::from(a[i] >= b[i]) << i))
    }
    #[inline(always)]
    unsafe fn keep_from(key: Self::F, floor: Self::F, value: Self::F) -> Self::F {
        std::array::from_fn(|i| if key[i] >= floor[i] { value[i] } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn to_f(a: Self::I) -> Self::F {
        a.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, a: Self::F) {
        let rounded = Self::round(a);
        to.cast::<[i8; 16]>()
            .write_unaligned(rounded.map(|v| v as i32 as i8));
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        from.cast::<[u8; 64]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn low_nibbles(a: Self::B) -> Self::B {
        a.map(|b| b & 15)
    }
    #[inline(always)]
    unsafe fn high_nibbles(a: Self::B) -> Self::B {
        a.map(|b| b >> 4)
    }
    #[inline(always)]
    unsafe fn byte(a: Self::B, j: i32) -> Self::F {
        std::array::from_fn(|i| f32::from(a[4 * i + j as usize]))
    }
    #[inline(always)]
    unsafe fn nibble_zero() -> Self::D {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn nibble_dot(sum: Self::D, w: Self::B, x: *const i8) -> Self::D {
        let x = x.cast::<[i8; 4]>().read_unaligned().map(i32::from);
        std::array::from_fn(|i| sum[i] + (0..4).map(|j| i32::from(w[4 * i + j]) * x[j]).sum::<i32>())
    }
    #[inline(always)]
    unsafe fn nibble_sum(sum: Self::D) -> Self::I {
        sum
    }
    #[inline(always)]
    unsafe fn byte_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I {
        Self::nibble_dot(sum, w, x)
    }
    #[inline(always)]
    unsafe fn byte_start(x_sum: i32) -> Self::I {
        [-128 * x_sum; 16]
    }
    #[inline(always)]
    unsafe fn join_bits(low: Self::B, bits: Self::B, left: i32, mask: u8) -> Self::B {
        let moved = |byte: u8| {
            if left < 0 { byte >> -left } else { byte << left }
        };
        std::array::from_fn(|i| low[i] | moved(bits[i]) & mask)
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> Self::I {
        [value; 16]
    }
    #[inline(always)]
    unsafe fn small_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I {
        Self::nibble_dot(sum, w, x)
    }
}
