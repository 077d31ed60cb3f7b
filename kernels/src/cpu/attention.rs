//! Attention of a few query rows of one sequence over its KV blocks. Knows nothing of programs or threads.
//!
//! Keys are taken in tiles of 64 places with an online softmax: scores of a few rows, their weights against the
//! running maximum, the weighted values added to the running result. A tile holds the same places for every row and
//! a place that is not seen adds exact zeros, so a row's result does not depend on its neighbours in the unit, on
//! the batch, or on how a prompt was cut into chunks. Rows are blocked so that sums fill the registers; a
//! sequence's K and V tiles stay in cache while all rows of the unit use them.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Attend"
)]

use std::ops::Range;

use galerne_core::ids::BlockId;

#[cfg(target_arch = "x86_64")]
use super::attention_amx;
use super::isa::Isa;
use super::kv::{KvLayer, KvPool};
use super::kv_element::KvElement;
use super::memory::{Memory, Rect};
use super::simd::{Kernel, Simd, dispatch_bf16};
use super::weights::LANES;
use crate::device::DeviceError;
use crate::program::AttentionLayer;

/// Query rows (tokens times heads) in one unit of work: enough that a tile of keys is used often once it is in
/// cache, few enough that their queries and results stay there too.
const ROWS: usize = 96;
/// Rows whose sums are in registers together.
const BLOCK_ROWS: usize = 6;
/// Rows are taken in multiples of these, a tile of AMX.
const TILE_ROWS: usize = 16;
/// Groups of 16 keys in a tile.
pub(super) const GROUPS: usize = 4;
pub(super) const TILE: usize = GROUPS * LANES;
/// Before the first key: below every score, but finite, so that differences are numbers.
pub(super) const LOWEST: f32 = -1e30;

/// Tokens in one unit of work for a layer with `group` query heads per key head.
pub(crate) fn tile_tokens(group: usize) -> usize {
    (ROWS / group).max(1)
}

/// One worker's room for queries, running results and the scores of a tile.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    memory: Memory,
    rows: usize,
    width: usize,
}

impl AttentionScratch {
    /// Room for the layers of a program.
    pub(crate) fn new(layers: &[AttentionLayer]) -> Result<Self, DeviceError> {
        let group = layers
            .iter()
            .map(|l| (l.heads / l.kv_heads) as usize)
            .max()
            .unwrap_or(0);
        let width = layers.iter().map(|l| l.head_width as usize).max().unwrap_or(0);
        let rows = ROWS.max(group).next_multiple_of(TILE_ROWS);
        let width = width.next_multiple_of(LANES);
        let floats = rows * (2 * width + LANES + 2 * TILE + 1) + TILE * width / 2;
        Ok(Self {
            memory: Memory::zeroed("attention scratch", floats * 4)?,
            rows,
            width,
        })
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }

    /// Element `at` of part `part`, from its start on.
    #[inline(always)]
    pub(super) fn part(&self, part: Part, at: usize) -> *mut f32 {
        let rows = self.rows * self.width;
        let start = match part {
            Part::Queries => 0,
            Part::Results => rows,
            Part::Sums => 2 * rows,
            Part::Scores => 2 * rows + self.rows * LANES,
            Part::Weights => 2 * rows + self.rows * (LANES + TILE),
            Part::Maxima => 2 * rows + self.rows * (LANES + 2 * TILE),
            Part::Values => 2 * rows + self.rows * (LANES + 2 * TILE + 1),
        };
        debug_assert!((start + at) * 4 < self.memory.size_bytes());
        // SAFETY: the parts were sized in `new` for `rows` rows, which `attend` checks.
        unsafe { self.memory.f32s().add(start + at) }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Part {
    /// `[rows, width]`, or as many bf16.
    Queries,
    /// `[rows, width]`
    Results,
    /// `[rows, 16]`
    Sums,
    /// `[rows, 64]`
    Scores,
    /// `[rows, 64]`, or as many bf16.
    Weights,
    /// `[rows]`: the largest scores so far; in tiles of AMX, what scores are measured from.
    Maxima,
    /// `[64, width]`, as tiles of bf16.
    Values,
}

/// One unit of work: some tokens of one sequence, some query heads of one key head.
///
/// # Safety
/// To run one: `q` and `out` are `[tokens, heads * width]` and no one else touches `out`'s rows and heads of
/// this unit; the blocks hold every position up to the last token's, are in range and not written meanwhile;
/// `T` is the pool's element type; the scratch is this worker's own and was sized for this program.
pub(crate) struct Attend<'a, T> {
    pub(crate) spec: &'a AttentionLayer,
    pub(crate) kv: &'a KvPool,
    pub(crate) layer: KvLayer,
    pub(crate) blocks: &'a [BlockId],
    /// Row of the first token in `q` and `out`.
    pub(crate) row: usize,
    /// Tokens.
    pub(crate) tokens: usize,
    /// Position of the first token.
    pub(crate) position: usize,
    /// Positions of the sequence after this step.
    pub(crate) length: usize,
    /// First query head.
    pub(crate) head: usize,
    /// Query heads, all of one key head.
    pub(crate) heads: usize,
    pub(crate) q: Rect,
    pub(crate) out: Rect,
    pub(crate) scratch: &'a AttentionScratch,
    pub(crate) element: std::marker::PhantomData<T>,
}

/// Runs a unit.
///
/// # Safety
/// See [`Attend`].
pub(crate) unsafe fn attend<T: KvElement>(isa: Isa, unit: Attend<'_, T>) {
    assert!(unit.tokens * unit.heads <= unit.scratch.rows && unit.layer.width_padded <= unit.scratch.width);
    assert!(unit.length <= unit.blocks.len() * unit.kv.spec.block_tokens);
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx && T::TILED && attention_amx::fits(unit.layer.width) {
        return attention_amx::attend_amx(&unit);
    }
    dispatch_bf16(isa, unit);
}

/// Up to four groups of 16 keys, where they lie and which positions they are.
pub(super) struct Tile<T> {
    pub(super) keys: [*const T; GROUPS],
    pub(super) values: [*const T; GROUPS],
    pub(super) key_scales: [*const f32; GROUPS],
    pub(super) value_scales: [*const f32; GROUPS],
    pub(super) positions: [usize; GROUPS],
    /// Places of a group that hold tokens: fewer than 16 where a block ends.
    pub(super) places: [usize; GROUPS],
}

impl<T: KvElement> Kernel for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.tokens * self.heads;
        self.begin::<S>();
        let seen = self.groups(0..self.tokens);
        for tile in seen.start / GROUPS..seen.end.div_ceil(GROUPS) {
            let first_group = tile * GROUPS;
            let tile = self.tile(
                seen.start.max(first_group)..seen.end.min(first_group + GROUPS),
                first_group,
            );
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    BLOCK_ROWS.. => self.block::<S, BLOCK_ROWS>(&tile, first_group, row),
                    3.. => self.block::<S, 3>(&tile, first_group, row),
                    _ => self.block::<S, 1>(&tile, first_group, row),
                };
            }
        }
        self.finish::<S>();
    }
}

