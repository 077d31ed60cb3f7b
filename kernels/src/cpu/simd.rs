//! Sixteen f32 lanes, whatever the machine: the one vocabulary the kernels are written in. Each kernel is
//! written once over [`Simd`] and compiled once per instruction set; it must not know which one it runs on.
//!
//! A [`Kernel`] is inlined whole into a function that has the instruction set enabled ([`dispatch`]), so every
//! method here and every function a kernel calls is `inline(always)`.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each method's one-line body is covered by the contract of the trait"
)]

use std::f32::consts::LN_2;

use super::isa::Isa;

/// Vectors of one instruction set. Lane `i` of an `F` or `I` belongs to bytes `4 i .. 4 i + 4` of a `B`.
///
/// # Safety
/// Every method needs the instruction set of the implementing type; pointers must be valid for the 16 elements
/// (or 64 bytes, or 4 broadcast bytes) they name. No alignment is needed.
pub(crate) trait Simd: Copy + 'static {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// 64 bytes.
    type B: Copy;
    /// Running sums of products of 4-bit numbers.
    type D: Copy;

    /// Activation rows a matmul tile takes at once: as many as there are registers for.
    const TILE_ROWS: usize;
    /// Whether [`Self::dot_bf16`] is faster than widening and multiplying.
    const BF16_DOT: bool;

    /// Whether reading weights may be what a kernel waits for, so that it has a way to read them in several streams.
    const STREAMS: bool = false;

    /// Asks for the cache line `at` lies in, which need not be anybody's.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
    /// `value` in all lanes.
    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, value: Self::F);
    unsafe fn load_f16(from: *const u16) -> Self::F;
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    unsafe fn load_i8(from: *const i8) -> Self::F;
    /// Rounds to nearest, 16 halves.
    unsafe fn store_f16(to: *mut u16, a: Self::F);
    /// Rounds to nearest even, 16 bf16. `a` is finite.
    unsafe fn store_bf16(to: *mut u16, a: Self::F);
    /// The first and the second bf16 of each lane's four bytes.
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2];
    /// Adds to each lane the dot product of its two bf16 with the two at `x`.
    #[inline(always)]
    unsafe fn dot_bf16(sum: Self::F, pairs: Self::B, x: *const u16) -> Self::F {
        let [a, b] = Self::widen_bf16(pairs);
        let wide = |bits: u16| Self::splat(f32::from_bits(u32::from(bits) << 16));
        Self::fma(b, wide(*x.add(1)), Self::fma(a, wide(*x), sum))
    }
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the machine can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, as f32.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `a * 2^n` for integral `n` in `-126 ..= 127`.
    unsafe fn scale_pow2(a: Self::F, n: Self::F) -> Self::F;
    /// Lanes `from .. to` of `a`, the others of `other`.
    unsafe fn lanes_or(a: Self::F, from: usize, to: usize, other: Self::F) -> Self::F;
    /// `a * 2^n` in lanes where `x > limit`, elsewhere 0 whatever `a` and `n` are; `n` as for [`Self::scale_pow2`].
    unsafe fn scale_pow2_above(a: Self::F, n: Self::F, x: Self::F, limit: f32) -> Self::F;
    /// Whether a lane is larger than `limit`.
    unsafe fn any_above(a: Self::F, limit: f32) -> bool;
    /// The sum of all lanes, in a fixed order.
    unsafe fn sum(a: Self::F) -> f32;
    /// The largest lane.
    unsafe fn max_lane(a: Self::F) -> f32;
    /// Bit `i` is set where lane `i` of `a` is at least that of `b`; never for NaN.
    unsafe fn at_least(a: Self::F, b: Self::F) -> u16;
    /// `value` where `key` is at least `floor`, else 0.
    unsafe fn keep_from(key: Self::F, floor: Self::F, value: Self::F) -> Self::F;

    unsafe fn to_f(a: Self::I) -> Self::F;
    /// Rounds to nearest and keeps the low byte of each lane: 16 signed bytes.
    unsafe fn store_i8(to: *mut i8, a: Self::F);

    unsafe fn load_bytes(from: *const u8) -> Self::B;
    unsafe fn low_nibbles(a: Self::B) -> Self::B;
    unsafe fn high_nibbles(a: Self::B) -> Self::B;
    /// Unsigned byte `j` (0 to 3) of each lane.
    unsafe fn byte(a: Self::B, j: i32) -> Self::F;

    unsafe fn nibble_zero() -> Self::D;
    /// Adds to each lane the dot product of its four bytes (0 to 15) of `w` with the four signed bytes at `x`
    /// (-127 to 127). At most 8 times on one sum.
    unsafe fn nibble_dot(sum: Self::D, w: Self::B, x: *const i8) -> Self::D;
    unsafe fn nibble_sum(sum: Self::D) -> Self::I;
    /// Adds to each lane the dot product of its four bytes of `w`, stored plus 128, with the four signed bytes
    /// at `x` (-127 to 127); `sum` starts at [`Self::byte_start`].
    unsafe fn byte_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I;
    /// Where a byte sum starts, given the sum of the 32 activations it will see: an instruction set that
    /// multiplies the stored `w + 128` takes `128 * x_sum` off beforehand.
    unsafe fn byte_start(x_sum: i32) -> Self::I;
    /// The bits `mask` of each byte of `bits`, shifted left by `left` (right if negative), above those of `low`. No bit of
    /// the mask comes from another byte.
    unsafe fn join_bits(low: Self::B, bits: Self::B, left: i32, mask: u8) -> Self::B;
    /// `value` in all lanes.
    unsafe fn splat_i(value: i32) -> Self::I;
    /// Adds to each lane the dot product of its four bytes (0 to 63) of `w` with the four signed bytes at `x`
    /// (-127 to 127).
    unsafe fn small_dot(sum: Self::I, w: Self::B, x: *const i8) -> Self::I;
}

