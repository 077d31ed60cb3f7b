//! Linear maps of bf16 weights on AMX: two tiles of 16 rows by two panels of 16 outputs, all columns summed in tiles. A
//! row's result does not depend on the others, so that one row takes the same way as hundreds.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of linear_bf16_amx"
)]

use std::mem::MaybeUninit;
use std::ops::Range;

use super::amx::{Bf16Operands, Configured, TILE_RESULTS, TILE_ROWS, product_bf16};
use super::linear::{LinearOut, finish};
use super::memory::LINE_BYTES;
use super::simd::Simd as _;
use super::simd_avx512::Avx512;
use super::split_rows::SplitRows;
use super::weights::{LANES, Matrix};

type S = Avx512<false>;

/// Two tiles of rows by two panels.
#[repr(C, align(64))]
struct Results([[[f32; TILE_RESULTS]; 2]; 2]);

/// Computes the outputs of `panels` for the rows `rows`, the first of which is a multiple of 16.
///
/// # Safety
/// As for [`linear`](super::linear::linear), of a matrix in bf16; this process can execute AMX, AVX-512 F, BW, VL, DQ and
/// VNNI, and nobody else configures this thread's tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn linear_bf16_amx(
    matrix: &Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    x: SplitRows,
    out: LinearOut,
) {
    let _tiles = Configured::new(LINE_BYTES);
    let mut results = MaybeUninit::<Results>::uninit();
    for panel in panels.clone().step_by(2) {
        let side_by_side = 2.min(panels.end - panel);
        for row in rows.clone().step_by(2 * TILE_ROWS) {
            let left = rows.end - row;
            let row_tiles = left.div_ceil(TILE_ROWS).min(2);
            let operands = Bf16Operands {
                steps: x.blocks,
                x: [x.tile(row, 0), x.tile(row + (row_tiles - 1) * TILE_ROWS, 0)].map(<*mut u16>::cast_const),
                w: [matrix.panel(panel), matrix.panel(panel + side_by_side - 1)],
            };
            product_bf16(row_tiles, operands, results.as_mut_ptr().cast());
            let sums = &*results.as_ptr();
            for r in 0..left.min(2 * TILE_ROWS) {
                for p in 0..side_by_side {
                    let sum = S::load(sums.0[r / TILE_ROWS][p].as_ptr().add(r % TILE_ROWS * LANES));
                    finish::<S>(matrix, &out, sum, panel + p, row + r);
                }
            }
        }
    }
}
