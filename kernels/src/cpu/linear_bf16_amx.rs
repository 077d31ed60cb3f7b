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
use super::linear::{BLOCK, Gated, LinearOut, TileRoom, fetch};
use super::linear_integer::{Numbers, Quantized};
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
        let (w, blocks) = (matrix.panel(panel), matrix.width / BLOCK);
        let (next, bytes) = (
            w.wrapping_add(matrix.panel_bytes),
            matrix.panel_bytes / blocks.max(1),
        );
        for block in 0..blocks {
            fetch::<S>(next.wrapping_add(block * bytes), bytes);
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
#[inline(always)]
unsafe fn round<F: Quantized>(w: *const u8, block: usize, to: *mut u8) {
    let Numbers { d, m } = F::numbers::<S>(w, block);
    let m = if F::MINIMUM { m } else { S::splat(0.0) };
    if let Some(lines) = F::nibbles(w, block) {
        round_nibbles(lines, d, m, f32::from(F::OFFSET), to);
        return;
    }
    for (c, codes) in F::codes::<S>(w, block).into_iter().enumerate() {
        let d = d[usize::from(F::HALVES && c >= 4)];
        let m = S::fma(d, S::splat(f32::from(F::OFFSET)), m);
        let columns = [
            number::<15, 0xff>(_mm512_slli_epi32::<15>(codes), d, m),
            number::<15, 0xff>(_mm512_slli_epi32::<7>(codes), d, m),
            number::<15, 0xff>(_mm512_srli_epi32::<1>(codes), d, m),
            number::<15, 0xff>(_mm512_srli_epi32::<9>(codes), d, m),
        ];
        for at in 0..2 {
            let line = pairs(columns[2 * at], columns[2 * at + 1]);
            _mm512_store_si512(to.add(LINE_BYTES * (2 * c + at)).cast(), line);
        }
    }
}

/// [`round`] of four lines of nibbles. One byte has its low nibble, and the next its high one, where numbers want codes; a
/// shuffle brings two more there.
#[inline(always)]
unsafe fn round_nibbles(lines: *const u8, d: [__m512; 2], m: __m512, offset: f32, to: *mut u8) {
    let m = [
        S::fma(d[0], S::splat(offset), m),
        S::fma(d[1], S::splat(offset), m),
    ];
    // Which byte of each lane goes to its second, whose high nibble is a code, and to its third, whose low one is.
    let shuffle = |second: i32, third: i32| {
        let lanes = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
        _mm512_add_epi32(lanes, _mm512_set1_epi32(second << 8 | third << 16))
    };
    let (firsts, middles, lasts) = (shuffle(0, 0), shuffle(2, 1), shuffle(3, 3));
    for h in 0..4 {
        let codes = _mm512_load_si512(lines.add(LINE_BYTES * h).cast());
        let first = _mm512_shuffle_epi8(codes, firsts);
        let middle = _mm512_shuffle_epi8(codes, middles);
        let last = _mm512_shuffle_epi8(codes, lasts);
        let low = [
            number::<16, 0xf>(first, d[0], m[0]),
            number::<16, 0xf>(middle, d[0], m[0]),
            number::<16, 0xf>(codes, d[0], m[0]),
            number::<16, 0xf>(last, d[0], m[0]),
        ];
        let high = [
            number::<12, 0xf>(first, d[1], m[1]),
            number::<12, 0xf>(codes, d[1], m[1]),
            number::<12, 0xf>(middle, d[1], m[1]),
            number::<12, 0xf>(last, d[1], m[1]),
        ];
        for at in 0..2 {
            let (low, high) = (
                pairs(low[2 * at], low[2 * at + 1]),
                pairs(high[2 * at], high[2 * at + 1]),
            );
            _mm512_store_si512(to.add(LINE_BYTES * (2 * h + at)).cast(), low);
            _mm512_store_si512(to.add(LINE_BYTES * (2 * h + at + 8)).cast(), high);
        }
    }
}

/// `d code + m` of codes of bits `BITS` from bit `AT` on, all of them below bit 23; the upper half is the number in bf16.
///
/// A code is put into the mantissa of `2^(23 - AT)`, which makes it the number `2^(23 - AT) + code` without a conversion; `m`
/// is lessened by as much. What that loses of `m`, at most 2^-12 of `d`, is far below bf16's rounding, which is to nearest,
/// halves away from zero: in integers it takes less time than the instruction for it and the permutation its results need.
#[inline(always)]
unsafe fn number<const AT: u32, const BITS: i32>(codes: __m512i, d: __m512, m: __m512) -> __m512i {
    let one = (1_u32 << (23 - AT)) as f32;
    let less = S::fma(d, S::splat(-one), m);
    // (codes & BITS) | one
    let bits = _mm512_ternarylogic_epi32::<0xea>(
        codes,
        _mm512_set1_epi32(BITS << AT),
        _mm512_set1_epi32(one.to_bits().cast_signed()),
    );
    let number = S::fma(d, _mm512_castsi512_ps(bits), less);
    _mm512_add_epi32(_mm512_castps_si512(number), _mm512_set1_epi32(0x8000))
}

/// The upper halves of two columns in pairs.
#[inline(always)]
unsafe fn pairs(first: __m512i, second: __m512i) -> __m512i {
    // (second & UPPER) | (first >> 16 & !UPPER)
    const UPPER: i32 = -0x1_0000;
    let first = _mm512_srli_epi32::<16>(first);
    _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(UPPER), second, first)
}
