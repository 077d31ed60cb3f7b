//! `out = x W^T`: the loop over panels and rows that every dtype shares. Knows no dtype: see `linear_*.rs`.
//!
//! Each output is summed over its columns in one fixed order, whichever tile it falls in: a row's result does
//! not depend on the other rows of the batch, nor on how many workers there are.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use std::ops::Range;

use galerne_core::dtype::DType;
use galerne_core::graph::Activation;

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::linear_bf16_amx::{Rounded, Stored, Tiled, gated_bf16_amx, linear_bf16_amx};
use super::linear_grouped::{GroupedExact, Q4K, Q5_0, Q5_1, Q5K, Q6K};
use super::linear_integer::Int8;
use super::linear_plain::{Bf16, F16, F32};
use super::linear_q4_0::{Q4_0, Q4_0Exact};
use super::linear_q4_1::{Q4_1, Q4_1Exact};
use super::linear_q8_0::{Q8_0, Q8_0Exact};
use super::memory::{LINE_BYTES, Rect};
use super::quantize_rows::QuantRows;
use super::simd::{Kernel, Simd, dispatch};
use super::split_rows::SplitRows;
use super::weights::{LANES, Matrix};

/// Columns in one step of the inner loop.
pub(crate) const BLOCK: usize = 32;
/// Panels that stay in cache while all rows pass. Each is read from end to end: one stream is what AMD's prefetchers like.
const PANELS: usize = 4;
/// Panels read side by side where several streams are faster than one: see [`Isa::reads_in_streams`].
pub(crate) const STREAMS: usize = 4;
/// Most rows for which they are: with more, products take longer than reading, and the sums of several panels no longer fit
/// the registers.
const STREAMED_ROWS_MAX: usize = 4;
/// How far ahead of each stream is fetched.
const AHEAD_BYTES: usize = 1024;

/// f32 activations in place.
#[derive(Clone, Copy)]
pub(crate) struct FloatRows {
    pub(crate) base: *const f32,
    pub(crate) stride: usize,
}

/// The dot products of one block of one panel.
///
/// # Safety
/// `w` points to a panel of the implementing dtype that has block `block`; `x` has the rows
/// `row .. row + M` and the `columns` columns from `BLOCK * block` on.
pub(crate) trait PanelDot {
    /// The activations.
    type X: Copy;

    /// Adds 16 outputs for each of `M` rows.
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &Self::X,
        row: usize,
        block: usize,
        columns: usize,
        sums: &mut [S::F; M],
    );
}

/// Where and how results go.
#[derive(Clone, Copy)]
pub(crate) struct LinearOut {
    /// Output rows.
    pub(crate) rect: Rect,
    /// Column of the matrix's first output.
    pub(crate) column: usize,
    /// Added, one per output of the matrix.
    pub(crate) bias: Option<*const f32>,
    /// Whether to add to what is there.
    pub(crate) accumulate: bool,
}

/// A worker's own room for the tiles of a linear map, aligned to cache lines: see `linear_bf16_amx`.
#[derive(Clone, Copy)]
pub(crate) struct TileRoom(pub(crate) *mut u8);

impl TileRoom {
    /// Bytes for two panels of `width` columns in bf16.
    pub(crate) const fn size_bytes(width: usize) -> usize {
        2 * width.next_multiple_of(BLOCK) * LANES * size_of::<u16>()
    }
}

/// Activations in all their forms; not those in f32 alone if the device's precision allows it.
#[derive(Clone, Copy)]
pub(crate) struct LinearIn {
    pub(crate) float: Rect,
    pub(crate) quant: Option<QuantRows>,
    /// Only for [`Isa::Amx`].
    pub(crate) split: Option<SplitRows>,
    /// Prompts' rows, and with many generated ones all, only for [`Isa::Amx`].
    pub(crate) rounded: Option<SplitRows>,
    /// The first row that is rounded, if `rounded` is there.
    pub(crate) prompts: usize,
    /// Without it tiles are not used for quantized weights.
    pub(crate) room: Option<TileRoom>,
}

