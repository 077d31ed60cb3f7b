//! Attention of prompts' rows on AMX, over keys and values in bf16: scores and weighted values of 16 rows are products of
//! tiles, in between is the softmax that vectors do everywhere. Tiles of 64 places, masks and the order of their sums are
//! those of `attention.rs`, so that here too a row's result does not depend on its neighbours.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Attend"
)]

use std::ops::Range;

use super::amx::{Configured, Strided, TILE_ROWS, add_weighted, scores};
use super::attention::{Attend, GROUPS, Part, TILE, Tile};
use super::kv_element::{KvElement, PAIR};
use super::simd::Simd as _;
use super::simd_avx512::Avx512;
use super::weights::LANES;

/// With queries and weights in bf16.
type S = Avx512<true>;

/// Elements of a head that a product of scores takes.
const STEP: usize = 32;

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
    let _tiles = Configured::for_attention();
    let seen = unit.groups(0..unit.tokens);
    for first_group in (seen.start / GROUPS * GROUPS..seen.end).step_by(GROUPS) {
        let tile = unit.tile(
            seen.start.max(first_group)..seen.end.min(first_group + GROUPS),
            first_group,
        );
        for row in (0..rows).step_by(TILE_ROWS) {
            unit.rows(&tile, first_group, row..rows.min(row + TILE_ROWS));
        }
    }
    unit.finish::<S>();
}

impl<T: KvElement> Attend<'_, T> {
    /// Up to 16 rows through the part of a tile that one of them sees.
    #[inline(always)]
    unsafe fn rows(&self, tile: &Tile<T>, first_group: usize, rows: Range<usize>) {
        let seen = self.groups(rows.start / self.heads..(rows.end - 1) / self.heads + 1);
        let start = seen.start.max(first_group) - first_group;
        let end = seen.end.min(first_group + GROUPS).saturating_sub(first_group);
        if start >= end {
            return;
        }
        let width = self.layer.width_padded;
        let q = Strided::new(self.query(rows.start), width * size_of::<f32>());
        for group in start..end {
            let to = self.scratch.part(Part::Scores, group * LANES);
            let to = Strided::new(to.cast(), TILE * size_of::<f32>());
            scores(group % 4, q, tile.keys[group].cast(), width / STEP, to);
        }
        if start == 0 && end == GROUPS && self.see_all(tile, rows.clone()) {
            self.weights::<true>(tile, 0..GROUPS, rows.clone());
        } else {
            self.weights::<false>(tile, start..end, rows.clone());
        }
        let weights = self.scratch.part(Part::Weights, 0).cast::<u16>();
        let weights = Strided::new(weights.add(start * LANES).cast(), TILE * size_of::<u16>());
        for vector in (0..width / LANES).step_by(2) {
            let values: [_; GROUPS] = tile
                .values
                .map(|values| values.wrapping_add(vector * PAIR).cast());
            let result = self
                .scratch
                .part(Part::Results, rows.start * width + vector * LANES);
            let result = Strided::new(result.cast(), width * size_of::<f32>());
            let stride = self.layer.value_stride() * size_of::<u16>();
            add_weighted(weights, &values[start..end], stride, result);
        }
    }

    /// The weights of some rows' scores; what the rows have summed so far is put in proportion to them.
    #[inline(always)]
    unsafe fn weights<const ALL: bool>(&self, tile: &Tile<T>, groups: Range<usize>, rows: Range<usize>) {
        let width = self.layer.width_padded;
        for row in rows.clone() {
            let maximum = self.scratch.part(Part::Maxima, row);
            let before = *maximum;
            let factor = self.softmax::<S, ALL>(tile, groups.start, groups.end, row - rows.start, row);
            if *maximum > before {
                for d in (0..width).step_by(LANES) {
                    let at = self.scratch.part(Part::Results, row * width + d);
                    S::store(at, S::mul(S::load(at), factor));
                }
            }
        }
    }
}
