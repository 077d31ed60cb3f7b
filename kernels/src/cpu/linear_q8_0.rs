//! `Q8_0` panels: `w = d q`, with `q + 128` stored.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use super::linear::{FloatRows, PanelDot, broadcast};
use super::linear_integer::{Codes, Numbers, Quantized};
use super::simd::Simd;

/// The format.
pub(crate) struct Q8_0;
/// Against f32 activations.
pub(crate) struct Q8_0Exact;

const LINES_BYTES: usize = 512;
const PAIR_BYTES: usize = 64 + 2 * LINES_BYTES;

impl Quantized for Q8_0 {
    const CODES: Codes = Codes::Bytes;
    const OFFSET: i8 = -128;

    #[inline(always)]
    unsafe fn numbers<S: Simd>(w: *const u8, block: usize) -> Numbers<S> {
        let d = S::load_f16(w.add(block / 2 * PAIR_BYTES + block % 2 * 32).cast());
        Numbers::new(d, S::splat(0.0))
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(w: *const u8, block: usize) -> [S::B; 8] {
        let w = w.add(block / 2 * PAIR_BYTES + 64 + block % 2 * LINES_BYTES);
        [
            S::load_bytes(w.add(0)),
            S::load_bytes(w.add(64)),
            S::load_bytes(w.add(128)),
            S::load_bytes(w.add(192)),
            S::load_bytes(w.add(256)),
            S::load_bytes(w.add(320)),
            S::load_bytes(w.add(384)),
            S::load_bytes(w.add(448)),
        ]
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