/// Computes the outputs of `panels` for the rows `rows`, the first of which is a multiple of 16.
///
/// Rows that were rounded for that are multiplied in bf16, the others as integers or in f32: which of the two a row is
/// decides alone about the order and the rounding of its sums.
///
/// # Safety
/// `isa` is the machine's; `input` has rows of `matrix.width` columns that nobody writes, and room that nobody else uses,
/// enough for `matrix.width`; `out` has as many rows and the matrix's columns, and nobody else touches the columns of these panels in these rows.
pub(crate) unsafe fn linear(
    isa: Isa,
    matrix: &Matrix,
    panels: Range<usize>,
    mut rows: Range<usize>,
    input: LinearIn,
    out: LinearOut,
) {
    debug_assert!(out.column + matrix.rows <= out.rect.width && input.float.width == matrix.width);
    let float = FloatRows {
        base: input.float.base,
        stride: input.float.stride,
    };
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Amx, Some(x), Some(room)) = (isa, input.rounded, input.room)
        && is_tiled(matrix.dtype)
    {
        let prompts = rows.start.max(input.prompts)..rows.end;
        if !prompts.is_empty() {
            let job = TileJob {
                matrix,
                panels: panels.clone(),
                rows: prompts,
                x,
                room,
                out,
            };
            job.run();
        }
        rows.end = rows.end.min(input.prompts);
    }
    if rows.is_empty() {
        return;
    }
    if let Some(x) = input.quant {
        match matrix.dtype {
            DType::Q4_1 => return run::<Int8<Q4_1>>(isa, matrix, panels, rows, x, out),
            DType::Q4_0 => return run::<Int8<Q4_0>>(isa, matrix, panels, rows, x, out),
            DType::Q8_0 | DType::Iq4Nl => return run::<Int8<Q8_0>>(isa, matrix, panels, rows, x, out),
            DType::Q5_0 => return run::<Int8<Q5_0>>(isa, matrix, panels, rows, x, out),
            DType::Q5_1 => return run::<Int8<Q5_1>>(isa, matrix, panels, rows, x, out),
            DType::Q4K => return run::<Int8<Q4K>>(isa, matrix, panels, rows, x, out),
            DType::Q5K => return run::<Int8<Q5K>>(isa, matrix, panels, rows, x, out),
            DType::Q6K => return run::<Int8<Q6K>>(isa, matrix, panels, rows, x, out),
            DType::F32 | DType::F16 | DType::Bf16 => {}
        }
    }
    match matrix.dtype {
        DType::Q4_1 => run::<Q4_1Exact>(isa, matrix, panels, rows, float, out),
        DType::Q4_0 => run::<Q4_0Exact>(isa, matrix, panels, rows, float, out),
        DType::Q8_0 | DType::Iq4Nl => run::<Q8_0Exact>(isa, matrix, panels, rows, float, out),
        DType::Q5_0 => run::<GroupedExact<Q5_0>>(isa, matrix, panels, rows, float, out),
        DType::Q5_1 => run::<GroupedExact<Q5_1>>(isa, matrix, panels, rows, float, out),
        DType::Q4K => run::<GroupedExact<Q4K>>(isa, matrix, panels, rows, float, out),
        DType::Q5K => run::<GroupedExact<Q5K>>(isa, matrix, panels, rows, float, out),
        DType::Q6K => run::<GroupedExact<Q6K>>(isa, matrix, panels, rows, float, out),
        DType::F32 => run::<F32>(isa, matrix, panels, rows, float, out),
        DType::F16 => run::<F16>(isa, matrix, panels, rows, float, out),
        DType::Bf16 => match (input.split, input.room) {
            #[cfg(target_arch = "x86_64")]
            (Some(x), Some(room)) if isa == Isa::Amx => {
                linear_bf16_amx::<Stored>(matrix, panels, rows, x, room, out);
            }
            _ => run::<Bf16>(isa, matrix, panels, rows, float, out),
        },
    }
}

/// Two maps of the same input, of which only `function(gate) * up` is wanted, rounded to bf16 as a map's input.
pub(crate) struct Gated<'a> {
    /// As many rows as `up`, a multiple of [`BLOCK`].
    pub(crate) gate: &'a Matrix,
    /// Of the same dtype.
    pub(crate) up: &'a Matrix,
    pub(crate) function: Activation,
    /// One for each output of `gate`, then of `up`.
    pub(crate) bias: Option<*const f32>,
    pub(crate) out: SplitRows,
}

