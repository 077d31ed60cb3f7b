//! `Q8_0` panels: `w = d q`, with `q + 128` stored.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::{FloatRows, PanelDot, broadcast};
use super::quantize_rows::{FINE, QuantRows};
use super::simd::Simd;

/// Against activations in coarse and fine codes.
pub(crate) struct Q8_0Int8;
/// Against f32 activations.
pub(crate) struct Q8_0Exact;

const BLOCK_BYTES: usize = 544;
const LINES: usize = 32;

impl PanelDot for Q8_0Int8 {
    type X = QuantRows;
    const BLOCK_BYTES: usize = BLOCK_BYTES;

    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &QuantRows,
        row: usize,
        block: usize,
        _columns: usize,
        sums: &mut [S::F; M],
    ) {
        let d = S::load_f16(w.cast());
        let line = w.add(LINES);
        let lines = [
            S::load_bytes(line.add(0)),
            S::load_bytes(line.add(64)),
            S::load_bytes(line.add(128)),
            S::load_bytes(line.add(192)),
            S::load_bytes(line.add(256)),
            S::load_bytes(line.add(320)),
            S::load_bytes(line.add(384)),
            S::load_bytes(line.add(448)),
        ];
        for (r, sum) in sums.iter_mut().enumerate() {
            let first = (row + r) * x.width + 32 * block;
            let (codes, fines) = (x.codes.add(first), x.fine.add(first));
            let at = (row + r) * x.blocks() + block;
            let mut dot = S::byte_start(*x.code_sums.add(at));
            let mut fine = S::byte_start(*x.fine_sums.add(at));
            for (c, line) in lines.iter().enumerate() {
                dot = S::byte_dot(dot, *line, codes.add(4 * c));
                fine = S::byte_dot(fine, *line, fines.add(4 * c));
            }
            let dot = S::fma(S::to_f(fine), S::splat(1.0 / FINE), S::to_f(dot));
            *sum = S::fma(dot, S::mul(d, S::splat(*x.scales.add(at))), *sum);
        }
    }
}

impl PanelDot for Q8_0Exact {
    type X = FloatRows;
    const BLOCK_BYTES: usize = BLOCK_BYTES;

    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &FloatRows,
        row: usize,
        block: usize,
        _columns: usize,
        sums: &mut [S::F; M],
    ) {
        let d = S::load_f16(w.cast());
        let offset = S::splat(128.0);
        let mut part = [S::splat(0.0); M];
        for c in 0..8 {
            let line = S::load_bytes(w.add(LINES + 64 * c));
            for j in 0..4 {
                let a = S::mul(S::sub(S::byte(line, j as i32), offset), d);
                let column = 32 * block + 4 * c + j;
                for (r, part) in part.iter_mut().enumerate() {
                    *part = S::fma(a, broadcast::<S>(x, row + r, column), *part);
                }
            }
        }
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum = S::add(*sum, part);
        }
    }
}
