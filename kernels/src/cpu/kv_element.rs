//! How one number of the KV pool is stored, and how sixteen pairs of them are multiplied. Knows no layout beyond
//! the pair.
//!
//! A pair is 32 numbers: 16 lanes (keys, or elements of values) times two consecutive terms of a sum (elements of a
//! key, or tokens). bf16 lies lane by lane, as its dot product wants it; the others term by term.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each method's short body is covered by the contract of the trait"
)]

use half::{bf16, f16};

use super::simd::Simd;
use super::weights::LANES;
use crate::quant::float8;

/// Numbers in a pair of vectors.
pub(crate) const PAIR: usize = 2 * LANES;

/// A number of the pool.
///
/// # Safety
/// Every method needs the instruction set of `S` and pointers valid for what they name.
pub(crate) trait KvElement: Copy + Send + Sync + 'static {
    /// Whether the two terms of a lane lie side by side.
    const INTERLEAVED: bool = false;
    /// Whether tiles can multiply it: bf16 alone.
    const TILED: bool = false;
    /// Whether each token and head has a scale.
    const SCALED: bool = false;
    /// Largest number stored, by absolute value. What is stored is finite, so that a weight of 0 makes nothing of
    /// it, whatever an earlier owner of the block left there.
    const LARGEST: f32;

    /// Whether products are taken in bf16: then queries and weights are kept in bf16 too.
    #[inline(always)]
    fn products_in_bf16<S: Simd>() -> bool {
        false
    }

    /// Where term `i` (0 or 1) of a lane lies in its pair.
    #[inline(always)]
    fn place(lane: usize, i: usize) -> usize {
        if Self::INTERLEAVED {
            2 * lane + i
        } else {
            i * LANES + lane
        }
    }

    /// Rounds 16 finite numbers to nearest.
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F);

    /// The first and the second terms of a pair.
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::F; 2];

    /// Adds the products of a pair with two terms at `x`: two bf16 if [`Self::products_in_bf16`], else two f32.
    #[inline(always)]
    unsafe fn products<S: Simd, const M: usize, const N: usize>(
        sums: &mut [[S::F; N]; M],
        pairs: [*const Self; N],
        x: [*const u8; M],
    ) {
        if Self::products_in_bf16::<S>() {
            let pairs = pairs.map(|pair| S::load_bytes(pair.cast()));
            for (sums, x) in sums.iter_mut().zip(x) {
                for (sum, pair) in sums.iter_mut().zip(pairs) {
                    *sum = S::dot_bf16(*sum, pair, x.cast());
                }
            }
            return;
        }
        let mut wide = [[S::splat(0.0); 2]; N];
        for (wide, pair) in wide.iter_mut().zip(pairs) {
            *wide = Self::load_pair::<S>(pair);
        }
        for (sums, x) in sums.iter_mut().zip(x) {
            let x = x.cast::<f32>();
            let (first, second) = (S::splat(*x), S::splat(*x.add(1)));
            for (sum, [a, b]) in sums.iter_mut().zip(wide) {
                *sum = S::fma(b, second, S::fma(a, first, *sum));
            }
        }
    }
}

impl KvElement for f32 {
    const LARGEST: f32 = f32::MAX;

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F) {
        S::store(to, values);
    }

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::F; 2] {
        [S::load(from), S::load(from.add(LANES))]
    }
}

impl KvElement for f16 {
    const LARGEST: f32 = 65_504.0;

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F) {
        S::store_f16(to.cast(), values);
    }

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::F; 2] {
        [S::load_f16(from.cast()), S::load_f16(from.add(LANES).cast())]
    }
}

impl KvElement for i8 {
    const SCALED: bool = true;
    const LARGEST: f32 = f32::MAX;

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F) {
        S::store_i8(to, values);
    }

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::F; 2] {
        [S::load_i8(from), S::load_i8(from.add(LANES))]
    }
}

/// An 8-bit float. No instruction of a CPU knows it, so it is slow to store; reading it goes by way of f16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct E4m3(u8);

impl E4m3 {
    /// What 16 of them stand for.
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F {
        // As an f16 with the same exponent and mantissa it is smaller by the difference of the biases, 2^8, also where it
        // is subnormal.
        let halves: [u16; LANES] = std::array::from_fn(|i| {
            let code = u16::from((*from.add(i)).0);
            (code & 0x7f) << 7 | (code & 0x80) << 8
        });
        S::mul(S::load_f16(halves.as_ptr()), S::splat(256.0))
    }
}

impl KvElement for E4m3 {
    const LARGEST: f32 = float8::LARGEST;

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F) {
        let mut numbers = [0.0; LANES];
        S::store(numbers.as_mut_ptr(), values);
        for (i, x) in numbers.into_iter().enumerate() {
            *to.add(i) = Self(float8::code(x));
        }
    }

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::F; 2] {
        [Self::load::<S>(from), Self::load::<S>(from.add(LANES))]
    }
}

impl KvElement for bf16 {
    const INTERLEAVED: bool = true;
    /// The largest bf16.
    const TILED: bool = true;
    const LARGEST: f32 = 3.389_531_4e38;

    #[inline(always)]
    fn products_in_bf16<S: Simd>() -> bool {
        S::BF16_DOT
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, values: S::F) {
        S::store_bf16(to.cast(), values);
    }

    #[inline(always)]
    unsafe fn load_pair<S: Simd>(from: *const Self) -> [S::F; 2] {
        S::widen_bf16(S::load_bytes(from.cast()))
    }
}
