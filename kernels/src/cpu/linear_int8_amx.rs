//! Integer linear maps of many output rows on AMX (other rows are rounded to bf16 if there are many): tiles of 16 rows by 16
//! outputs, one block of 32 columns at a time, since each block has scales of its own. Same integers as the vector kernels',
//! put together by the same formula: the same bits.
//!
//! A panel's codes are unpacked once, as signed bytes in the order tiles want (which is the panel's own), and all rows pass
//! it. Products run some blocks ahead of the vector code that scales their results, so that both units are busy.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of linear_int8_amx"
)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::amx::{Configured, TILE_RESULTS, TILE_ROWS, product_int8};
use super::linear::{BLOCK, LinearOut, TileRoom, fetch, finish};
use super::linear_integer::Quantized;
use super::memory::LINE_BYTES;
use super::quantize_rows::{EIGHT, QuantRows, QuantTile};
use super::simd::Simd as _;
use super::simd_avx512::Avx512;
use super::weights::{LANES, Matrix};

type S = Avx512<false>;

/// Fewer rows than this go to the vector kernel. A tile costs what 16 rows do, however many there are; by a count of
/// instructions the vector kernel takes as long for about 8 rows; 16 are little faster in tiles on a Sapphire Rapids.
const ROWS_MIN: usize = 12;
/// Bytes of a block of 16 outputs, unpacked.
const BLOCK_BYTES: usize = BLOCK * LANES;
/// Blocks whose products are made together, while the results of those before are scaled.
const TOGETHER: usize = 2;

/// How many of `rows` rows are for tiles; the vector kernel is faster for the rest.
pub(crate) const fn rows_in_tiles(rows: usize) -> usize {
    if rows % TILE_ROWS >= ROWS_MIN {
        rows
    } else {
        rows - rows % TILE_ROWS
    }
}

/// Results of the products of [`TOGETHER`] blocks.
#[repr(C, align(64))]
struct Results {
    /// By block: one tile, or two where each 16 columns have a scale.
    coarse: [[[i32; TILE_RESULTS]; 2]; TOGETHER],
    /// The same for blocks of which a row has fine codes.
    fine: [[[i32; TILE_RESULTS]; 2]; TOGETHER],
}

/// Computes the outputs of `panels` for the rows `rows`, the first of which is a multiple of 16.
///
/// # Safety
/// As for [`linear`](super::linear::linear); this process can execute AMX, AVX-512 F, BW, VL, DQ and VNNI; nobody else
/// configures this thread's tiles or uses `room`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn linear_int8_amx<F: Quantized>(
    matrix: &Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    x: QuantRows,
    room: TileRoom,
    out: LinearOut,
) {
    let _tiles = Configured::new(BLOCK / parts::<F>());
    let blocks = matrix.width / BLOCK;
    for panel in panels {
        let w = matrix.panel(panel);
        let (next, bytes) = (
            w.wrapping_add(matrix.panel_bytes),
            matrix.panel_bytes / blocks.max(1),
        );
        for block in 0..blocks {
            fetch::<S>(next.wrapping_add(block * bytes), bytes);
            unpack::<F>(w, block, room.0.add(BLOCK_BYTES * block));
        }
        for row in rows.clone().step_by(TILE_ROWS) {
            let sums = tile::<F>(w, room.0, &x, row, blocks);
            for (r, sum) in sums.iter().enumerate().take(rows.end - row) {
                finish::<S>(matrix, &out, *sum, panel, row + r);
            }
        }
    }
}

/// Products a block takes.
const fn parts<F: Quantized>() -> usize {
    if F::HALVES { 2 } else { 1 }
}

/// A block's codes as signed bytes.
#[inline(always)]
unsafe fn unpack<F: Quantized>(w: *const u8, block: usize, to: *mut u8) {
    for (c, code) in F::codes::<S>(w, block).into_iter().enumerate() {
        let signed = _mm512_add_epi8(code, _mm512_set1_epi8(F::OFFSET));
        _mm512_store_si512(to.add(LINE_BYTES * c).cast(), signed);
    }
}

