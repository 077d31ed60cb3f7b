//! Elementwise functions of one or two rows. Knows nothing of programs.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Simd"
)]

use galerne_core::graph::Activation;

use super::isa::Isa;
use super::memory::Rect;
use super::simd::{Kernel, Simd, dispatch, sigmoid};
use super::weights::LANES;

/// What to compute of `a` and `b`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Elementwise {
    Add,
    Mul,
    /// `a * factor`
    Scale(f32),
    /// `function(a)`
    Activate(Activation),
    /// `function(a) * b`
    ActivateMul(Activation),
    /// `cap * tanh(a / cap)`
    SoftCap(f32),
}

/// Computes row `row` of `out`; each of `a` and `b` may be `out` itself. Ops of one operand ignore `b`.
///
/// # Safety
/// `isa` is the machine's; the rows have equal widths; nobody else writes them meanwhile.
pub(crate) unsafe fn elementwise(isa: Isa, op: Elementwise, a: Rect, b: Rect, out: Rect, row: usize) {
    debug_assert!(a.width == out.width && b.width == out.width);
    let at = |rect: Rect| rect.base.add(row * rect.stride);
    let (a, b, n) = (at(a).cast_const(), at(b).cast_const(), out.width);
    let out = at(out);
    match op {
        Elementwise::Add => dispatch(
            isa,
            Map {
                op: AddOp,
                a,
                b,
                out,
                n,
            },
        ),
        Elementwise::Mul => dispatch(
            isa,
            Map {
                op: MulOp,
                a,
                b,
                out,
                n,
            },
        ),
        Elementwise::Scale(factor) => dispatch(
            isa,
            Map {
                op: ScaleOp(factor),
                a,
                b,
                out,
                n,
            },
        ),
        Elementwise::SoftCap(cap) => {
            dispatch(
                isa,
                Map {
                    op: ScalarOp(move |x: f32| cap * (x / cap).tanh()),
                    a,
                    b,
                    out,
                    n,
                },
            );
        }
        Elementwise::Activate(function) => activate(isa, function, Bare, a, b, out, n),
        Elementwise::ActivateMul(function) => activate(isa, function, TimesB, a, b, out, n),
    }
}

/// `x * Phi(x)`; the error function to 1.2e-7 of its value's complement.
pub(crate) fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * erfc(-x / std::f64::consts::SQRT_2)) as f32
}

/// The complementary error function by its Maclaurin series near 0 and by Laplace's continued fraction in the
/// tails (Abramowitz & Stegun 7.1.6 and 7.1.14), both to better than 1e-12.
fn erfc(x: f64) -> f64 {
    let size = x.abs();
    let scale = std::f64::consts::FRAC_2_SQRT_PI * (-size * size).exp();
    let upper = if size < 2.5 {
        let (mut term, mut sum) = (size, size);
        for n in 1..60 {
            term *= 2.0 * size * size / f64::from(2 * n + 1);
            sum += term;
            if term < 1e-14 * sum {
                break;
            }
        }
        1.0 - scale * sum
    } else {
        let tail = (1..=40)
            .rev()
            .fold(size, |below, n| size + f64::from(n) / 2.0 / below);
        0.5 * scale / tail
    };
    if x < 0.0 { 2.0 - upper } else { upper }
}

unsafe fn activate<E: Ending>(
    isa: Isa,
    function: Activation,
    end: E,
    a: *const f32,
    b: *const f32,
    out: *mut f32,
    n: usize,
) {
    match function {
        Activation::Silu => dispatch(
            isa,
            Map {
                op: Ended(SiluOp, end),
                a,
                b,
                out,
                n,
            },
        ),
        Activation::Sigmoid => dispatch(
            isa,
            Map {
                op: Ended(SigmoidOp, end),
                a,
                b,
                out,
                n,
            },
        ),
        Activation::Relu => dispatch(
            isa,
            Map {
                op: Ended(ReluOp, end),
                a,
                b,
                out,
                n,
            },
        ),
        Activation::GeluTanh => dispatch(
            isa,
            Map {
                op: Ended(GeluTanhOp, end),
                a,
                b,
                out,
                n,
            },
        ),
        Activation::Tanh => dispatch(
            isa,
            Map {
                op: Ended(ScalarOp(f32::tanh), end),
                a,
                b,
                out,
                n,
            },
        ),
        Activation::Gelu => dispatch(
            isa,
            Map {
                op: Ended(ScalarOp(gelu), end),
                a,
                b,
                out,
                n,
            },
        ),
    }
}

/// `function` of 16 numbers.
///
/// # Safety
/// See [`Simd`].
#[inline(always)]
pub(crate) unsafe fn activated<S: Simd>(function: Activation, x: S::F) -> S::F {
    match function {
        Activation::Silu => SiluOp.apply::<S>(x, x),
        Activation::Sigmoid => SigmoidOp.apply::<S>(x, x),
        Activation::Relu => ReluOp.apply::<S>(x, x),
        Activation::GeluTanh => GeluTanhOp.apply::<S>(x, x),
        Activation::Tanh => ScalarOp(f32::tanh).apply::<S>(x, x),
        Activation::Gelu => ScalarOp(gelu).apply::<S>(x, x),
    }
}

