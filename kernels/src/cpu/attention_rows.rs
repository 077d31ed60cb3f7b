//! What attention does with a few rows and a tile of keys: scores, weights against the running maximum, weighted
//! values. Knows nothing of how rows and tiles are chosen.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Attend"
)]

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::attention::{Attend, GROUPS, LOWEST, Part, TILE, Tile};
use super::kv_element::{KvElement, PAIR};
use super::simd::{Simd, exp, exp2_below_1};
use super::weights::LANES;

impl<T> Tile<T> {
    /// Scores of a group where they are of positions in `seen`, elsewhere below all others.
    #[inline(always)]
    pub(super) unsafe fn seen<S: Simd>(&self, seen: &Range<usize>, group: usize, scores: S::F) -> S::F {
        let (position, places) = (self.positions[group], self.places[group]);
        let from = seen.start.saturating_sub(position).min(places);
        let to = seen.end.saturating_sub(position).min(places).max(from);
        S::lanes_or(scores, from, to, S::splat(f32::NEG_INFINITY))
    }
}

impl<T: KvElement> Attend<'_, T> {
    /// Some rows through the part of a tile that one of them sees.
    #[inline(always)]
    pub(super) unsafe fn block<S: Simd, const M: usize>(
        &self,
        tile: &Tile<T>,
        first_group: usize,
        row: usize,
    ) -> usize {
        let seen = self.groups(row / self.heads..(row + M - 1) / self.heads + 1);
        let start = seen.start.max(first_group) - first_group;
        let end = seen.end.min(first_group + GROUPS).saturating_sub(first_group);
        if start == 0 && end == GROUPS && self.see_all(tile, row..row + M) {
            self.part_of_block::<S, M, true>(tile, 0, GROUPS, row);
        } else if start < end {
            self.part_of_block::<S, M, false>(tile, start, end, row);
        }
        M
    }

    /// Whether all rows see all places of a tile of four groups.
    #[inline(always)]
    pub(super) fn see_all(&self, tile: &Tile<T>, rows: Range<usize>) -> bool {
        let first = self.visible(rows.start / self.heads);
        let last = self.visible((rows.end - 1) / self.heads);
        tile.places == [LANES; GROUPS]
            && last.start <= tile.positions[0]
            && first.end >= tile.positions[GROUPS - 1] + LANES
    }

    /// `ALL`: the whole tile, which all rows see: the common case, with its bounds known to the compiler.
    #[inline(always)]
    unsafe fn part_of_block<S: Simd, const M: usize, const ALL: bool>(
        &self,
        tile: &Tile<T>,
        start: usize,
        end: usize,
        row: usize,
    ) {
        let (start, end) = if ALL { (0, GROUPS) } else { (start, end) };
        if S::TILE_ROWS >= 8 && end - start == GROUPS {
            self.score::<S, M, GROUPS>(tile, 0, row);
        } else {
            for group in start..end {
                self.score::<S, M, 1>(tile, group, row);
            }
        }
        let mut factors = [S::splat(1.0); M];
        for (m, factor) in factors.iter_mut().enumerate() {
            *factor = self.softmax::<S, ALL>(tile, start, end, m, row + m);
        }
        let vectors = self.layer.width_padded / LANES;
        let mut vector = 0;
        while vector < vectors {
            vector += if S::TILE_ROWS >= 8 && vectors - vector >= 4 {
                self.weigh::<S, M, 4>(tile, start, end, row, vector, factors)
            } else {
                self.weigh::<S, M, 1>(tile, start, end, row, vector, factors)
            };
        }
    }

    /// `q . k` of some rows with some groups.
    #[inline(always)]
    unsafe fn score<S: Simd, const M: usize, const N: usize>(
        &self,
        tile: &Tile<T>,
        group: usize,
        row: usize,
    ) {
        let mut sums = [[S::splat(0.0); N]; M];
        let (q, stride) = (self.query(row), self.layer.width_padded * 4);
        for pair in 0..self.layer.width.div_ceil(2) {
            let q = q.add(pair * 2 * Self::factor_bytes::<S>());
            T::products::<S, M, N>(
                &mut sums,
                std::array::from_fn(|n| tile.keys[group + n].wrapping_add(pair * PAIR)),
                std::array::from_fn(|m| q.wrapping_add(m * stride).cast_const()),
            );
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                S::store(
                    self.scratch.part(Part::Scores, m * TILE + (group + n) * LANES),
                    sum,
                );
            }
        }
    }

    /// Turns a row of a tile's scores into weights against the row's running maximum; what it gives back is what the
    /// row's earlier sums and results have to be multiplied with. Scores are powers of two from here on.
    #[inline(always)]
    unsafe fn softmax<S: Simd, const ALL: bool>(
        &self,
        tile: &Tile<T>,
        start: usize,
        end: usize,
        m: usize,
        row: usize,
    ) -> S::F {
        let seen = self.visible(row / self.heads);
        let mut scores = [S::splat(LOWEST); GROUPS];
        let mut largest = S::splat(LOWEST);
        for (g, kept) in scores.iter_mut().enumerate() {
            if !ALL && !(start..end).contains(&g) {
                continue;
            }
            let mut score = S::load(self.scratch.part(Part::Scores, m * TILE + g * LANES));
            if T::SCALED {
                score = S::mul(score, S::load(tile.key_scales[g]));
            }
            score = self.power::<S>(score);
            if !ALL {
                score = tile.seen::<S>(&seen, g, score);
            }
            largest = S::max(largest, score);
            *kept = score;
        }
        let maximum = self.scratch.part(Part::Maxima, row);
        // 2^0 is exactly 1, so this only saves time.
        let mut factor = S::splat(1.0);
        if S::any_above(largest, *maximum) {
            let before = *maximum;
            *maximum = S::max_lane(largest);
            factor = exp2_below_1::<S>(S::splat(before - *maximum));
        }
        let sums = self.scratch.part(Part::Sums, row * LANES);
        let mut sum = S::mul(S::load(sums), factor);
        let weights = self.scratch.part(Part::Weights, 0);
        for (g, &score) in scores.iter().enumerate() {
            if !ALL && !(start..end).contains(&g) {
                continue;
            }
            let mut weight = exp2_below_1::<S>(S::sub(score, S::splat(*maximum)));
            sum = S::add(sum, weight);
            if T::SCALED {
                weight = S::mul(weight, S::load(tile.value_scales[g]));
            }
            let at = m * TILE + g * LANES;
            if T::products_in_bf16::<S>() {
                S::store_bf16(weights.cast::<u16>().add(at), weight);
            } else {
                S::store(weights.add(at), weight);
            }
        }
        S::store(sums, sum);
        factor
    }

    /// The power of two a score's weight is.
    #[inline(always)]
    pub(super) unsafe fn power<S: Simd>(&self, score: S::F) -> S::F {
        let Some(cap) = self.spec.soft_cap else {
            return S::mul(score, S::splat(self.spec.scale * LOG2_E));
        };
        let score = S::mul(score, S::splat(self.spec.scale));
        S::mul(tanh::<S>(S::div(score, S::splat(cap))), S::splat(cap * LOG2_E))
    }

    /// Adds a tile's weighted values to some rows' results, `16 * N` elements from `vector` on.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const M: usize, const N: usize>(
        &self,
        tile: &Tile<T>,
        start: usize,
        end: usize,
        row: usize,
        vector: usize,
        factors: [S::F; M],
    ) -> usize {
        let width = self.layer.width_padded;
        let result = |m: usize, n: usize| {
            self.scratch
                .part(Part::Results, (row + m) * width + (vector + n) * LANES)
        };
        let mut sums = [[S::splat(0.0); N]; M];
        for (m, (sums, factor)) in sums.iter_mut().zip(factors).enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load(result(m, n)), factor);
            }
        }
        let bytes = Self::factor_bytes::<S>();
        let weights = self.scratch.part(Part::Weights, 0).cast::<u8>();
        for g in start..end {
            let values = tile.values[g].wrapping_add(vector * PAIR);
            let weights = weights.add(g * LANES * bytes);
            for pair in 0..LANES / 2 {
                let values = values.wrapping_add(pair * self.layer.value_stride());
                T::products::<S, M, N>(
                    &mut sums,
                    std::array::from_fn(|n| values.wrapping_add(n * PAIR)),
                    std::array::from_fn(|m| weights.wrapping_add((m * TILE + 2 * pair) * bytes).cast_const()),
                );
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                S::store(result(m, n), sum);
            }
        }
        N
    }
}

/// To about 1e-7 absolutely.
#[inline(always)]
unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    let (one, two) = (S::splat(1.0), S::splat(2.0));
    S::sub(one, S::div(two, S::add(exp::<S>(S::mul(x, two)), one)))
}
