//! Activations as integers: blocks of 32 with an f32 scale, an 8-bit code and, where it matters, a second fine code per
//! element, and the block's sums that weights with a minimum or an offset need. Knows nothing of weights.
//!
//! One 8-bit code alone is what others use; it moves logits by tenths, enough to flip an answer's first token. The
//! fine code is a second integer dot product against weights that are already in registers. Only blocks with outliers
//! get one: their steps are the coarse ones, and they tend to be the same columns in every row.
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
/// A block gets fine codes if its scale is above this many times the (harmonic) mean of its row's: a few blocks
/// with outliers make most of the error. On the demo model's golden prompts, against f32 (mean KL, top-1, prefill
/// of 512 on AVX-512): all blocks 7.6e-7, 99.9%, 1.0x; 1.5 5.3e-4, 99.4%, 1.30x; 2 7.1e-4, 99.2%, 1.43x;
/// 3 1.2e-3, 98.4%, 1.54x; none 4.3e-3, 97.2%.
const FINE_FACTOR: f32 = 2.0;
/// Rows that one worker quantizes, and that vector kernels take at once: they share no cache line with others.
pub(crate) const EIGHT: usize = 8;
/// Rows that lie together.
pub(crate) const TILE_ROWS: usize = 2 * EIGHT;

/// Some rows' blocks of the same 32 columns, so that a kernel reaches all it needs from one address.
#[repr(C, align(64))]
pub(crate) struct QuantTile {
    /// Coarse codes from -127 to 127.
    pub(super) codes: [[i8; BLOCK]; TILE_ROWS],
    /// Fine codes from -127 to 127; zeros if not flagged.
    pub(super) fine: [[i8; BLOCK]; TILE_ROWS],
    pub(super) numbers: [QuantNumbers; 2],
}

/// What scales and corrects the codes of eight rows of a tile.
#[repr(C, align(64))]
pub(crate) struct QuantNumbers {
    /// Value = scale * (code + fine / [`FINE`]).
    pub(crate) scales: [f32; EIGHT],
    /// Sum of the values after rounding. Not before: the roundings then
    /// cancel between a weight's code and its minimum, which halves the error.
    pub(crate) sums: [f32; EIGHT],
    /// Sum of the coarse codes.
    pub(crate) code_sums: [i16; EIGHT],
    /// Sum of the first 16 coarse codes.
    pub(crate) half_sums: [i16; EIGHT],
    /// Sum of the fine codes.
    pub(crate) fine_sums: [i16; EIGHT],
    /// Whether the fine codes matter.
    pub(crate) flags: [u8; EIGHT],
}

/// `M` rows of a tile, all in one half of it.
pub(crate) struct QuantPart<'a> {
    codes: *const [i8; BLOCK],
    pub(crate) numbers: &'a QuantNumbers,
    /// Row of the first in [`Self::numbers`].
    pub(crate) lane: usize,
}

impl QuantPart<'_> {
    /// The coarse codes of the part's row `r`.
    #[inline(always)]
    pub(crate) fn codes(&self, r: usize) -> *const i8 {
        // SAFETY: parts are taken of rows that the buffer was made for.
        unsafe { self.codes.add(r).cast() }
    }

    /// The fine codes of the part's row `r`.
    #[inline(always)]
    pub(crate) fn fine(&self, r: usize) -> *const i8 {
        // SAFETY: as above; a tile's fine codes follow its coarse ones.
        unsafe { self.codes.add(TILE_ROWS + r).cast() }
    }

    /// Whether the fine codes matter to any of the `M` rows.
    #[inline(always)]
    pub(crate) fn is_fine<const M: usize>(&self) -> bool {
        (0..M).fold(0, |any, r| any | self.numbers.flags[self.lane + r]) != 0
    }
}

/// Quantized rows in shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantRows {
    /// `[rows / 16, blocks]`
    tiles: *mut QuantTile,
    /// Blocks per row.
    blocks: usize,
}

impl QuantRows {
    /// The tile of row `row` and block `block`, in which it is row `row % 16`.
    #[inline(always)]
    pub(crate) fn tile(&self, row: usize, block: usize) -> *mut QuantTile {
        // SAFETY: callers stay within the rows and columns the buffer was made for.
        unsafe { self.tiles.add(row / TILE_ROWS * self.blocks + block) }
    }

    /// The numbers of row `row` of block `block`, which are those of row `row % 8`.
    #[inline(always)]
    fn numbers(&self, row: usize, block: usize) -> *mut QuantNumbers {
        let tile = self.tile(row, block);
        // SAFETY: a tile has two of them.
        unsafe {
            (&raw mut (*tile).numbers)
                .cast::<QuantNumbers>()
                .add(row % TILE_ROWS / EIGHT)
        }
    }

