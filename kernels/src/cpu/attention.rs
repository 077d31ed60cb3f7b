//! Attention of a few query rows of one sequence over its KV blocks. Knows nothing of programs or threads.
//!
//! Two passes over a row of scores that stays in cache: all scores, then the softmax, then the weighted values.
//! Every sum runs over the keys in their order, so a row's result does not depend on its neighbours in the
//! tile, on the batch, or on how a prompt was cut into chunks.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Attend"
)]

use galerne_core::ids::BlockId;

use super::isa::Isa;
use super::kv::{KvElement, KvLayer, KvPool};
use super::memory::{Memory, Rect};
use super::simd::{Kernel, Simd, dispatch, exp};
use super::weights::LANES;
use crate::device::DeviceError;
use crate::program::AttentionLayer;

/// Query rows (tokens times heads) in one unit of work: enough to use each key several times, few enough that
/// their scores stay in cache.
const ROWS: usize = 32;

/// Tokens in one unit of work for a layer with `group` query heads per key head.
pub(crate) fn tile_tokens(group: usize) -> usize {
    (ROWS / group).max(1)
}

/// One worker's room for queries and scores.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    memory: Memory,
    rows: usize,
    slots: usize,
    width: usize,
}

impl AttentionScratch {
    /// Room for the layers of a program over sequences of up to `slots` padded tokens.
    pub(crate) fn new(layers: &[AttentionLayer], slots: usize) -> Result<Self, DeviceError> {
        let group = layers
            .iter()
            .map(|l| (l.heads / l.kv_heads) as usize)
            .max()
            .unwrap_or(0);
        let width = layers.iter().map(|l| l.head_width as usize).max().unwrap_or(0);
        // A tile may reach up to 7 rows past the last.
        let rows = ROWS.max(group) + 8;
        // The first group of a window may add a vector.
        let slots = slots + LANES;
        let memory = Memory::zeroed("attention scratch", rows * (slots + width) * 4)?;
        Ok(Self {
            memory,
            rows,
            slots,
            width,
        })
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }
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
    assert!(unit.tokens * unit.heads <= unit.scratch.rows - 8);
    assert!(unit.length <= unit.blocks.len() * unit.kv.spec.block_tokens);
    dispatch(isa, unit);
}

impl<T: KvElement> Kernel for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let low = self.visible(0).0;
        let high = self.visible(self.tokens - 1).1;
        let first_group = self.slot(low) / LANES;
        let groups = self.slot(high - 1) / LANES + 1 - first_group;
        assert!(groups * LANES <= self.scratch.slots);
        self.gather_queries();
        for group in first_group..first_group + groups {
            let into = self.scores(0).add((group - first_group) * LANES);
            self.score_group::<S>(group, into);
        }
        for row in 0..self.tokens * self.heads {
            self.softmax::<S>(row, first_group * LANES, groups);
        }
        for d in (0..self.layer.width).step_by(LANES) {
            self.weigh_values::<S>(d, low, high, first_group * LANES);
        }
    }
}

