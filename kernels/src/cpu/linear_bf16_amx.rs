//! Linear maps on bf16 tiles of AMX: two tiles of 16 rows by two panels of 16 outputs, all columns summed in tiles. A row's
//! result does not depend on the others, so that one row takes the same way as hundreds.
//!
//! Weights in bf16 lie as tiles want them; quantized ones are rounded to bf16 panel by panel, and all rows pass what was
//! made.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of linear_bf16_amx"
)]

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::amx::{Bf16Operands, Configured, Strided, TILE_ROWS, product_bf16};
use super::linear::{BLOCK, Gated, LinearOut, TileRoom, fetch_next};
use super::linear_integer::Quantized;
use super::memory::LINE_BYTES;
use super::rough::roughly_activated;
use super::simd::Simd as _;
use super::simd_avx512::Avx512;
use super::split_rows::{Halves, SplitRows};
use super::weights::{LANES, Matrix};

type S = Avx512<true>;

/// Bytes of a block of 16 outputs: 16 lines of two columns.
const BLOCK_BYTES: usize = BLOCK * LANES * size_of::<u16>();

/// Weights that tiles can be made of.
pub(crate) trait Tiled {
    /// Panel `panel` as tiles want it: where it lies, or in `room`.
    ///
    /// # Safety
    /// The matrix is of this format; `room` has [`BLOCK_BYTES`] for each block of the matrix, and nobody else uses it.
    unsafe fn panel(matrix: &Matrix, panel: usize, room: *mut u8) -> *const u8;
}

/// Weights stored in bf16.
pub(crate) struct Stored;

impl Tiled for Stored {
    #[inline(always)]
    unsafe fn panel(matrix: &Matrix, panel: usize, _room: *mut u8) -> *const u8 {
        matrix.panel(panel)
    }
}

/// Quantized weights, rounded.
pub(crate) struct Rounded<F>(PhantomData<F>);

impl<F: Quantized> Tiled for Rounded<F> {
    #[inline(always)]
    unsafe fn panel(matrix: &Matrix, panel: usize, room: *mut u8) -> *const u8 {
        let w = matrix.panel(panel);
        for block in 0..matrix.width / BLOCK {
            fetch_next::<S>(matrix, w, block);
            round::<F>(w, block, room.add(BLOCK_BYTES * block));
        }
        room
    }
}

/// Two tiles of rows by two panels.
#[repr(C, align(64))]
struct Results([[[f32; LANES]; 2]; ROWS]);

/// Rows multiplied at once.
const ROWS: usize = 2 * TILE_ROWS;

/// A product of two panels, of one matrix or of two.
struct Pair<'a> {
    rows: Range<usize>,
    x: SplitRows,
    /// For each step 16 lines.
    w: [*const u8; 2],
    results: &'a mut MaybeUninit<Results>,
}

impl Pair<'_> {
    /// The products that have all rows: each one's first row, its tiles of rows, and those of its rows that are asked for.
    #[inline(always)]
    fn products(&self) -> impl Iterator<Item = (usize, usize, Range<usize>)> + use<> {
        let rows = self.rows.clone();
        (rows.start / TILE_ROWS * TILE_ROWS..rows.end)
            .step_by(ROWS)
            .map(move |row| {
                let tiles = (rows.end - row).div_ceil(TILE_ROWS).min(2);
                (row, tiles, rows.start.max(row)..rows.end.min(row + ROWS))
            })
    }

    /// The sums of the rows of one or two tiles from `row` on to `to`.
    #[inline(always)]
    unsafe fn product(&self, row: usize, row_tiles: usize, add: bool, to: Strided) {
        let operands = Bf16Operands {
            steps: self.x.blocks,
            x: [
                self.x.tile(row, 0),
                self.x.tile(row + (row_tiles - 1) * TILE_ROWS, 0),
            ]
            .map(<*mut u16>::cast_const),
            w: self.w,
        };
        product_bf16(row_tiles, self.x.halves == Halves::Both, add, operands, to);
    }

    /// Room for the sums of 32 rows, each of which has 32.
    #[inline(always)]
    fn room(&mut self) -> Strided {
        Strided::new(self.results.as_mut_ptr().cast(), size_of::<[[f32; LANES]; 2]>())
    }
}