    /// Row `row` of block `block` and those behind it, up to the next multiple of 8.
    ///
    /// # Safety
    /// Nobody writes these rows while the part lives.
    #[inline(always)]
    pub(crate) unsafe fn part<'a>(&self, row: usize, block: usize) -> QuantPart<'a> {
        let tile = self.tile(row, block);
        QuantPart {
            codes: (&raw const (*tile).codes)
                .cast::<[i8; BLOCK]>()
                .add(row % TILE_ROWS),
            numbers: &*self.numbers(row, block),
            lane: row % EIGHT,
        }
    }
}

/// Room for quantized rows.
#[derive(Debug)]
pub(crate) struct QuantBuffer {
    memory: Memory,
    blocks_max: usize,
}

impl QuantBuffer {
    /// Room for `rows` rows of up to `width_max` elements.
    pub(crate) fn new(rows: usize, width_max: usize) -> Result<Self, DeviceError> {
        let blocks_max = width_max.div_ceil(BLOCK);
        let tiles = rows.div_ceil(TILE_ROWS) * blocks_max;
        let memory = Memory::zeroed("quantized activations", tiles * size_of::<QuantTile>())?;
        Ok(Self { memory, blocks_max })
    }

    /// The buffer laid out for rows of `width` elements.
    pub(crate) fn rows(&self, width: usize) -> QuantRows {
        assert!(width <= self.blocks_max * BLOCK && width.is_multiple_of(BLOCK));
        QuantRows {
            tiles: self.memory.ptr().cast(),
            blocks: width / BLOCK,
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
        let (mut inverses, mut some) = (0.0, 0.0);
        for block in 0..self.to.blocks {
            let (a, b) = (S::load(x.add(BLOCK * block)), S::load(x.add(BLOCK * block + 16)));
            let scale = S::max_lane(S::max(abs::<S>(a), abs::<S>(b))) / 127.0;
            (*self.to.numbers(self.row, block)).scales[self.row % EIGHT] = scale;
            if scale > SCALE_MIN {
                inverses += 1.0 / scale;
                some += 1.0;
            }
        }
        let fine_from = FINE_FACTOR * some / inverses;
        for block in 0..self.to.blocks {
            self.block::<S>(x.add(BLOCK * block), block, fine_from);
        }
    }
}

/// Below this the reciprocal would overflow; such a block is zero for every purpose.
const SCALE_MIN: f32 = 1e-30;

impl QuantizeRow {
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, x: *const f32, block: usize, fine_from: f32) {
        let (tile, numbers) = (self.to.tile(self.row, block), self.to.numbers(self.row, block));
        let (row, lane) = (self.row % TILE_ROWS, self.row % EIGHT);
        let scale = (*numbers).scales[lane];
        let inverse = S::splat(if scale > SCALE_MIN { 1.0 / scale } else { 0.0 });
        let scaled = [S::mul(S::load(x), inverse), S::mul(S::load(x.add(16)), inverse)];
        let coarse = [S::round(scaled[0]), S::round(scaled[1])];
        let code = (*tile).codes[row].as_mut_ptr();
        S::store_i8(code, coarse[0]);
        S::store_i8(code.add(16), coarse[1]);
        let half_sum = S::sum(coarse[0]);
        let code_sum = half_sum + S::sum(coarse[1]);
        let flagged = scale > fine_from;
        let mut fine_sum = 0.0;
        if flagged {
            let steps = S::splat(FINE);
            let fine = [
                S::round(S::mul(S::sub(scaled[0], coarse[0]), steps)),
                S::round(S::mul(S::sub(scaled[1], coarse[1]), steps)),
            ];
            let code = (*tile).fine[row].as_mut_ptr();
            S::store_i8(code, fine[0]);
            S::store_i8(code.add(16), fine[1]);
            fine_sum = S::sum(S::add(fine[0], fine[1]));
        } else {
            (*tile).fine[row] = [0; BLOCK];
        }
        (*numbers).sums[lane] = scale * (code_sum + fine_sum / FINE);
        (*numbers).code_sums[lane] = code_sum as i16;
        (*numbers).half_sums[lane] = half_sum as i16;
        (*numbers).fine_sums[lane] = fine_sum as i16;
        (*numbers).flags[lane] = u8::from(flagged);
    }
}

#[inline(always)]
unsafe fn abs<S: Simd>(a: S::F) -> S::F {
    S::max(a, S::sub(S::splat(0.0), a))
}
