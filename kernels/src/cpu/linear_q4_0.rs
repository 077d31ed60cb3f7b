//! `Q4_0` panels: `w = d (q - 8)`, so a block's dot product is `d (q . x - 8 sum(x))`.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::{FloatRows, PanelDot, broadcast, nibbles};
use super::linear_integer::{Codes, Numbers, Quantized};
use super::simd::Simd;

/// The format.
pub(crate) struct Q4_0;
/// Against f32 activations.
pub(crate) struct Q4_0Exact;

const LINES_BYTES: usize = 256;
const PAIR_BYTES: usize = 64 + 2 * LINES_BYTES;

impl Quantized for Q4_0 {
    const CODES: Codes = Codes::Nibbles;
    const MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn numbers<S: Simd>(w: *const u8, block: usize) -> Numbers<S> {
        let d = S::load_f16(w.add(block / 2 * PAIR_BYTES + block % 2 * 32).cast());
        // In place of an offset of the codes: rounded sums of activations cancel their errors.
        Numbers::new(d, S::mul(d, S::splat(-8.0)))
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(w: *const u8, block: usize) -> [S::B; 8] {
        nibbles::<S>(lines(w, block))
    }

    #[inline(always)]
    unsafe fn nibbles(w: *const u8, block: usize) -> Option<*const u8> {
        Some(lines(w, block))
    }
}

/// Where a block's codes are.
#[inline(always)]
unsafe fn lines(w: *const u8, block: usize) -> *const u8 {
    w.add(block / 2 * PAIR_BYTES + 64 + block % 2 * LINES_BYTES)
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
