//! Panels of `f32`, `f16` and `bf16`, widened to f32 as they are read. Activations stay f32.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::{BLOCK, FloatRows, PanelDot, broadcast};
use super::simd::Simd;
use super::weights::LANES;

/// `f32` weights.
pub(crate) struct F32;
/// `f16` weights.
pub(crate) struct F16;
/// `bf16` weights.
pub(crate) struct Bf16;

macro_rules! plain {
    ($name:ident, $element_bytes:literal, $load:ident) => {
        impl PanelDot for $name {
            type X = FloatRows;
            #[inline(always)]
            unsafe fn block<S: Simd, const M: usize>(
                w: *const u8,
                x: &FloatRows,
                row: usize,
                block: usize,
                columns: usize,
                sums: &mut [S::F; M],
            ) {
                let mut part = [S::splat(0.0); M];
                for column in 0..columns {
                    let w = S::$load(w.add((32 * block + column) * LANES * $element_bytes).cast());
                    for (r, part) in part.iter_mut().enumerate() {
                        *part = S::fma(w, broadcast::<S>(x, row + r, 32 * block + column), *part);
                    }
                }
                for (sum, part) in sums.iter_mut().zip(part) {
                    *sum = S::add(*sum, part);
                }
            }
        }
    };
}

plain!(F32, 4, load);
plain!(F16, 2, load_f16);

impl PanelDot for Bf16 {
    type X = FloatRows;
    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &FloatRows,
        row: usize,
        block: usize,
        columns: usize,
        sums: &mut [S::F; M],
    ) {
        let w = w.add(BLOCK * block * LANES * 2);
        let mut part = [S::splat(0.0); M];
        for pair in 0..columns.div_ceil(2) {
            let both = S::widen_bf16(S::load_bytes(w.add(pair * LANES * 4)));
            for (second, w) in both.into_iter().enumerate().take(columns - 2 * pair) {
                let column = BLOCK * block + 2 * pair + second;
                for (r, part) in part.iter_mut().enumerate() {
                    *part = S::fma(w, broadcast::<S>(x, row + r, column), *part);
                }
            }
        }
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum = S::add(*sum, part);
        }
    }
}
