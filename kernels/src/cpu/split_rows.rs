//! Activations in bf16 for tiles, which multiply nothing finer: rounded to one, or as two whose sum they are to one part in
//! 2^17. Knows nothing of weights.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Simd"
)]

use super::isa::Isa;
use super::linear::BLOCK;
use super::memory::{Memory, Rect};
use super::quantize_rows::TILE_ROWS;
use super::simd::{Kernel, Simd, dispatch};
use crate::device::DeviceError;

/// Elements of a tile: 16 rows of 32 columns.
const TILE: usize = TILE_ROWS * BLOCK;

/// How many bf16 an activation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halves {
    /// The nearest one.
    Upper,
    /// That, and what it lacks.
    Both,
}

impl Halves {
    const fn count(self) -> usize {
        match self {
            Self::Upper => 1,
            Self::Both => 2,
        }
    }
}

/// Split rows in shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SplitRows {
    /// `[rows / 16, blocks, halves, 16, 32]`, upper halves first.
    base: *mut u16,
    /// Blocks per row, the last of which may be padded with zeros.
    pub(crate) blocks: usize,
    pub(crate) halves: Halves,
}

impl SplitRows {
    /// The upper tile of block `block` of 16 rows from `row` on, a multiple of 16. The lower one, if there is one, follows.
    pub(crate) fn tile(&self, row: usize, block: usize) -> *mut u16 {
        // SAFETY: callers stay within the rows and columns the buffer was made for.
        unsafe {
            self.base
                .add((row / TILE_ROWS * self.blocks + block) * self.halves.count() * TILE)
        }
    }
}

/// Room for split rows.
#[derive(Debug)]
pub(crate) struct SplitBuffer {
    memory: Memory,
    blocks_max: usize,
    halves: Halves,
}

impl SplitBuffer {
    /// Room for `rows` rows of up to `width_max` elements.
    pub(crate) fn new(rows: usize, width_max: usize, halves: Halves) -> Result<Self, DeviceError> {
        let blocks_max = width_max.div_ceil(BLOCK);
        let tiles = halves.count() * rows.div_ceil(TILE_ROWS) * blocks_max;
        Ok(Self {
            memory: Memory::zeroed("split activations", tiles * TILE * size_of::<u16>())?,
            blocks_max,
            halves,
        })
    }

    /// The buffer laid out for rows of `width` elements.
    pub(crate) fn rows(&self, width: usize) -> SplitRows {
        let blocks = width.div_ceil(BLOCK);
        assert!(blocks <= self.blocks_max);
        SplitRows {
            base: self.memory.ptr().cast(),
            blocks,
            halves: self.halves,
        }
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }
}

/// Splits one row.
///
/// # Safety
/// `isa` is the machine's; row `row` of `x` may be read and row `row` of `to` written by this thread alone.
pub(crate) unsafe fn split_row(isa: Isa, x: Rect, to: SplitRows, row: usize) {
    dispatch(isa, SplitRow { x, to, row });
}

struct SplitRow {
    x: Rect,
    to: SplitRows,
    row: usize,
}

impl Kernel for SplitRow {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let x = self.x.base.add(self.row * self.x.stride);
        let whole = self.x.width / BLOCK;
        for block in 0..whole {
            self.block::<S>(x.add(BLOCK * block), block);
        }
        let rest = self.x.width % BLOCK;
        if rest > 0 {
            let mut padded = [0.0; BLOCK];
            std::ptr::copy_nonoverlapping(x.add(BLOCK * whole), padded.as_mut_ptr(), rest);
            self.block::<S>(padded.as_ptr(), whole);
        }
    }
}

impl SplitRow {
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, x: *const f32, block: usize) {
        let to = self.to.tile(self.row, block).add(self.row % TILE_ROWS * BLOCK);
        for half in [0, 16] {
            let upper = to.add(half);
            let value = S::load(x.add(half));
            S::store_bf16(upper, value);
            if self.to.halves == Halves::Both {
                S::store_bf16(upper.add(TILE), S::sub(value, S::load_bf16(upper)));
            }
        }
    }
}
