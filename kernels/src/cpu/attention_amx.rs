//! Attention on AMX, over keys and values in bf16: scores and weighted values of 16 rows are products of tiles, in between is
//! a softmax of its own, whose weights are as exact as bf16. Tiles of 64 places, masks and the order of their sums are
//! those of `attention.rs`, so that here too a row's result does not depend on its neighbours.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Attend"
)]

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::amx::{Configured, Strided, TILE_ROWS, add_weighted, scores, scores_of_four};
use super::attention::{Attend, GROUPS, Part, TILE, Tile};
use super::kv_element::{KvElement, PAIR};
use super::memory::LINE_BYTES;
use super::rough::exp2;
use super::simd::{Simd as _, exp2_below_1};
use super::simd_avx512::Avx512;
use super::weights::LANES;

/// With queries and weights in bf16.
type S = Avx512<true>;

/// Elements of a head, or places of a tile, that a product takes.
const STEP: usize = 32;
/// Weights are powers of two of how far a score is above its row's reference, a score that was the largest of some tile.
/// Weights may grow by this power before the reference does, whose every change costs a pass over the row's results:
/// f32 and bf16 are as exact there.
const SLACK: f32 = 8.0;

/// Whether layers with heads of this width can be computed so.
pub(crate) const fn fits(width: usize) -> bool {
    width.is_multiple_of(STEP)
}

/// Runs a unit.
///
/// # Safety
/// See [`Attend`]; `T` is bf16, the layer's width [`fits`]; this process can execute AMX, AVX-512 F, BW, VL, DQ, VNNI and
/// BF16, and nobody else configures this thread's tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn attend_amx<T: KvElement>(unit: &Attend<'_, T>) {
    let rows = unit.tokens * unit.heads;
    unit.begin::<S>();
    let _tiles = Configured::with_rows(rows.min(TILE_ROWS));
    let seen = unit.groups(0..unit.tokens);
    let groups_from = |first_group: usize| seen.start.max(first_group)..seen.end.min(first_group + GROUPS);
    let first = seen.start / GROUPS * GROUPS;
    let mut coming = unit.tile(groups_from(first), first);
    for first_group in (first..seen.end).step_by(GROUPS) {
        let (groups, tile) = (groups_from(first_group), coming);
        coming = unit.tile(groups_from(first_group + GROUPS), first_group + GROUPS);
        unit.gather(
            &tile,
            steps(&(groups.start - first_group..groups.end - first_group)),
            &coming,
        );
        // Each kind of work for all rows before the next: what one stores is long in the cache when the next loads it.
        let sixteens = (0..rows)
            .step_by(TILE_ROWS)
            .map(|row| row..rows.min(row + TILE_ROWS));
        for rows in sixteens.clone() {
            unit.scores(&tile, first_group, rows);
        }
        for rows in sixteens.clone() {
            unit.weights_of(&tile, first_group, rows);
        }
        for rows in sixteens {
            unit.add_values(first_group, rows);
        }
    }
    unit.finish::<S>();
}

/// Steps of 32 places that some groups lie in.
fn steps(groups: &Range<usize>) -> Range<usize> {
    groups.start / 2..groups.end.div_ceil(2)
}