/// Computes the gated activation of `panels` of both maps for prompts' rows `rows`.
///
/// # Safety
/// The machine has AMX; `input` is rounded, as for [`linear`]; nobody else touches these outputs of these rows of `gated.out`.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(unused_variables, reason = "tiles are x86's")
)]
pub(crate) unsafe fn linear_gated(
    gated: &Gated<'_>,
    panels: Range<usize>,
    rows: Range<usize>,
    input: LinearIn,
) {
    #[cfg(target_arch = "x86_64")]
    if let (Some(x), Some(room)) = (input.rounded, input.room) {
        match gated.gate.dtype {
            DType::Q4_1 => gated_bf16_amx::<Rounded<Q4_1>>(gated, panels, rows, x, room),
            DType::Q4_0 => gated_bf16_amx::<Rounded<Q4_0>>(gated, panels, rows, x, room),
            DType::Q8_0 | DType::Iq4Nl => gated_bf16_amx::<Rounded<Q8_0>>(gated, panels, rows, x, room),
            DType::Q5_0 => gated_bf16_amx::<Rounded<Q5_0>>(gated, panels, rows, x, room),
            DType::Q5_1 => gated_bf16_amx::<Rounded<Q5_1>>(gated, panels, rows, x, room),
            DType::Q4K => gated_bf16_amx::<Rounded<Q4K>>(gated, panels, rows, x, room),
            DType::Q5K => gated_bf16_amx::<Rounded<Q5K>>(gated, panels, rows, x, room),
            DType::Q6K => gated_bf16_amx::<Rounded<Q6K>>(gated, panels, rows, x, room),
            DType::Bf16 => gated_bf16_amx::<Stored>(gated, panels, rows, x, room),
            DType::F32 | DType::F16 => unreachable!("not tiled"),
        }
    }
}

/// Whether prompts' rows are multiplied with weights of this dtype in bf16 tiles where there are any. Of f16 and f32 that
/// would lose too much.
pub(crate) const fn is_tiled(dtype: DType) -> bool {
    matches!(dtype, DType::Bf16) || dtype.block_elements() > 1
}

/// A linear map of prompts' rows in bf16 tiles.
#[cfg(target_arch = "x86_64")]
struct TileJob<'a> {
    matrix: &'a Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    x: SplitRows,
    room: TileRoom,
    out: LinearOut,
}

#[cfg(target_arch = "x86_64")]
impl TileJob<'_> {
    /// # Safety
    /// See [`linear`].
    unsafe fn run(self) {
        match self.matrix.dtype {
            DType::Q4_1 => self.of::<Rounded<Q4_1>>(),
            DType::Q4_0 => self.of::<Rounded<Q4_0>>(),
            DType::Q8_0 | DType::Iq4Nl => self.of::<Rounded<Q8_0>>(),
            DType::Q5_0 => self.of::<Rounded<Q5_0>>(),
            DType::Q5_1 => self.of::<Rounded<Q5_1>>(),
            DType::Q4K => self.of::<Rounded<Q4K>>(),
            DType::Q5K => self.of::<Rounded<Q5K>>(),
            DType::Q6K => self.of::<Rounded<Q6K>>(),
            DType::Bf16 => self.of::<Stored>(),
            DType::F32 | DType::F16 => unreachable!("not tiled"),
        }
    }

    unsafe fn of<W: Tiled>(self) {
        linear_bf16_amx::<W>(self.matrix, self.panels, self.rows, self.x, self.room, self.out);
    }
}

/// Whether so many rows are multiplied with [`STREAMS`] panels at once.
pub(crate) fn reads_in_streams(isa: Isa, rows: usize) -> bool {
    rows <= STREAMED_ROWS_MAX && isa.reads_in_streams()
}

unsafe fn run<D: PanelDot>(
    isa: Isa,
    matrix: &Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    x: D::X,
    out: LinearOut,
) {
    dispatch(
        isa,
        LinearKernel::<D> {
            in_streams: reads_in_streams(isa, rows.len()),
            matrix,
            panels,
            rows,
            x,
            out,
        },
    );
}

struct LinearKernel<'a, D: PanelDot> {
    in_streams: bool,
    matrix: &'a Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    x: D::X,
    out: LinearOut,
}

impl<D: PanelDot> Kernel for LinearKernel<'_, D> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut panel = self.panels.start;
        if S::STREAMS && self.in_streams {
            // Each stream goes on from panel to panel, so that it does not end after a few kilobytes.
            let each = self.panels.len() / STREAMS;
            for at in 0..each {
                self.rows_of::<S, STREAMS>(std::array::from_fn(|stream| panel + stream * each + at));
            }
            panel += STREAMS * each;
            if self.panels.end - panel >= 2 {
                self.rows_of::<S, 2>([panel, panel + 1]);
                panel += 2;
            }
        }
        while panel < self.panels.end {
            let side_by_side = PANELS.min(self.panels.end - panel);
            self.group::<S>(panel, side_by_side);
            panel += side_by_side;
        }
    }
}

