//! `Q4_0` panels: `w = d (q - 8)`, so a block's dot product is `d (q . x - 8 sum(x))`.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::nibbles_dot;
use super::linear::{FloatRows, PanelDot, broadcast};
use super::quantize_rows::{FINE, QuantRows};
use super::simd::Simd;

/// Against activations in coarse and fine codes.
pub(crate) struct Q4_0Int8;
/// Against f32 activations.
pub(crate) struct Q4_0Exact;

const LINES_BYTES: usize = 256;
const PAIR_BYTES: usize = 64 + 2 * LINES_BYTES;

impl PanelDot for Q4_0Int8 {
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
        ];
        let low = [
            S::low_nibbles(lines[0]),
            S::low_nibbles(lines[1]),
            S::low_nibbles(lines[2]),
            S::low_nibbles(lines[3]),
        ];
        let high = [
            S::high_nibbles(lines[0]),
            S::high_nibbles(lines[1]),
            S::high_nibbles(lines[2]),
            S::high_nibbles(lines[3]),
        ];
        let x = x.tile(row, block);
        let lane = row % 8;
        let offset = S::mul(d, S::splat(-8.0));
        for (r, sum) in sums.iter_mut().enumerate() {
            let dot = nibbles_dot::<S>(&low, &high, (*x).codes[lane + r].as_ptr());
            let scaled = S::mul(d, S::splat((*x).scales[lane + r]));
            *sum = S::fma(offset, S::splat((*x).sums[lane + r]), *sum);
            *sum = S::fma(dot, scaled, *sum);
        }
        if (*x).is_fine::<M>(lane) {
            let d = S::mul(d, S::splat(1.0 / FINE));
            for (r, sum) in sums.iter_mut().enumerate() {
                if (*x).flags[lane + r] == 0 {
                    continue;
                }
                let dot = nibbles_dot::<S>(&low, &high, (*x).fine[lane + r].as_ptr());
                *sum = S::fma(dot, S::mul(d, S::splat((*x).scales[lane + r])), *sum);
            }
        }
    }
}

impl PanelDot for Q4_0Exact {
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
        let eight = S::splat(8.0);
        let mut part = [S::splat(0.0); M];
        for c in 0..4 {
            let line = S::load_bytes(w.add(64 * c));
            let (low, high) = (S::low_nibbles(line), S::high_nibbles(line));
            for j in 0..4 {
                let a = S::mul(S::sub(S::byte(low, j as i32), eight), d);
                let b = S::mul(S::sub(S::byte(high, j as i32), eight), d);
                let column = 32 * block + 4 * c + j;
                for (r, part) in part.iter_mut().enumerate() {
                    *part = S::fma(a, broadcast::<S>(x, row + r, column), *part);
                    *part = S::fma(b, broadcast::<S>(x, row + r, column + 16), *part);
                }
            }
        }
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum = S::add(*sum, part);
        }
    }
}