impl<T: KvElement> Attend<'_, T> {
    /// Positions a token sees, from and to.
    #[inline(always)]
    fn visible(&self, token: usize) -> (usize, usize) {
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
        ((position + 1).saturating_sub(window), high)
    }

    /// Where a position lies in a row of scores of the whole sequence.
    #[inline(always)]
    fn slot(&self, position: usize) -> usize {
        let tokens = self.kv.spec.block_tokens;
        position / tokens * self.kv.block_slots() + position % tokens
    }

    #[inline(always)]
    fn query(&self, row: usize) -> *mut f32 {
        // SAFETY: `row` is below scratch.rows, whose queries come first in the scratch.
        unsafe { self.scratch.memory.f32s().add(row * self.scratch.width) }
    }

    #[inline(always)]
    fn scores(&self, row: usize) -> *mut f32 {
        let queries = self.scratch.rows * self.scratch.width;
        // SAFETY: `row` is below scratch.rows; the scores follow the queries.
        unsafe { self.scratch.memory.f32s().add(queries + row * self.scratch.slots) }
    }

    /// Copies the unit's query rows together, zero rows after the last.
    #[inline(always)]
    unsafe fn gather_queries(&self) {
        let (rows, width) = (self.tokens * self.heads, self.layer.width);
        for row in 0..rows {
            let (token, head) = (row / self.heads, self.head + row % self.heads);
            let from = self.q.base.add((self.row + token) * self.q.stride + head * width);
            std::ptr::copy_nonoverlapping(from, self.query(row), width);
        }
        for row in rows..rows.next_multiple_of(8) {
            std::ptr::write_bytes(self.query(row), 0, width);
        }
    }

    /// `q . k` of all rows with 16 keys.
    #[inline(always)]
    unsafe fn score_group<S: Simd>(&self, group: usize, into: *mut f32) {
        let per_block = self.kv.block_slots() / LANES;
        let block = self.blocks[group / per_block];
        let kv_head = self.head / (self.spec.heads / self.spec.kv_heads) as usize;
        let keys = self.kv.keys::<T>(&self.layer, block, kv_head, group % per_block);
        let rows = self.tokens * self.heads;
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            row += if left > 4 && S::TILE_ROWS >= 8 {
                self.score_tile::<S, 8>(keys, row, into)
            } else if left > 2 {
                self.score_tile::<S, 4>(keys, row, into)
            } else if left == 2 {
                self.score_tile::<S, 2>(keys, row, into)
            } else {
                self.score_tile::<S, 1>(keys, row, into)
            };
        }
    }

    #[inline(always)]
    unsafe fn score_tile<S: Simd, const M: usize>(
        &self,
        keys: *const T,
        row: usize,
        into: *mut f32,
    ) -> usize {
        let mut sums = [S::splat(0.0); M];
        let q = self.query(row);
        for d in 0..self.layer.width {
            let k = T::load::<S>(keys.add(d * LANES));
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(k, S::splat(*q.add(m * self.scratch.width + d)), *sum);
            }
        }
        for (m, sum) in sums.into_iter().enumerate() {
            let mut score = S::mul(sum, S::splat(self.spec.scale));
            if let Some(cap) = self.spec.soft_cap {
                score = S::mul(tanh::<S>(S::div(score, S::splat(cap))), S::splat(cap));
            }
            S::store(into.add((row + m) * self.scratch.slots), score);
        }
        M
    }

    /// Turns a row of scores into weights that sum to 1; invisible slots get exactly 0.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, row: usize, first_slot: usize, groups: usize) {
        let scores = self.scores(row);
        let (low, high) = self.visible(row / self.heads);
        self.mask(scores, low, high, first_slot, groups * LANES, f32::NEG_INFINITY);
        let mut largest = S::splat(f32::NEG_INFINITY);
        for g in 0..groups {
            largest = S::max(largest, S::load(scores.add(g * LANES)));
        }
        let largest = S::splat(S::max_lane(largest));
        let mut total = S::splat(0.0);
        for g in 0..groups {
            let at = scores.add(g * LANES);
            S::store(at, exp::<S>(S::sub(S::load(at), largest)));
        }
        // exp stops at e^-87, which is not nothing.
        self.mask(scores, low, high, first_slot, groups * LANES, 0.0);
        for g in 0..groups {
            total = S::add(total, S::load(scores.add(g * LANES)));
        }
        let factor = S::splat(1.0 / S::sum(total));
        for g in 0..groups {
            let at = scores.add(g * LANES);
            S::store(at, S::mul(S::load(at), factor));
        }
    }

    /// Overwrites slots that are not visible: before, after, and the padding of blocks.
    #[inline(always)]
    unsafe fn mask(&self, scores: *mut f32, low: usize, high: usize, first: usize, slots: usize, value: f32) {
        let row = std::slice::from_raw_parts_mut(scores, slots);
        row[..self.slot(low) - first].fill(value);
        row[self.slot(high - 1) + 1 - first..].fill(value);
        let (tokens, padded) = (self.kv.spec.block_tokens, self.kv.block_slots());
        if tokens != padded {
            for (i, score) in row.iter_mut().enumerate() {
                if (first + i) % padded >= tokens {
                    *score = value;
                }
            }
        }
    }

    /// 16 output elements from `d` on, all rows.
    #[inline(always)]
    unsafe fn weigh_values<S: Simd>(&self, d: usize, low: usize, high: usize, first_slot: usize) {
        let rows = self.tokens * self.heads;
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            row += if left > 4 && S::TILE_ROWS >= 8 {
                self.weigh_tile::<S, 8>(row, d, low, high, first_slot)
            } else if left > 2 {
                self.weigh_tile::<S, 4>(row, d, low, high, first_slot)
            } else if left == 2 {
                self.weigh_tile::<S, 2>(row, d, low, high, first_slot)
            } else {
                self.weigh_tile::<S, 1>(row, d, low, high, first_slot)
            };
        }
    }

    #[inline(always)]
    unsafe fn weigh_tile<S: Simd, const M: usize>(
        &self,
        row: usize,
        d: usize,
        low: usize,
        high: usize,
        first_slot: usize,
    ) -> usize {
        let mut sums = [S::splat(0.0); M];
        let tokens = self.kv.spec.block_tokens;
        let kv_head = self.head / (self.spec.heads / self.spec.kv_heads) as usize;
        let mut position = low;
        while position < high {
            let end = high.min((position / tokens + 1) * tokens);
            let block = self.blocks[position / tokens];
            let values = self.kv.values::<T>(&self.layer, block, kv_head);
            let values = values.add(position % tokens * self.layer.width_padded + d);
            let weights = self.scores(row).add(self.slot(position) - first_slot);
            for t in 0..end - position {
                let v = T::load::<S>(values.add(t * self.layer.width_padded));
                for (m, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(v, S::splat(*weights.add(m * self.scratch.slots + t)), *sum);
                }
            }
            position = end;
        }
        let rows = self.tokens * self.heads;
        for (m, sum) in sums.into_iter().enumerate().take(rows - row) {
            self.store_output::<S>(row + m, d, sum);
        }
        M
    }

    #[inline(always)]
    unsafe fn store_output<S: Simd>(&self, row: usize, d: usize, sum: S::F) {
        let (token, head) = (row / self.heads, self.head + row % self.heads);
        let column = head * self.layer.width + d;
        let to = self.out.base.add((self.row + token) * self.out.stride + column);
        let elements = LANES.min(self.layer.width - d);
        if elements == LANES {
            S::store(to, sum);
        } else {
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), sum);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, elements);
        }
    }
}

/// To about 1e-7 absolutely.
#[inline(always)]
unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    let (one, two) = (S::splat(1.0), S::splat(2.0));
    S::sub(one, S::div(two, S::add(exp::<S>(S::mul(x, two)), one)))
}
