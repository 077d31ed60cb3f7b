//! Integer dot products of quantized weights with quantized activations: what all formats share. A format is its layout
//! (`linear_q*.rs`, `linear_grouped.rs`); how its codes are multiplied depends on their size only.
//!
//! A block's part of an output is `m sum(x) + d scale_x dot(q, x) + fine part`, in this order of operations wherever the dot
//! product was made: it is an integer, so all vector kernels give the same bits.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use std::marker::PhantomData;

use super::linear::PanelDot;
use super::quantize_rows::{FINE, QuantPart, QuantRows};
use super::simd::Simd;

/// Weights of format `F` against activations in coarse and fine codes.
pub(crate) struct Int8<F>(PhantomData<F>);

/// Codes as they lie in vectors.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codes {
    /// From 0 to 15.
    Nibbles,
    /// From 0 to 63; to be added [`Quantized::OFFSET`].
    Small,
    /// From 1 to 255; to be added -128.
    Bytes,
}

/// A quantized format. Blocks are of 32 columns.
///
/// # Safety
/// `w` points to a panel of the format that has block `block`.
pub(crate) trait Quantized {
    /// What codes are multiplied with.
    const CODES: Codes;
    /// What is added to a code.
    const OFFSET: i8 = 0;
    /// Whether each 16 columns have a scale.
    const HALVES: bool = false;
    /// Whether there is an `m`.
    const MINIMUM: bool = false;

    /// What makes numbers of integers.
    unsafe fn numbers<S: Simd>(w: *const u8, block: usize) -> Numbers<S>;
    /// The codes of a block, 4 columns in each vector, in order.
    unsafe fn codes<S: Simd>(w: *const u8, block: usize) -> [S::B; 8];
    /// Where a block's codes are if they are just what [`nibbles`](super::linear::nibbles) reads.
    #[inline(always)]
    unsafe fn nibbles(_w: *const u8, _block: usize) -> Option<*const u8> {
        None
    }
}

/// A block's numbers in f32, a lane for each output.
#[derive(Clone, Copy)]
pub(crate) struct Numbers<S: Simd> {
    /// Scales of the first and of the last 16 columns.
    pub(crate) d: [S::F; 2],
    pub(crate) m: S::F,
}

impl<S: Simd> Numbers<S> {
    /// Of a format with one scale to a block.
    #[inline(always)]
    pub(crate) fn new(d: S::F, m: S::F) -> Self {
        Self { d: [d; 2], m }
    }

    /// Adds dot products times their scales, `step` and `scale`. Without [`Quantized::HALVES`] the first is of all columns.
    #[inline(always)]
    unsafe fn add<F: Quantized>(&self, dots: [S::F; 2], step: f32, scale: f32, sum: S::F) -> S::F {
        if F::HALVES {
            let first = S::mul(self.d[0], dots[0]);
            let dot = S::fma(self.d[1], dots[1], first);
            return S::fma(dot, S::splat(scale * step), sum);
        }
        let d = S::mul(S::mul(self.d[0], S::splat(step)), S::splat(scale));
        S::fma(dots[0], d, sum)
    }

    /// Adds what the coarse codes make of `dots`, for activations with this scale and sum.
    ///
    /// # Safety
    /// See [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn coarse<F: Quantized>(
        &self,
        dots: [S::F; 2],
        scale: f32,
        x_sum: f32,
        mut sum: S::F,
    ) -> S::F {
        if F::MINIMUM {
            sum = S::fma(self.m, S::splat(x_sum), sum);
        }
        self.add::<F>(dots, 1.0, scale, sum)
    }

    /// Adds what the fine codes make of `dots`.
    ///
    /// # Safety
    /// See [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn fine<F: Quantized>(&self, dots: [S::F; 2], scale: f32, sum: S::F) -> S::F {
        self.add::<F>(dots, 1.0 / FINE, scale, sum)
    }
}

impl<F: Quantized> PanelDot for Int8<F> {
    type X = QuantRows;
    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &QuantRows,
        row: usize,
        block: usize,
        _columns: usize,
        sums: &mut [S::F; M],
    ) {
        let numbers = F::numbers::<S>(w, block);
        let codes = F::codes::<S>(w, block);
        let x = x.part(row, block);
        for (r, sum) in sums.iter_mut().enumerate() {
            let of = x.lane + r;
            let all = i32::from(x.numbers.code_sums[of]);
            let first = i32::from(x.numbers.half_sums[of]);
            let dots = dots::<S, F>(&codes, x.codes(r), [first, all - first]);
            *sum = numbers.coarse::<F>(dots, x.numbers.scales[of], x.numbers.sums[of], *sum);
        }
        if x.is_fine::<M>() {
            fine::<S, F, M>(&codes, &numbers, &x, sums);
        }
    }
}

/// Adds what the fine codes make, in the rows that have them.
#[inline(always)]
unsafe fn fine<S: Simd, F: Quantized, const M: usize>(
    codes: &[S::B; 8],
    numbers: &Numbers<S>,
    x: &QuantPart<'_>,
    sums: &mut [S::F; M],
) {
    for (r, sum) in sums.iter_mut().enumerate() {
        let of = x.lane + r;
        if x.numbers.flags[of] == 0 {
            continue;
        }
        let all = i32::from(x.numbers.fine_sums[of]);
        let first = if F::HALVES {
            (0..16).map(|i| i32::from(*x.fine(r).add(i))).sum()
        } else {
            0
        };
        let dots = dots::<S, F>(codes, x.fine(r), [first, all - first]);
        *sum = numbers.fine::<F>(dots, x.numbers.scales[of], *sum);
    }
}

/// The dot products of a block's 16 rows with 32 activations, of which `x_sums` are the sums of each half.
#[inline(always)]
unsafe fn dots<S: Simd, F: Quantized>(codes: &[S::B; 8], x: *const i8, x_sums: [i32; 2]) -> [S::F; 2] {
    if F::CODES == Codes::Nibbles {
        let mut dot = S::nibble_zero();
        for c in 0..4 {
            dot = S::nibble_dot(dot, codes[c], x.add(4 * c));
            dot = S::nibble_dot(dot, codes[4 + c], x.add(16 + 4 * c));
        }
        return [S::to_f(S::nibble_sum(dot)); 2];
    }
    let mut dots = if F::HALVES {
        [start::<S, F>(x_sums[0]), start::<S, F>(x_sums[1])]
    } else {
        [start::<S, F>(x_sums[0] + x_sums[1]); 2]
    };
    for (c, code) in codes.iter().enumerate() {
        let dot = &mut dots[usize::from(F::HALVES && c >= 4)];
        *dot = match F::CODES {
            Codes::Bytes => S::byte_dot(*dot, *code, x.add(4 * c)),
            _ => S::small_dot(*dot, *code, x.add(4 * c)),
        };
    }
    [S::to_f(dots[0]), S::to_f(dots[1])]
}

/// Where a dot product starts, given the sum of the activations it will see.
#[inline(always)]
unsafe fn start<S: Simd, F: Quantized>(x_sum: i32) -> S::I {
    match F::CODES {
        Codes::Bytes => S::byte_start(x_sum),
        _ => S::splat_i(i32::from(F::OFFSET) * x_sum),
    }
}