/// `2 u` of GELU's `0.5 x (1 + tanh(u))`, which is `x` times the sigmoid of it.
///
/// # Safety
/// See [`Simd`].
#[inline(always)]
pub(crate) unsafe fn gelu_exponent<S: Simd>(x: S::F) -> S::F {
    let cube = S::mul(S::mul(x, x), x);
    let inner = S::fma(cube, S::splat(0.044_715), x);
    S::mul(inner, S::splat(1.595_769))
}

struct Map<O: LaneOp> {
    op: O,
    a: *const f32,
    b: *const f32,
    out: *mut f32,
    n: usize,
}

impl<O: LaneOp> Kernel for Map<O> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let whole = self.n / LANES * LANES;
        let mut i = 0;
        while i < whole {
            let result = self.op.apply::<S>(S::load(self.a.add(i)), S::load(self.b.add(i)));
            S::store(self.out.add(i), result);
            i += LANES;
        }
        let rest = self.n - whole;
        if rest > 0 {
            let (mut a, mut b) = ([0.0; LANES], [0.0; LANES]);
            std::ptr::copy_nonoverlapping(self.a.add(whole), a.as_mut_ptr(), rest);
            std::ptr::copy_nonoverlapping(self.b.add(whole), b.as_mut_ptr(), rest);
            let result = self.op.apply::<S>(S::load(a.as_ptr()), S::load(b.as_ptr()));
            S::store(a.as_mut_ptr(), result);
            std::ptr::copy_nonoverlapping(a.as_ptr(), self.out.add(whole), rest);
        }
    }
}

/// 16 results. `apply` must be `inline(always)`.
///
/// # Safety
/// See [`Simd`].
trait LaneOp: Copy {
    unsafe fn apply<S: Simd>(self, a: S::F, b: S::F) -> S::F;
}

/// What happens to a function's result.
trait Ending: Copy {
    unsafe fn end<S: Simd>(self, y: S::F, b: S::F) -> S::F;
}

macro_rules! lane_op {
    ($pattern:pat, $type:ty, |$a:ident, $b:ident| $body:expr) => {
        impl LaneOp for $type {
            #[inline(always)]
            unsafe fn apply<S: Simd>(self, $a: S::F, $b: S::F) -> S::F {
                let $pattern = self;
                let _ = $b;
                $body
            }
        }
    };
}

#[derive(Clone, Copy)]
struct AddOp;
#[derive(Clone, Copy)]
struct MulOp;
#[derive(Clone, Copy)]
struct ScaleOp(f32);
#[derive(Clone, Copy)]
struct SiluOp;
#[derive(Clone, Copy)]
struct SigmoidOp;
#[derive(Clone, Copy)]
struct ReluOp;
#[derive(Clone, Copy)]
struct GeluTanhOp;
#[derive(Clone, Copy)]
struct ScalarOp<F>(F);
#[derive(Clone, Copy)]
struct Ended<O, E>(O, E);
#[derive(Clone, Copy)]
struct Bare;
#[derive(Clone, Copy)]
struct TimesB;

lane_op!(AddOp, AddOp, |a, b| S::add(a, b));
lane_op!(MulOp, MulOp, |a, b| S::mul(a, b));
lane_op!(ScaleOp(factor), ScaleOp, |a, b| S::mul(a, S::splat(factor)));
lane_op!(SiluOp, SiluOp, |a, b| S::mul(a, sigmoid::<S>(a)));
lane_op!(SigmoidOp, SigmoidOp, |a, b| sigmoid::<S>(a));
lane_op!(ReluOp, ReluOp, |a, b| S::max(a, S::splat(0.0)));
lane_op!(GeluTanhOp, GeluTanhOp, |a, b| {
    S::mul(a, sigmoid::<S>(gelu_exponent::<S>(a)))
});

impl<F: Fn(f32) -> f32 + Copy> LaneOp for ScalarOp<F> {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, a: S::F, _b: S::F) -> S::F {
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), a);
        for lane in &mut lanes {
            *lane = (self.0)(*lane);
        }
        S::load(lanes.as_ptr())
    }
}

impl<O: LaneOp, E: Ending> LaneOp for Ended<O, E> {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, a: S::F, b: S::F) -> S::F {
        self.1.end::<S>(self.0.apply::<S>(a, b), b)
    }
}

impl Ending for Bare {
    #[inline(always)]
    unsafe fn end<S: Simd>(self, y: S::F, _b: S::F) -> S::F {
        y
    }
}

impl Ending for TimesB {
    #[inline(always)]
    unsafe fn end<S: Simd>(self, y: S::F, b: S::F) -> S::F {
        S::mul(y, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erfc_agrees_with_tables() {
        // Abramowitz & Stegun, tables 7.1 and 7.3.
        for (x, expected) in [
            (0.0, 1.0),
            (0.5, 0.479_500_122_2),
            (1.0, 0.157_299_207_1),
            (2.0, 0.004_677_734_98),
        ] {
            assert!((erfc(x) - expected).abs() < 1e-9, "erfc({x}) = {}", erfc(x));
            assert!((erfc(-x) - (2.0 - expected)).abs() < 1e-9, "erfc(-{x})");
        }
        assert!(
            (erfc(2.499_999) - erfc(2.500_001)).abs() < 1e-8,
            "series and fraction meet"
        );
    }
}
