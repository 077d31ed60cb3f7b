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

const LINES_BYTES: usize = 512;
const PAIR_BYTES: usize = 64 + 2 * LINES_BYTES;

impl PanelDot for Q8_0Int8 {
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
        let w = w.add(block / 2 * PAIR_BYTES);
        let d = S::load_f16(w.add(block % 2 * 32).cast());
        let w = w.add(64 + block % 2 * LINES_BYTES);
        let lines = [
            S::load_bytes(w.add(0)),
            S::load_bytes(w.add(64)),
            S::load_bytes(w.add(128)),
            S::load_bytes(w.add(192)),
            S::load_bytes(w.add(256)),
            S::load_bytes(w.add(320)),
            S::load_bytes(w.add(384)),
            S::load_bytes(w.add(448)),
        ];
        let x = x.tile(row, block);
        let lane = row % 8;
        for (r, sum) in sums.iter_mut().enumerate() {
            let start = S::byte_start(i32::from((*x).code_sums[lane + r]));
            let dot = bytes_dot::<S>(start, &lines, (*x).codes[lane + r].as_ptr());
            *sum = S::fma(dot, S::mul(d, S::splat((*x).scales[lane + r])), *sum);
        }
        if (*x).is_fine::<M>(lane) {
            let d = S::mul(d, S::splat(1.0 / FINE));
            for (r, sum) in sums.iter_mut().enumerate() {
                if (*x).flags[lane + r] == 0 {
                    continue;
                }
                let start = S::byte_start(i32::from((*x).fine_sums[lane + r]));
                let dot = bytes_dot::<S>(start, &lines, (*x).fine[lane + r].as_ptr());
                *sum = S::fma(dot, S::mul(d, S::splat((*x).scales[lane + r])), *sum);
            }
        }
    }
}

impl PanelDot for Q8_0Exact {
    type X = FloatRows;
    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &FloatRows,
        row: usize,
        block: usize,
        _columns: usize,
        sums: &mut [S::F; M],
    ) {
        let w = w.add(block / 2 * PAIR_BYTES);
        let d = S::load_f16(w.add(block % 2 * 32).cast());
        let w = w.add(64 + block % 2 * LINES_BYTES);
        let offset = S::splat(128.0);
        let mut part = [S::splat(0.0); M];
        for c in 0..8 {
            let line = S::load_bytes(w.add(64 * c));
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

/// The dot products of a block's 16 rows with 32 activations.
#[inline(always)]
unsafe fn bytes_dot<S: Simd>(start: S::I, lines: &[S::B; 8], x: *const i8) -> S::F {
    let mut dot = start;
    for (c, line) in lines.iter().enumerate() {
        dot = S::byte_dot(dot, *line, x.add(4 * c));
    }
    S::to_f(dot)
}
