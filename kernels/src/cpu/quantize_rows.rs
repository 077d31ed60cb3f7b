//! Activations in 15 bits: blocks of 32 with an f32 scale, a coarse and a fine 8-bit code per element, and the
//! block's sums that weights with a minimum or an offset need. Knows nothing of weights.
//!
//! One 8-bit code alone is what others use; it moves logits by tenths, enough to flip an answer's first token. The
//! fine code is a second integer dot product against weights that are already in registers, and brings the error of a
//! matmul close to f32's own.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Simd"
)]

use super::isa::Isa;
use super::linear::BLOCK;
use super::memory::{Memory, Rect};
use super::simd::{Kernel, Simd, dispatch};
use crate::device::DeviceError;

/// Fine steps in one coarse step: a rounding error of half a coarse step is 127 fine ones.
pub(crate) const FINE: f32 = 254.0;

/// Quantized rows in shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantRows {
    /// `[rows, width]` coarse codes from -127 to 127.
    pub(crate) codes: *mut i8,
    /// `[rows, width]` fine codes from -127 to 127.
    pub(crate) fine: *mut i8,
    /// `[rows, blocks]`: value = scale * (code + fine / [`FINE`]).
    pub(crate) scales: *mut f32,
    /// `[rows, blocks]`: sum of the values after rounding. Not before: the roundings then
    /// cancel between a weight's code and its minimum, which halves the error.
    pub(crate) sums: *mut f32,
    /// `[rows, blocks]`: sum of the coarse codes.
    pub(crate) code_sums: *mut i32,
    /// `[rows, blocks]`: sum of the fine codes.
    pub(crate) fine_sums: *mut i32,
    /// Codes per row, a multiple of 32.
    pub(crate) width: usize,
}

impl QuantRows {
    /// Blocks per row.
    #[inline(always)]
    pub(crate) fn blocks(&self) -> usize {
        self.width / BLOCK
    }
}

/// Room for quantized rows.
#[derive(Debug)]
pub(crate) struct QuantBuffer {
    memory: Memory,
    rows: usize,
    width_max: usize,
}

impl QuantBuffer {
    /// Room for `rows` rows of up to `width_max` elements.
    pub(crate) fn new(rows: usize, width_max: usize) -> Result<Self, DeviceError> {
        let width_max = width_max.next_multiple_of(BLOCK);
        let memory = Memory::zeroed(
            "quantized activations",
            rows * (2 * width_max + width_max / BLOCK * 16),
        )?;
        Ok(Self {
            memory,
            rows,
            width_max,
        })
    }

    /// The buffer laid out for rows of `width` elements.
    pub(crate) fn rows(&self, width: usize) -> QuantRows {
        assert!(width <= self.width_max && width.is_multiple_of(BLOCK));
        let (codes, blocks) = (self.rows * width, self.rows * (width / BLOCK));
        // SAFETY: the six arrays lie one after the other within the memory sized in `new` for a width at
        // least as large; `codes` is a multiple of 32, so the f32 arrays are aligned.
        unsafe {
            let scales = self.memory.ptr().add(2 * codes).cast::<f32>();
            QuantRows {
                codes: self.memory.ptr().cast(),
                fine: self.memory.ptr().add(codes).cast(),
                scales,
                sums: scales.add(blocks),
                code_sums: scales.add(2 * blocks).cast(),
                fine_sums: scales.add(3 * blocks).cast(),
                width,
            }
        }
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }
}

/// Quantizes one row.
///
/// # Safety
/// `isa` is the machine's; row `row` of `x` may be read and row `row` of `to` written by this thread alone.
pub(crate) unsafe fn quantize_row(isa: Isa, x: Rect, to: QuantRows, row: usize) {
    dispatch(isa, QuantizeRow { x, to, row });
}

struct QuantizeRow {
    x: Rect,
    to: QuantRows,
    row: usize,
}

impl Kernel for QuantizeRow {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let x = self.x.base.add(self.row * self.x.stride);
        let codes = self.to.codes.add(self.row * self.to.width);
        let fines = self.to.fine.add(self.row * self.to.width);
        for block in 0..self.to.blocks() {
            let at = self.row * self.to.blocks() + block;
            let (a, b) = (S::load(x.add(BLOCK * block)), S::load(x.add(BLOCK * block + 16)));
            let zero = S::splat(0.0);
            let size_a = S::max(a, S::sub(zero, a));
            let size_b = S::max(b, S::sub(zero, b));
            let scale = S::max_lane(S::max(size_a, size_b)) / 127.0;
            // Below this the reciprocal would overflow; such a block is zero for every purpose.
            let inverse = S::splat(if scale > 1e-30 { 1.0 / scale } else { 0.0 });
            let (code, fine) = (codes.add(BLOCK * block), fines.add(BLOCK * block));
            for (half, value) in [(0, a), (16, b)] {
                let scaled = S::mul(value, inverse);
                let coarse = S::round(scaled);
                S::store_i8(code.add(half), coarse);
                S::store_i8(fine.add(half), S::mul(S::sub(scaled, coarse), S::splat(FINE)));
            }
            let total = |from: *mut i8| -> i32 {
                std::slice::from_raw_parts(from, BLOCK)
                    .iter()
                    .map(|&code| i32::from(code))
                    .sum()
            };
            let (code_sum, fine_sum) = (total(code), total(fine));
            *self.to.scales.add(at) = scale;
            *self.to.sums.add(at) = scale * (code_sum as f32 + fine_sum as f32 / FINE);
            *self.to.fine_sums.add(at) = fine_sum;
            *self.to.code_sums.add(at) = code_sum;
        }
    }
}