/// Computes the outputs of `panels` for the rows `rows`. What is added to begins the sums.
///
/// # Safety
/// As for [`linear`](super::linear::linear), of a matrix in format `W`; this process can execute AMX, AVX-512 F, BW, VL, DQ,
/// VNNI and BF16; nobody else configures this thread's tiles or uses `room`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn linear_bf16_amx<W: Tiled>(
    matrix: &Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    x: SplitRows,
    room: TileRoom,
    out: LinearOut,
) {
    let _tiles = Configured::new(LINE_BYTES);
    let mut results = MaybeUninit::uninit();
    for panel in panels.clone().step_by(2) {
        let outputs = (panel * LANES)..matrix.rows.min((panels.end * LANES).min((panel + 2) * LANES));
        let first = W::panel(matrix, panel, room.0);
        let second = if outputs.len() > LANES {
            W::panel(matrix, panel + 1, room.0.add(BLOCK_BYTES * x.blocks))
        } else {
            first
        };
        let mut pair = Pair {
            rows: rows.clone(),
            x,
            w: [first, second],
            results: &mut results,
        };
        for (row, row_tiles, asked) in pair.products() {
            let to = out
                .rect
                .base
                .add(row * out.rect.stride + out.column + outputs.start);
            if asked.len() == row_tiles * TILE_ROWS && outputs.len() == 2 * LANES && out.bias.is_none() {
                let to = Strided::new(to.cast(), out.rect.stride * size_of::<f32>());
                pair.product(row, row_tiles, out.accumulate, to);
                continue;
            }
            let room = pair.room();
            if out.accumulate {
                let _ = pair.results.write(Results([[[0.0; LANES]; 2]; ROWS]));
                for r in asked.clone() {
                    let from = out
                        .rect
                        .base
                        .add(r * out.rect.stride + out.column + outputs.start);
                    std::ptr::copy_nonoverlapping(from, room.row(r - row).cast(), outputs.len());
                }
            }
            pair.product(row, row_tiles, out.accumulate, room);
            for r in asked {
                let sums = room.row(r - row).cast::<f32>();
                for (i, bias) in outputs
                    .clone()
                    .enumerate()
                    .filter_map(|(i, o)| Some((i, out.bias?.add(o))))
                {
                    *sums.add(i) += *bias;
                }
                let to = out
                    .rect
                    .base
                    .add(r * out.rect.stride + out.column + outputs.start);
                std::ptr::copy_nonoverlapping(sums, to, outputs.len());
            }
        }
    }
}

/// Computes the outputs of `panels` of both maps for the rows `rows`, and their gated activation.
///
/// # Safety
/// As for [`linear_bf16_amx`] and [`linear_gated`](super::linear::linear_gated), of matrices in format `W`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn gated_bf16_amx<W: Tiled>(
    gated: &Gated<'_>,
    panels: Range<usize>,
    rows: Range<usize>,
    x: SplitRows,
    room: TileRoom,
) {
    let _tiles = Configured::new(LINE_BYTES);
    let mut results = MaybeUninit::uninit();
    for panel in panels {
        let gate = W::panel(gated.gate, panel, room.0);
        let up = W::panel(gated.up, panel, room.0.add(BLOCK_BYTES * x.blocks));
        let mut pair = Pair {
            rows: rows.clone(),
            x,
            w: [gate, up],
            results: &mut results,
        };
        let first = panel * LANES;
        let biases = gated.bias.map(|bias| {
            [
                S::load(bias.add(first)),
                S::load(bias.add(gated.gate.rows + first)),
            ]
        });
        for (row, row_tiles, asked) in pair.products() {
            let room = pair.room();
            pair.product(row, row_tiles, false, room);
            for r in asked {
                let sums = room.row(r - row).cast::<f32>();
                let mut values = [S::load(sums), S::load(sums.add(LANES))];
                if let Some(biases) = biases {
                    values = [S::add(values[0], biases[0]), S::add(values[1], biases[1])];
                }
                let value = S::mul(roughly_activated(gated.function, values[0]), values[1]);
                let to = gated
                    .out
                    .tile(r, first / BLOCK)
                    .add(r % TILE_ROWS * BLOCK + first % BLOCK);
                S::store_bf16(to, value);
            }
        }
    }
}

/// A block's weights `d (code + offset) + m` in bf16, two columns of 16 outputs in each of 16 lines.
///
/// A code is put into the mantissa of 256, which makes it the number 256 + code without a conversion; `m` is lessened by as
/// much. What that loses of `m`, 2^-16 of `d`, is far below bf16's rounding.
#[inline(always)]
unsafe fn round<F: Quantized>(w: *const u8, block: usize, to: *mut u8) {
    /// The bits of 256 in f32, and those of its mantissa a byte goes to.
    const BASE: i32 = 0x4380_0000;
    const CODE: i32 = 0x007f_8000;
    // Two vectors, one after the other, to pairs.
    let pairs: [u16; BLOCK] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
    let pairs = _mm512_loadu_si512(pairs.as_ptr().cast());
    let numbers = F::numbers::<S>(w, block);
    let shift = S::splat(f32::from(F::OFFSET) - 256.0);
    let minimum = numbers.d.map(|d| {
        let moved = S::mul(d, shift);
        if F::MINIMUM {
            S::add(numbers.m, moved)
        } else {
            moved
        }
    });
    for (c, codes) in F::codes::<S>(w, block).into_iter().enumerate() {
        let half = usize::from(F::HALVES && c >= 4);
        let number = |moved: __m512i| {
            // (moved & CODE) | BASE
            let bits =
                _mm512_ternarylogic_epi32::<0xea>(moved, _mm512_set1_epi32(CODE), _mm512_set1_epi32(BASE));
            S::fma(numbers.d[half], _mm512_castsi512_ps(bits), minimum[half])
        };
        let columns = [
            number(_mm512_slli_epi32::<15>(codes)),
            number(_mm512_slli_epi32::<7>(codes)),
            number(_mm512_srli_epi32::<1>(codes)),
            number(_mm512_srli_epi32::<9>(codes)),
        ];
        for at in 0..2 {
            let rounded = _mm512_cvtne2ps_pbh(columns[2 * at + 1], columns[2 * at]);
            // SAFETY: the same 64 bytes under another name.
            let rounded = std::mem::transmute::<__m512bh, __m512i>(rounded);
            let line = _mm512_permutexvar_epi16(pairs, rounded);
            _mm512_store_si512(to.add(LINE_BYTES * (2 * c + at)).cast(), line);
        }
    }
}