impl<T: KvElement> Attend<'_, T> {
    /// Puts the values of some steps together as products want them: see [`add_weighted`]. Groups that are not there are zeros.
    /// Meanwhile the tile after this one is fetched: a generated row's keys and values come from memory, in pieces too small
    /// for the processor to see them coming.
    #[inline(always)]
    unsafe fn gather(&self, tile: &Tile<T>, steps: Range<usize>, coming: &Tile<T>) {
        let to = self.scratch.part(Part::Values, 0).cast::<u8>();
        for group in 2 * steps.start..2 * steps.end {
            let (from, values, keys) = (tile.values[group], coming.values[group], coming.keys[group]);
            for vector in 0..self.layer.width_padded / LANES {
                let to = to.add(((vector * 2 + group / 2) * 2 + group % 2) * LANES / 2 * LINE_BYTES);
                for pair in 0..LANES / 2 {
                    let at = pair * self.layer.value_stride() + vector * PAIR;
                    let line = if from.is_null() {
                        _mm512_setzero_si512()
                    } else {
                        _mm512_loadu_si512(from.add(at).cast())
                    };
                    _mm512_store_si512(to.add(pair * LINE_BYTES).cast(), line);
                    if !values.is_null() {
                        S::prefetch(values.wrapping_add(at).cast());
                        S::prefetch(keys.wrapping_add(at).cast());
                    }
                }
            }
        }
    }

    /// Groups of a tile that some of the rows see.
    #[inline(always)]
    fn seen(&self, first_group: usize, rows: &Range<usize>) -> Range<usize> {
        let seen = self.groups(rows.start / self.heads..(rows.end - 1) / self.heads + 1);
        let start = seen.start.max(first_group) - first_group;
        start..seen.end.min(first_group + GROUPS).saturating_sub(first_group)
    }

    /// The scores of up to 16 rows.
    #[inline(always)]
    unsafe fn scores(&self, tile: &Tile<T>, first_group: usize, rows: Range<usize>) {
        let width = self.layer.width_padded;
        let q = Strided::new(self.query(rows.start), width * size_of::<f32>());
        let to = |group| {
            let to = self.scratch.part(Part::Scores, rows.start * TILE + group * LANES);
            Strided::new(to.cast(), TILE * size_of::<f32>())
        };
        let seen = self.seen(first_group, &rows);
        if seen == (0..GROUPS) {
            let keys = tile.keys.map(<*const T>::cast);
            scores_of_four(q, keys, width / STEP, to(0));
            return;
        }
        for group in seen {
            scores(group, q, tile.keys[group].cast(), width / STEP, to(group));
        }
    }

    /// The weights of up to 16 rows.
    #[inline(always)]
    unsafe fn weights_of(&self, tile: &Tile<T>, first_group: usize, rows: Range<usize>) {
        let seen = self.seen(first_group, &rows);
        if seen == (0..GROUPS) && self.see_all(tile, rows.clone()) {
            self.weights::<true>(tile, 0..GROUPS, rows);
        } else if !seen.is_empty() {
            self.weights::<false>(tile, seen, rows);
        }
    }

    /// Adds the weighted values of up to 16 rows to their results.
    #[inline(always)]
    unsafe fn add_values(&self, first_group: usize, rows: Range<usize>) {
        let seen = self.seen(first_group, &rows);
        if seen.is_empty() {
            return;
        }
        let (width, steps) = (self.layer.width_padded, steps(&seen));
        let weights = self
            .scratch
            .part(Part::Weights, 0)
            .cast::<u16>()
            .add(rows.start * TILE + steps.start * STEP);
        let weights = Strided::new(weights.cast(), TILE * size_of::<u16>());
        let mut vector = 0;
        while vector < width / LANES {
            let wide = width / LANES - vector >= 4;
            let values = self.scratch.part(Part::Values, 0).cast::<u8>();
            let values = values.add((vector * 2 + steps.start) * LANES * LINE_BYTES);
            let result = self
                .scratch
                .part(Part::Results, rows.start * width + vector * LANES);
            let result = Strided::new(result.cast(), width * size_of::<f32>());
            add_weighted(wide, weights, values, steps.len(), result);
            vector += if wide { 4 } else { 2 };
        }
    }

    /// The weights of some rows' scores, in proportion to the row's reference; if that rises, so is what the row has
    /// summed so far. See [`SLACK`].
    #[inline(always)]
    unsafe fn weights<const ALL: bool>(&self, tile: &Tile<T>, groups: Range<usize>, rows: Range<usize>) {
        // Without a cap scores are scaled only as they are turned to weights.
        let (capped, scale) = match self.spec.soft_cap {
            None if self.spec.scale > 0.0 => (false, self.spec.scale * LOG2_E),
            _ => (true, 1.0),
        };
        for row in rows {
            let seen = self.visible(row / self.heads);
            let mut scores = [S::splat(f32::NEG_INFINITY); GROUPS];
            let mut largest = S::splat(f32::NEG_INFINITY);
            for (g, kept) in scores.iter_mut().enumerate() {
                if !ALL && !groups.contains(&g) {
                    continue;
                }
                let mut score = S::load(self.scratch.part(Part::Scores, row * TILE + g * LANES));
                if capped {
                    score = self.power::<S>(score);
                }
                *kept = if ALL {
                    score
                } else {
                    tile.seen::<S>(&seen, g, score)
                };
                largest = S::max(largest, *kept);
            }
            let reference = self.scratch.part(Part::Maxima, row);
            let sums = self.scratch.part(Part::Sums, row * LANES);
            largest = S::mul(largest, S::splat(scale));
            if S::any_above(largest, *reference + SLACK) {
                let before = *reference;
                *reference = S::max_lane(largest);
                let factor = exp2_below_1::<S>(S::splat(before - *reference));
                S::store(sums, S::mul(S::load(sums), factor));
                let results = self.scratch.part(Part::Results, row * self.layer.width_padded);
                for d in (0..self.layer.width_padded).step_by(LANES) {
                    S::store(results.add(d), S::mul(S::load(results.add(d)), factor));
                }
            }
            let mut sum = S::load(sums);
            let weights = self.scratch.part(Part::Weights, 0).cast::<u16>().add(row * TILE);
            for step in if ALL { 0..GROUPS / 2 } else { steps(&groups) } {
                let from = S::splat(-*reference);
                let first = exp2(S::fma(scores[2 * step], S::splat(scale), from));
                let second = exp2(S::fma(scores[2 * step + 1], S::splat(scale), from));
                sum = S::add(S::add(sum, first), second);
                let pair = _mm512_cvtne2ps_pbh(second, first);
                weights.add(step * STEP).cast::<__m512bh>().write_unaligned(pair);
            }
            S::store(sums, sum);
        }
    }
}