impl<D: PanelDot> LinearKernel<'_, D> {
    /// All rows of up to [`PANELS`] panels.
    #[inline(always)]
    unsafe fn group<S: Simd>(&self, panel: usize, panels: usize) {
        let rows = self.rows.end;
        let mut row = self.rows.start;
        while S::TILE_ROWS >= 8 && rows - row >= 8 {
            for p in panel..panel + panels {
                self.tile::<S, 8>(p, row);
            }
            row += 8;
        }
        while rows - row >= 4 {
            for p in panel..panel + panels {
                self.tile::<S, 4>(p, row);
            }
            row += 4;
        }
        if rows - row >= 2 {
            for p in panel..panel + panels {
                self.tile::<S, 2>(p, row);
            }
            row += 2;
        }
        if rows > row {
            for p in panel..panel + panels {
                self.tile::<S, 1>(p, row);
            }
        }
    }

    /// All rows, at most [`STREAMED_ROWS_MAX`], of panels that are read side by side.
    #[inline(always)]
    unsafe fn rows_of<S: Simd, const P: usize>(&self, panels: [usize; P]) {
        let mut row = self.rows.start;
        while row < self.rows.end {
            row += match self.rows.end - row {
                4.. => self.tiles::<S, 4, P>(panels, row),
                2.. => self.tiles::<S, 2, P>(panels, row),
                _ => self.tiles::<S, 1, P>(panels, row),
            };
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize>(&self, panel: usize, row: usize) {
        self.tiles::<S, M, 1>([panel], row);
    }

    /// `M` rows of `P` panels, block by block.
    #[inline(always)]
    unsafe fn tiles<S: Simd, const M: usize, const P: usize>(&self, panels: [usize; P], row: usize) -> usize {
        let width = self.matrix.width;
        let first = panels.map(|panel| self.matrix.panel(panel));
        let mut sums = [[S::splat(0.0); M]; P];
        let block_bytes = self.matrix.panel_bytes / (width / BLOCK).max(1);
        for block in 0..width / BLOCK {
            for (first, sums) in first.iter().zip(&mut sums) {
                D::block::<S, M>(*first, &self.x, row, block, BLOCK, sums);
                if P > 1 {
                    let ahead = first.wrapping_add(block * block_bytes + AHEAD_BYTES);
                    for line in (0..block_bytes).step_by(LINE_BYTES) {
                        S::prefetch(ahead.wrapping_add(line));
                    }
                }
            }
        }
        let rest = width % BLOCK;
        if rest > 0 {
            for (first, sums) in first.iter().zip(&mut sums) {
                D::block::<S, M>(*first, &self.x, row, width / BLOCK, rest, sums);
            }
        }
        for (panel, sums) in panels.into_iter().zip(sums) {
            for (m, sum) in sums.into_iter().enumerate() {
                finish::<S>(self.matrix, &self.out, sum, panel, row + m);
            }
        }
        M
    }
}

/// Adds bias and what is there to a row's sums for a panel, as `out` says, and writes them.
///
/// # Safety
/// As for [`linear`], of panel `panel` and row `row`.
#[inline(always)]
unsafe fn finish<S: Simd>(matrix: &Matrix, out: &LinearOut, mut sum: S::F, panel: usize, row: usize) {
    let first = panel * LANES;
    let outputs = LANES.min(matrix.rows - first);
    let to = out.rect.base.add(row * out.rect.stride + out.column + first);
    if outputs == LANES {
        if let Some(bias) = out.bias {
            sum = S::add(sum, S::load(bias.add(first)));
        }
        if out.accumulate {
            sum = S::add(sum, S::load(to));
        }
        S::store(to, sum);
        return;
    }
    let mut lanes = [0.0; LANES];
    S::store(lanes.as_mut_ptr(), sum);
    for (i, lane) in lanes.iter().enumerate().take(outputs) {
        let with_bias = out.bias.map_or(*lane, |bias| lane + *bias.add(first + i));
        *to.add(i) = if out.accumulate {
            with_bias + *to.add(i)
        } else {
            with_bias
        };
    }
}

/// `x[row + m][column]` in all lanes.
///
/// # Safety
/// See [`PanelDot`].
#[inline(always)]
pub(crate) unsafe fn broadcast<S: Simd>(x: &FloatRows, row: usize, column: usize) -> S::F {
    S::splat(*x.base.add(row * x.stride + column))
}

/// The codes of four lines of nibbles, 4 columns in each vector, in order.
///
/// # Safety
/// `lines` points to 256 bytes; see [`Simd`].
#[inline(always)]
pub(crate) unsafe fn nibbles<S: Simd>(lines: *const u8) -> [S::B; 8] {
    let line = [
        S::load_bytes(lines),
        S::load_bytes(lines.add(64)),
        S::load_bytes(lines.add(128)),
        S::load_bytes(lines.add(192)),
    ];
    [
        S::low_nibbles(line[0]),
        S::low_nibbles(line[1]),
        S::low_nibbles(line[2]),
        S::low_nibbles(line[3]),
        S::high_nibbles(line[0]),
        S::high_nibbles(line[1]),
        S::high_nibbles(line[2]),
        S::high_nibbles(line[3]),
    ]
}
