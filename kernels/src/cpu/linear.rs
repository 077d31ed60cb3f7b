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

use super::isa::Isa;
use super::linear_grouped::{GroupedExact, GroupedInt8, Q4K, Q5_0, Q5_1, Q5K, Q6K};
use super::linear_plain::{Bf16, F16, F32};
use super::linear_q4_0::{Q4_0Exact, Q4_0Int8};
use super::linear_q4_1::{Q4_1Exact, Q4_1Int8};
use super::linear_q8_0::{Q8_0Exact, Q8_0Int8};
use super::memory::Rect;
use super::quantize_rows::QuantRows;
use super::simd::{Kernel, Simd, dispatch};
use super::weights::{LANES, Matrix};

/// Columns in one step of the inner loop.
pub(crate) const BLOCK: usize = 32;
/// Panels that stay in cache while all rows pass. Each is read from end to end: one stream is what prefetchers like.
const PANELS: usize = 4;

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

/// Activations in both forms; the quantized one if the device's precision allows it.
#[derive(Clone, Copy)]
pub(crate) struct LinearIn {
    pub(crate) float: Rect,
    pub(crate) quant: Option<QuantRows>,
}

/// Computes the outputs of `panels` for the rows `rows`, the first of which is a multiple of 8.
///
/// # Safety
/// `isa` is the machine's; `input` has rows of `matrix.width` columns that nobody writes; `out` has as many
/// rows and the matrix's columns, and nobody else touches the columns of these panels in these rows.
pub(crate) unsafe fn linear(
    isa: Isa,
    matrix: &Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    input: LinearIn,
    out: LinearOut,
) {
    debug_assert!(out.column + matrix.rows <= out.rect.width && input.float.width == matrix.width);
    let float = FloatRows {
        base: input.float.base,
        stride: input.float.stride,
    };
    match (matrix.dtype, input.quant) {
        (DType::Q4_1, Some(x)) => run::<Q4_1Int8>(isa, matrix, panels, rows, x, out),
        (DType::Q4_0, Some(x)) => run::<Q4_0Int8>(isa, matrix, panels, rows, x, out),
        (DType::Q8_0 | DType::Iq4Nl, Some(x)) => run::<Q8_0Int8>(isa, matrix, panels, rows, x, out),
        (DType::Q5_0, Some(x)) => run::<GroupedInt8<Q5_0>>(isa, matrix, panels, rows, x, out),
        (DType::Q5_1, Some(x)) => run::<GroupedInt8<Q5_1>>(isa, matrix, panels, rows, x, out),
        (DType::Q4K, Some(x)) => run::<GroupedInt8<Q4K>>(isa, matrix, panels, rows, x, out),
        (DType::Q5K, Some(x)) => run::<GroupedInt8<Q5K>>(isa, matrix, panels, rows, x, out),
        (DType::Q6K, Some(x)) => run::<GroupedInt8<Q6K>>(isa, matrix, panels, rows, x, out),
        (DType::Q4_1, None) => run::<Q4_1Exact>(isa, matrix, panels, rows, float, out),
        (DType::Q4_0, None) => run::<Q4_0Exact>(isa, matrix, panels, rows, float, out),
        (DType::Q8_0 | DType::Iq4Nl, None) => run::<Q8_0Exact>(isa, matrix, panels, rows, float, out),
        (DType::Q5_0, None) => run::<GroupedExact<Q5_0>>(isa, matrix, panels, rows, float, out),
        (DType::Q5_1, None) => run::<GroupedExact<Q5_1>>(isa, matrix, panels, rows, float, out),
        (DType::Q4K, None) => run::<GroupedExact<Q4K>>(isa, matrix, panels, rows, float, out),
        (DType::Q5K, None) => run::<GroupedExact<Q5K>>(isa, matrix, panels, rows, float, out),
        (DType::Q6K, None) => run::<GroupedExact<Q6K>>(isa, matrix, panels, rows, float, out),
        (DType::F32, _) => run::<F32>(isa, matrix, panels, rows, float, out),
        (DType::F16, _) => run::<F16>(isa, matrix, panels, rows, float, out),
        (DType::Bf16, _) => run::<Bf16>(isa, matrix, panels, rows, float, out),
    }
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
            matrix,
            panels,
            rows,
            x,
            out,
        },
    );
}

struct LinearKernel<'a, D: PanelDot> {
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

    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize>(&self, panel: usize, row: usize) {
        let width = self.matrix.width;
        let first = self.matrix.panel(panel);
        let mut sums = [S::splat(0.0); M];
        for block in 0..width / BLOCK {
            D::block::<S, M>(first, &self.x, row, block, BLOCK, &mut sums);
        }
        let rest = width % BLOCK;
        if rest > 0 {
            D::block::<S, M>(first, &self.x, row, width / BLOCK, rest, &mut sums);
        }
        for (m, sum) in sums.into_iter().enumerate() {
            self.finish::<S>(sum, panel, row + m);
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, mut sum: S::F, panel: usize, row: usize) {
        let first = panel * LANES;
        let outputs = LANES.min(self.matrix.rows - first);
        let to = self
            .out
            .rect
            .base
            .add(row * self.out.rect.stride + self.out.column + first);
        if outputs == LANES {
            if let Some(bias) = self.out.bias {
                sum = S::add(sum, S::load(bias.add(first)));
            }
            if self.out.accumulate {
                sum = S::add(sum, S::load(to));
            }
            S::store(to, sum);
            return;
        }
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), sum);
        for (i, lane) in lanes.iter().enumerate().take(outputs) {
            let with_bias = self.out.bias.map_or(*lane, |bias| lane + *bias.add(first + i));
            *to.add(i) = if self.out.accumulate {
                with_bias + *to.add(i)
            } else {
                with_bias
            };
        }
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

/// The dot products of a block's 16 rows of nibbles with 32 activations.
///
/// # Safety
/// See [`PanelDot`].
#[inline(always)]
pub(crate) unsafe fn nibbles_dot<S: Simd>(low: &[S::B; 4], high: &[S::B; 4], x: *const i8) -> S::F {
    let mut dot = S::nibble_zero();
    for c in 0..4 {
        dot = S::nibble_dot(dot, low[c], x.add(4 * c));
        dot = S::nibble_dot(dot, high[c], x.add(16 + 4 * c));
    }
    S::to_f(S::nibble_sum(dot))
}