impl<T: KvElement> Attend<'_, T> {
    /// Positions a token sees.
    #[inline(always)]
    pub(super) fn visible(&self, token: usize) -> Range<usize> {
        let position = self.position + token;
        let high = if self.spec.causal {
            position + 1
        } else {
            self.length
        };
        let window = self
            .spec
            .sliding_window
            .map_or(usize::MAX, |window| window as usize);
        (position + 1).saturating_sub(window)..high
    }

    /// Groups of 16 places that some of the tokens see.
    #[inline(always)]
    pub(super) fn groups(&self, tokens: Range<usize>) -> Range<usize> {
        let (block_tokens, per_block) = (self.kv.spec.block_tokens, self.kv.block_slots() / LANES);
        let group = |position: usize| position / block_tokens * per_block + position % block_tokens / LANES;
        group(self.visible(tokens.start).start)..group(self.visible(tokens.end - 1).end - 1) + 1
    }

    #[inline(always)]
    pub(super) fn tile(&self, groups: Range<usize>, first_group: usize) -> Tile<T> {
        let kv_head = self.head / (self.spec.heads / self.spec.kv_heads) as usize;
        let (block_tokens, per_block) = (self.kv.spec.block_tokens, self.kv.block_slots() / LANES);
        let mut tile = Tile {
            keys: [std::ptr::null(); GROUPS],
            values: [std::ptr::null(); GROUPS],
            key_scales: [std::ptr::null(); GROUPS],
            value_scales: [std::ptr::null(); GROUPS],
            positions: [0; GROUPS],
            places: [0; GROUPS],
        };
        for group in groups {
            let (index, within, g) = (group / per_block, group % per_block, group - first_group);
            let block = self.blocks[index];
            tile.keys[g] = self.kv.keys(&self.layer, block, kv_head, within);
            tile.values[g] = self.kv.values(&self.layer, block, kv_head, within);
            if T::SCALED {
                let (keys, values) = self.kv.scales(&self.layer, block, kv_head, within);
                (tile.key_scales[g], tile.value_scales[g]) = (keys, values);
            }
            tile.positions[g] = index * block_tokens + within * LANES;
            tile.places[g] = LANES.min(block_tokens - within * LANES);
        }
        tile
    }

    /// Bytes of a query's or a weight's element.
    #[inline(always)]
    pub(super) fn factor_bytes<S: Simd>() -> usize {
        if T::products_in_bf16::<S>() { 2 } else { 4 }
    }

    #[inline(always)]
    pub(super) fn query(&self, row: usize) -> *mut u8 {
        self.scratch
            .part(Part::Queries, row * self.layer.width_padded)
            .cast()
    }

    /// Copies the unit's query rows together and starts their results.
    #[inline(always)]
    pub(super) unsafe fn begin<S: Simd>(&self) {
        let width = self.layer.width;
        for row in 0..self.tokens * self.heads {
            let (token, head) = (row / self.heads, self.head + row % self.heads);
            let from = self.q.base.add((self.row + token) * self.q.stride + head * width);
            for d in (0..width).step_by(LANES) {
                let x = if d + LANES <= width {
                    S::load(from.add(d))
                } else {
                    let mut padded = [0.0; LANES];
                    std::ptr::copy_nonoverlapping(from.add(d), padded.as_mut_ptr(), width - d);
                    S::load(padded.as_ptr())
                };
                if T::products_in_bf16::<S>() {
                    S::store_bf16(self.query(row).cast::<u16>().add(d), x);
                } else {
                    S::store(self.query(row).cast::<f32>().add(d), x);
                }
                S::store(
                    self.scratch
                        .part(Part::Results, row * self.layer.width_padded + d),
                    S::splat(0.0),
                );
            }
            S::store(self.scratch.part(Part::Sums, row * LANES), S::splat(0.0));
            *self.scratch.part(Part::Maxima, row) = LOWEST;
        }
    }

    /// Divides the results by the sums of weights and writes them out.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(&self) {
        let width = self.layer.width;
        for row in 0..self.tokens * self.heads {
            let (token, head) = (row / self.heads, self.head + row % self.heads);
            let to = self
                .out
                .base
                .add((self.row + token) * self.out.stride + head * width);
            let sum = S::sum(S::load(self.scratch.part(Part::Sums, row * LANES)));
            let factor = S::splat(1.0 / sum);
            for d in (0..width).step_by(LANES) {
                let at = self
                    .scratch
                    .part(Part::Results, row * self.layer.width_padded + d);
                let result = S::mul(S::load(at), factor);
                if d + LANES <= width {
                    S::store(to.add(d), result);
                } else {
                    S::store(at, result);
                    std::ptr::copy_nonoverlapping(at, to.add(d), width - d);
                }
            }
        }
    }
}
