//! `Q4_1` panels: `w = d q + m`, so a block's dot product is `d (q . x) + m sum(x)`.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::nibbles_dot;
use super::linear::{FloatRows, PanelDot, broadcast};
use super::quantize_rows::{FINE, QuantRows};
use super::simd::Simd;

/// Against activations in coarse and fine codes.
pub(crate) struct Q4_1Int8;
/// Against f32 activations.
pub(crate) struct Q4_1Exact;

const BLOCK_BYTES: usize = 320;
const LINES: usize = 64;

impl PanelDot for Q4_1Int8 {
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
        let w = w.add(BLOCK_BYTES * block);
        let d = S::load_f16(w.cast());
        let m = S::load_f16(w.add(32).cast());
        let line = w.add(LINES);
        let lines = [
            S::load_bytes(line.add(0)),
            S::load_bytes(line.add(64)),
            S::load_bytes(line.add(128)),
            S::load_bytes(line.add(192)),
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
        for (r, sum) in sums.iter_mut().enumerate() {
            let dot = nibbles_dot::<S>(&low, &high, (*x).codes[lane + r].as_ptr());
            let scaled = S::mul(d, S::splat((*x).scales[lane + r]));
            *sum = S::fma(m, S::splat((*x).sums[lane + r]), *sum);
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

impl PanelDot for Q4_1Exact {
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
        let w = w.add(BLOCK_BYTES * block);
        let d = S::load_f16(w.cast());
        let m = S::load_f16(w.add(32).cast());
        // A sum per block, then a sum of blocks: the error grows with the square root of either only.
        let mut part = [S::splat(0.0); M];
        for c in 0..4 {
            let line = S::load_bytes(w.add(LINES + 64 * c));
            let (low, high) = (S::low_nibbles(line), S::high_nibbles(line));
            for j in 0..4 {
                let a = S::add(S::mul(S::byte(low, j as i32), d), m);
                let b = S::add(S::mul(S::byte(high, j as i32), d), m);
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
