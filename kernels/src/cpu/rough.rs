//! Functions whose results are rounded to bf16, which keeps eight bits: right to twelve. For AVX-512 F and DQ.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "every function needs the instruction set, no more"
)]

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use galerne_core::graph::Activation;

use super::elementwise::{activated, gelu_exponent};
use super::simd::Simd as _;
use super::simd_avx512::Avx512;

type S = Avx512<true>;

/// `2^x` to 9e-5 of it for `-125 < x < 128`, exactly 1 for 0, exactly 0 below: see `simd::exp2_below_1`.
///
/// # Safety
/// The machine has AVX-512 F and DQ.
#[inline(always)]
pub(crate) unsafe fn exp2(x: __m512) -> __m512 {
    /// To the next integer below.
    const FLOOR: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let fraction = _mm512_reduce_ps::<FLOOR>(x);
    // The cubic that is 1 at 0 and whose largest relative error on 0 to 1 is smallest.
    let mut p = S::splat(0.077_067_16);
    for coefficient in [0.227_644_86, 0.695_116_8, 1.0] {
        p = S::fma(p, fraction, S::splat(coefficient));
    }
    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, S::splat(-125.0));
    // Multiplies with 2 to the power of its floor.
    _mm512_maskz_scalef_ps(above, p, x)
}

/// `1 / (1 + e^-x)`.
///
/// # Safety
/// See [`exp2`].
#[inline(always)]
unsafe fn sigmoid(x: __m512) -> __m512 {
    let power = exp2(S::mul(x, S::splat(-LOG2_E)));
    _mm512_rcp14_ps(S::add(S::splat(1.0), power))
}

/// `function` of 16 numbers; exactly those that are not made of exponentials.
///
/// # Safety
/// See [`exp2`], and [`activated`].
#[inline(always)]
pub(crate) unsafe fn roughly_activated(function: Activation, x: __m512) -> __m512 {
    match function {
        Activation::Silu => S::mul(x, sigmoid(x)),
        Activation::Sigmoid => sigmoid(x),
        Activation::GeluTanh => S::mul(x, sigmoid(gelu_exponent::<S>(x))),
        _ => activated::<S>(function, x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    /// What a function makes of some numbers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn each(function: Option<Activation>, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        for (from, to) in x.chunks_exact(16).zip(out.chunks_exact_mut(16)) {
            let x = S::load(from.as_ptr());
            let y = match function {
                None => exp2(x),
                Some(function) => roughly_activated(function, x),
            };
            S::store(to.as_mut_ptr(), y);
        }
        out
    }

    #[test]
    fn functions_are_right_to_twelve_bits() {
        if Isa::detect() < Isa::Avx512 {
            return;
        }
        let x: Vec<f32> = (-16_000..16_000).map(|i| i as f32 / 128.0).collect();
        let check = |function: Option<Activation>, exact: &dyn Fn(f64) -> f64, range: f32| {
            // SAFETY: the machine has the instructions.
            let got = unsafe { each(function, &x) };
            for (&x, got) in x.iter().zip(got).filter(|(x, _)| x.abs() < range) {
                let expected = exact(f64::from(x));
                assert!(
                    (f64::from(got) - expected).abs() <= expected.abs() / 4096.0 + 1e-30,
                    "{function:?} of {x}: {got} instead of {expected}"
                );
            }
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        check(None, &f64::exp2, 125.0);
        check(Some(Activation::Sigmoid), &sigmoid, 80.0);
        check(Some(Activation::Silu), &|x| x * sigmoid(x), 80.0);
        let gelu = |x: f64| x * sigmoid(1.595_769_121_6 * (x + 0.044_715 * x * x * x));
        check(Some(Activation::GeluTanh), &gelu, 8.0);
    }

    #[test]
    fn ends_are_exact() {
        if Isa::detect() < Isa::Avx512 {
            return;
        }
        let mut x = [0.0; 16];
        x[..5].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -126.0, -125.5, 0.0]);
        // SAFETY: the machine has the instructions.
        let (powers, silu) = unsafe { (each(None, &x), each(Some(Activation::Silu), &[-1e4; 16])) };
        assert_eq!(powers[..5], [0.0, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(silu, [0.0; 16], "no overflow");
    }
}
