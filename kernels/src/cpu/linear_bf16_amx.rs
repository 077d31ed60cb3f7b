//! Linear maps on bf16 tiles of AMX: two tiles of 16 rows by two panels of 16 outputs, all columns summed in tiles. A row's
//! result does not depend on the others, so that one row takes the same way as hundreds.
//!
//! Weights in bf16 lie as tiles want them; quantized ones are rounded to bf16 panel by panel, and all rows pass what was
//! made. Few rows pass a few blocks of columns at a time.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of linear_bf16_amx"
)]

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::amx::{
    Bf16Operands, Configured, Strided, TILE_ROWS, add_bf16, begin_bf16, fetch_to_write, store_bf16,
};
use super::linear::{BLOCK, Gated, LinearOut, TileRoom};
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
    /// Whether they lie as tiles want them.
    const STORED: bool;

    /// Blocks `blocks` of panel `panel` as tiles want them: where they lie, or in `room`.
    ///
    /// # Safety
    /// The matrix is of this format and has these blocks; `room` has [`BLOCK_BYTES`] for each of them, and nobody else uses it.
    unsafe fn blocks(matrix: &Matrix, panel: usize, blocks: Range<usize>, room: *mut u8) -> *const u8;
}

/// Weights stored in bf16.
pub(crate) struct Stored;

impl Tiled for Stored {
    const STORED: bool = true;

    #[inline(always)]
    unsafe fn blocks(matrix: &Matrix, panel: usize, blocks: Range<usize>, _room: *mut u8) -> *const u8 {
        matrix.panel(panel).add(BLOCK_BYTES * blocks.start)
    }
}

/// Quantized weights, rounded.
pub(crate) struct Rounded<F>(PhantomData<F>);

impl<F: Quantized> Tiled for Rounded<F> {
    const STORED: bool = false;

    #[inline(always)]
    unsafe fn blocks(matrix: &Matrix, panel: usize, blocks: Range<usize>, room: *mut u8) -> *const u8 {
        let w = matrix.panel(panel);
        let (next, bytes) = (
            w.wrapping_add(matrix.panel_bytes),
            matrix.panel_bytes / (matrix.width / BLOCK).max(1),
        );
        for (at, block) in blocks.enumerate() {
            // The next panel's: from memory it takes longer than this block does.
            for line in (0..bytes).step_by(LINE_BYTES) {
                S::prefetch(next.wrapping_add(block * bytes + line));
            }
            round::<F>(w, block, room.add(BLOCK_BYTES * at));
        }
        room
    }
}

/// Two tiles of rows by two panels.
#[repr(C, align(64))]
struct Results([[[f32; LANES]; 2]; ROWS]);

/// Rows multiplied at once.
const ROWS: usize = 2 * TILE_ROWS;
/// Blocks that are made and multiplied together if no more rows than that pass them: vectors make the next ones while tiles are
/// multiplied, and what was made is still in the first cache (0.8 x the time of all blocks first for 16 rows, by a bench of the
/// loop on a Sapphire Rapids; 3 take as long as 2, and 9 as long as all or longer).
const TOGETHER: usize = 2;

/// A product of two panels, of one matrix or of two.
struct Pair<'a, W> {
    rows: Range<usize>,
    x: SplitRows,
    panels: [(&'a Matrix, usize); 2],
    room: TileRoom,
    /// All blocks of both panels, if several products need them.
    made: Option<[*const u8; 2]>,
    results: &'a mut MaybeUninit<Results>,
    format: PhantomData<W>,
}

impl<'a, W: Tiled> Pair<'a, W> {
    #[inline(always)]
    unsafe fn new(
        rows: Range<usize>,
        x: SplitRows,
        panels: [(&'a Matrix, usize); 2],
        room: TileRoom,
        results: &'a mut MaybeUninit<Results>,
    ) -> Self {
        let mut pair = Self {
            rows,
            x,
            panels,
            room,
            made: None,
            results,
            format: PhantomData,
        };
        if W::STORED || pair.products().nth(1).is_some() {
            pair.made = Some(pair.blocks(0..x.blocks));
        }
        pair
    }

    /// Some blocks of both panels.
    #[inline(always)]
    unsafe fn blocks(&self, blocks: Range<usize>) -> [*const u8; 2] {
        let [(first, at), (second, next)] = self.panels;
        let made = W::blocks(first, at, blocks.clone(), self.room.0);
        if std::ptr::eq(first, second) && at == next {
            return [made; 2];
        }
        let room = self.room.0.add(BLOCK_BYTES * blocks.len());
        [made, W::blocks(second, next, blocks, room)]
    }

    /// The products that have all rows: each one's first row, its tiles of rows, and those of its rows that are asked for.
    #[inline(always)]
    fn products(&self) -> impl Iterator<Item = (usize, usize, Range<usize>)> + use<W> {
        let rows = self.rows.clone();
        // Rows with lower halves are seldom more than one tile.
        let most = match self.x.halves {
            Halves::Both => TILE_ROWS,
            Halves::Upper => ROWS,
        };
        (rows.start / TILE_ROWS * TILE_ROWS..rows.end)
            .step_by(most)
            .map(move |row| {
                let tiles = (rows.end - row).min(most).div_ceil(TILE_ROWS);
                (row, tiles, rows.start.max(row)..rows.end.min(row + most))
            })
    }

    /// The sums of the rows of one or two tiles from `row` on to `to`; with `add`, they begin with what is there.
    #[inline(always)]
    unsafe fn product(&self, row: usize, row_tiles: usize, add: bool, to: Strided) {
        begin_bf16(row_tiles, add.then_some(to));
        if !add {
            // Tiles are stored at once, too fast for lines that have to come from further away.
            for row in 0..row_tiles * TILE_ROWS {
                fetch_to_write(to.row(row));
                fetch_to_write(to.row(row).wrapping_add(LINE_BYTES));
            }
        }
        if let Some(w) = self.made {
            self.add(row, row_tiles, 0..self.x.blocks, w);
        } else {
            for first in (0..self.x.blocks).step_by(TOGETHER) {
                let blocks = first..self.x.blocks.min(first + TOGETHER);
                self.add(row, row_tiles, blocks.clone(), self.blocks(blocks));
            }
        }
        store_bf16(row_tiles, to);
    }

    /// Adds the products of some blocks to the sums that were begun.
    #[inline(always)]
    unsafe fn add(&self, row: usize, row_tiles: usize, blocks: Range<usize>, w: [*const u8; 2]) {
        let last = row + (row_tiles - 1) * TILE_ROWS;
        let operands = Bf16Operands {
            steps: blocks.len(),
            x: [self.x.tile(row, blocks.start), self.x.tile(last, blocks.start)].map(<*mut u16>::cast_const),
            w,
        };
        add_bf16(row_tiles, self.x.halves == Halves::Both, operands);
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
    let _tiles = Configured::new();
    let mut results = MaybeUninit::uninit();
    for panel in panels.clone().step_by(2) {
        let outputs = (panel * LANES)..matrix.rows.min((panels.end * LANES).min((panel + 2) * LANES));
        let second = if outputs.len() > LANES { panel + 1 } else { panel };
        let panels = [(matrix, panel), (matrix, second)];
        let mut pair = Pair::<W>::new(rows.clone(), x, panels, room, &mut results);
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
    let _tiles = Configured::new();
    let mut results = MaybeUninit::uninit();
    for panel in panels {
        let both = [(gated.gate, panel), (gated.up, panel)];
        let mut pair = Pair::<W>::new(rows.clone(), x, both, room, &mut results);
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
