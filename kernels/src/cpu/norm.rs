//! Root-mean-square, layer and L2 normalisation of one group of elements. Knows nothing of programs.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Simd"
)]

use super::simd::{Kernel, Simd};
use super::weights::LANES;

/// `out = x / rms(x) * (w + offset)` over `n` elements; `out` may be `x`.
pub(crate) struct RmsNorm {
    pub(crate) x: *const f32,
    pub(crate) weight: *const f32,
    pub(crate) out: *mut f32,
    pub(crate) n: usize,
    pub(crate) eps: f32,
    pub(crate) offset: f32,
}

/// `out = (x - mean) / sqrt(var + eps) * w + b` over `n` elements; `out` may be `x`.
pub(crate) struct LayerNorm {
    pub(crate) x: *const f32,
    pub(crate) weight: *const f32,
    pub(crate) bias: Option<*const f32>,
    pub(crate) out: *mut f32,
    pub(crate) n: usize,
    pub(crate) eps: f32,
}

/// `out = x / max(|x|, 1e-12)` over `n` elements; `out` may be `x`.
pub(crate) struct L2Normalise {
    pub(crate) x: *const f32,
    pub(crate) out: *mut f32,
    pub(crate) n: usize,
}

impl Kernel for RmsNorm {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mean = sum_of_squares::<S>(self.x, self.n, 0.0) / self.n as f32;
        let (factor, offset) = (1.0 / (mean + self.eps).sqrt(), self.offset);
        let mut i = 0;
        while i + LANES <= self.n {
            let w = S::add(S::load(self.weight.add(i)), S::splat(offset));
            S::store(
                self.out.add(i),
                S::mul(S::mul(S::load(self.x.add(i)), S::splat(factor)), w),
            );
            i += LANES;
        }
        for i in i..self.n {
            *self.out.add(i) = *self.x.add(i) * factor * (*self.weight.add(i) + offset);
        }
    }
}

impl Kernel for LayerNorm {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mean = sum::<S>(self.x, self.n) / self.n as f32;
        let variance = sum_of_squares::<S>(self.x, self.n, mean) / self.n as f32;
        let factor = 1.0 / (variance + self.eps).sqrt();
        for i in 0..self.n {
            let bias = self.bias.map_or(0.0, |bias| *bias.add(i));
            *self.out.add(i) = (*self.x.add(i) - mean) * factor * *self.weight.add(i) + bias;
        }
    }
}

impl Kernel for L2Normalise {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let length = sum_of_squares::<S>(self.x, self.n, 0.0).sqrt().max(1e-12);
        for i in 0..self.n {
            *self.out.add(i) = *self.x.add(i) / length;
        }
    }
}

#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(x: *const f32, n: usize, mean: f32) -> f32 {
    let mut lanes = S::splat(0.0);
    let mut i = 0;
    while i + LANES <= n {
        let v = S::sub(S::load(x.add(i)), S::splat(mean));
        lanes = S::fma(v, v, lanes);
        i += LANES;
    }
    let mut total = S::sum(lanes);
    for i in i..n {
        total += (*x.add(i) - mean) * (*x.add(i) - mean);
    }
    total
}

#[inline(always)]
unsafe fn sum<S: Simd>(x: *const f32, n: usize) -> f32 {
    let mut lanes = S::splat(0.0);
    let mut i = 0;
    while i + LANES <= n {
        lanes = S::add(lanes, S::load(x.add(i)));
        i += LANES;
    }
    let mut total = S::sum(lanes);
    for i in i..n {
        total += *x.add(i);
    }
    total
}
