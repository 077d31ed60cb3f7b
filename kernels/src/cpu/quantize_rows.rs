//! Activations in 8 bits: blocks of 32 with an f32 scale, and the block's sums that weights with a minimum or
//! an offset need. Knows nothing of weights.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Simd"
)]

use super::isa::Isa;
use super::linear::BLOCK;
use super::memory::{Memory, Rect};
use super::simd::{Kernel, Simd, dispatch};
use crate::device::DeviceError;

/// Quantized rows in shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantRows {
    /// `[rows, width]` codes from -127 to 127.
    pub(crate) codes: *mut i8,
    /// `[rows, blocks]`: value = scale * code.
    pub(crate) scales: *mut f32,
    /// `[rows, blocks]`: sum of the values after rounding, scale * code_sum. Not before: the roundings then
    /// cancel between a weight's code and its minimum, which halves the error.
    pub(crate) sums: *mut f32,
    /// `[rows, blocks]`: sum of the codes.
    pub(crate) code_sums: *mut i32,
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
            rows * (width_max + width_max / BLOCK * 12),
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
        // SAFETY: the four arrays lie one after the other within the memory sized in `new` for a width at
        // least as large; `codes` is a multiple of 32, so the f32 arrays are aligned.
        unsafe {
            let scales = self.memory.ptr().add(codes).cast::<f32>();
            QuantRows {
                codes: self.memory.ptr().cast(),
                scales,
                sums: scales.add(blocks),
                code_sums: scales.add(2 * blocks).cast(),
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
        for block in 0..self.to.blocks() {
            let at = self.row * self.to.blocks() + block;
            let (a, b) = (S::load(x.add(BLOCK * block)), S::load(x.add(BLOCK * block + 16)));
            let zero = S::splat(0.0);
            let size_a = S::max(a, S::sub(zero, a));
            let size_b = S::max(b, S::sub(zero, b));
            let scale = S::max_lane(S::max(size_a, size_b)) / 127.0;
            // Below this the reciprocal would overflow; such a block is zero for every purpose.
            let inverse = if scale > 1e-30 { 1.0 / scale } else { 0.0 };
            let code = codes.add(BLOCK * block);
            S::store_i8(code, S::mul(a, S::splat(inverse)));
            S::store_i8(code.add(16), S::mul(b, S::splat(inverse)));
            let stored = std::slice::from_raw_parts(code, BLOCK);
            *self.to.scales.add(at) = scale;
            let code_sum: i32 = stored.iter().map(|&c| i32::from(c)).sum();
            *self.to.sums.add(at) = scale * code_sum as f32;
            *self.to.code_sums.add(at) = code_sum;
        }
    }
}