/// 16 rows of 16 outputs.
#[inline(always)]
unsafe fn tile<F: Quantized>(
    w: *const u8,
    codes: *const u8,
    x: &QuantRows,
    row: usize,
    blocks: usize,
) -> [__m512; TILE_ROWS] {
    let mut results = [const { MaybeUninit::<Results>::uninit() }; 2];
    let mut sums = [S::splat(0.0); TILE_ROWS];
    multiply::<F>(codes, x, row, 0..TOGETHER.min(blocks), results[0].as_mut_ptr());
    for (at, first) in (0..blocks).step_by(TOGETHER).enumerate() {
        let next = blocks.min(first + TOGETHER);
        let ahead = next..blocks.min(next + TOGETHER);
        multiply::<F>(codes, x, row, ahead, results[(at + 1) % 2].as_mut_ptr());
        for block in first..next {
            let made = results[at % 2].as_ptr();
            let (coarse, fine) = (
                &raw const (*made).coarse[block - first],
                &raw const (*made).fine[block - first],
            );
            let x = &*x.tile(row, block).cast_const();
            scale::<F>(w, block, x, [coarse.cast(), fine.cast()], &mut sums);
        }
    }
    sums
}

/// Makes the products of some blocks, at most [`TOGETHER`].
#[inline(always)]
unsafe fn multiply<F: Quantized>(
    codes: *const u8,
    x: &QuantRows,
    row: usize,
    blocks: Range<usize>,
    to: *mut Results,
) {
    for (at, block) in blocks.enumerate() {
        let x = &*x.tile(row, block).cast_const();
        for part in 0..parts::<F>() {
            let column = BLOCK / 2 * part;
            let w = codes.add(BLOCK_BYTES * block + LANES * column);
            let slot = parts::<F>() * at + part;
            let from = x.codes.as_ptr().cast::<i8>().add(column);
            product_int8(slot, from, BLOCK, w, (&raw mut (*to).coarse[at][part]).cast());
            if x.is_fine() {
                let from = x.fine.as_ptr().cast::<i8>().add(column);
                product_int8(slot ^ 1, from, BLOCK, w, (&raw mut (*to).fine[at][part]).cast());
            }
        }
    }
}

/// Adds a block's scaled results, coarse and fine, to the sums. Rows without fine codes have zeros there, which change
/// nothing: to skip them would be a loop that keeps the sums out of registers.
#[inline(always)]
unsafe fn scale<F: Quantized>(
    w: *const u8,
    block: usize,
    x: &QuantTile,
    [coarse, fine]: [*const i32; 2],
    sums: &mut [__m512; TILE_ROWS],
) {
    let numbers = F::numbers::<S>(w, block);
    for (r, sum) in sums.iter_mut().enumerate() {
        let of = &x.numbers[r / EIGHT];
        let dots = dots::<F>(coarse, r);
        *sum = numbers.coarse::<F>(dots, of.scales[r % EIGHT], of.sums[r % EIGHT], *sum);
    }
    if !x.is_fine() {
        return;
    }
    for (r, sum) in sums.iter_mut().enumerate() {
        let scale = x.numbers[r / EIGHT].scales[r % EIGHT];
        *sum = numbers.fine::<F>(dots::<F>(fine, r), scale, *sum);
    }
}

/// Row `r` of a block's results in f32: its first part and, where there are two, its second.
#[inline(always)]
unsafe fn dots<F: Quantized>(results: *const i32, r: usize) -> [__m512; 2] {
    let first = row_of(results, r);
    if F::HALVES {
        return [first, row_of(results.add(TILE_RESULTS), r)];
    }
    [first; 2]
}

#[inline(always)]
unsafe fn row_of(results: *const i32, r: usize) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_load_si512(results.add(LANES * r).cast()))
}