/// Code written over [`Simd`]. `run` must be `inline(always)`.
pub(crate) trait Kernel {
    /// What it gives back.
    type Output;

    /// # Safety
    /// The machine has `S`, and what the kernel's own fields promise.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs a kernel with an instruction set.
///
/// # Safety
/// The machine has `isa` (an [`Isa`] of a device has been checked), and the kernel's own contract.
pub(crate) unsafe fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => run_avx512(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => run_avx2(kernel),
        _ => kernel.run::<super::simd_portable::Portable>(),
    }
}

/// Like [`dispatch`], for kernels that use [`Simd::dot_bf16`]: others need no version of their own with it. Machines with
/// AMX have the instruction too, but at half the speed of f32's up to Sapphire Rapids.
///
/// # Safety
/// See [`dispatch`].
pub(crate) unsafe fn dispatch_bf16<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => run_avx512_bf16(kernel),
        _ => dispatch(isa, kernel),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<super::simd_avx512::Avx512<true>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<super::simd_avx512::Avx512<false>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<super::simd_avx2::Avx2>()
}

/// `e^x` to about 2 units in the last place, 0 below -87.
///
/// # Safety
/// See [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // Range reduction x = n ln 2 + r with ln 2 in two parts, then a Taylor polynomial of degree 7 on
    // |r| <= 0.3466, whose truncation error is below 6e-9.
    let clamped = S::min(S::max(x, S::splat(-87.3)), S::splat(88.3));
    let n = S::round(S::mul(clamped, S::splat(std::f32::consts::LOG2_E)));
    let r = S::fma(n, S::splat(-0.693_359_4), clamped);
    let r = S::fma(n, S::splat(2.121_944_4e-4), r);
    let mut p = S::splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(coefficient));
    }
    S::scale_pow2(p, n)
}

/// `2^x` to about 2e-7 of it for `-125 < x <= 0`, exactly 1 for 0, exactly 0 below. Lanes that would underflow are left out:
/// for one of them alone Intel's processors take hundreds of cycles.
///
/// # Safety
/// See [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp2_below_1<S: Simd>(x: S::F) -> S::F {
    let n = S::round(x);
    let f = S::sub(x, n);
    // Interpolates (2^f - 1) / f at the Chebyshev points of |f| <= 1/2.
    let mut p = S::splat(1.338_130_8e-3);
    for coefficient in [9.666_368e-3, 5.550_381e-2, 0.240_223_5, LN_2, 1.0] {
        p = S::fma(p, f, S::splat(coefficient));
    }
    S::scale_pow2_above(p, n, x, -125.0)
}

/// `1 / (1 + e^-x)`.
///
/// # Safety
/// See [`Simd`].
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S::F) -> S::F {
    let one = S::splat(1.0);
    S::div(one, S::add(one, exp::<S>(S::sub(S::splat(0.0), x))))
}
