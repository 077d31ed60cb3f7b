//! `Q4_1` panels: `w = d q + m`, so a block's dot product is `d (q . x) + m sum(x)`.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::{FloatRows, PanelDot, broadcast, nibbles};
use super::linear_integer::{Codes, Numbers, Quantized};
use super::simd::Simd;

/// The format.
pub(crate) struct Q4_1;
/// Against f32 activations.
pub(crate) struct Q4_1Exact;

const BLOCK_BYTES: usize = 320;
const LINES: usize = 64;

impl Quantized for Q4_1 {
    const CODES: Codes = Codes::Nibbles;
    const MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn numbers<S: Simd>(w: *const u8, block: usize) -> Numbers<S> {
        let w = w.add(BLOCK_BYTES * block);
        Numbers::new(S::load_f16(w.cast()), S::load_f16(w.add(32).cast()))
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
    w.add(BLOCK_BYTES * block + LINES)
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
