//! Launcher of linear maps of many rows by the driver's library, whose x is cast to 16 bits first, and w too where it is not stored so.

use super::dequantize::dequantize;
use super::fp8_round::fp8_round;
use super::fp8_rows::fp8_rows;
use super::linear::Linear;
use super::linear_small::COUNTERS_BYTES;
use super::linear_tile::{cast_depth, linear_cast};
use crate::cuda::driver::{DevicePtr, Launch, Product, ProductElement, ProductShape, Products};
use crate::cuda::weights::{DeviceMatrix, WeightFormat};

/// From so many rows on a matrix that the library cannot read is written out for it; that it is worth it there is a guess.
pub const WRITTEN_ROWS_MIN: u32 = 512;
/// Of a matrix that is written out: so much at a time that an L2 cache still has it when the library comes.
const WRITTEN_BYTES_MAX: usize = 32 << 20;

const fn is_known(format: WeightFormat) -> bool {
    matches!(format, WeightFormat::F16 | WeightFormat::Bf16)
}

/// Whether the library is for this map: it knows 16-bit floats, and wants everything aligned to 16 bytes. Code formats lie in tiles
/// that it cannot read: for many rows they are written out, 8-bit floats as they are where x may become such too, all others as bf16.
#[must_use]
pub fn is_for(linear: &Linear, products: Products) -> bool {
    let is_worth_it = is_known(linear.matrix.format) || linear.rows >= WRITTEN_ROWS_MIN;
    products > Products::None
        && is_worth_it
        && linear.out.is_vector_aligned()
        && linear.bias.0.is_multiple_of(16)
}

/// Whether both factors of such a map can be 8-bit floats. Narrow ones are not worth a workspace of their own (see [`written_fp8`]).
fn is_for_fp8(linear: &Linear, products: Products) -> bool {
    products == Products::Floats8
        && linear.matrix.format == WeightFormat::Fp8
        && linear.matrix.width > 64
        && linear.matrix.rows.is_multiple_of(16)
        && linear.bias == DevicePtr::NULL
}

/// Outputs of a matrix that are written out at a time.
fn written_rows(matrix: &DeviceMatrix) -> u32 {
    let row_bytes = cast_depth(matrix.width) as usize * 2;
    // A multiple of 4: so a part's bias is aligned as the whole is.
    let rows = (WRITTEN_BYTES_MAX / row_bytes).max(16) as u32 / 16 * 16;
    rows.min(matrix.rows)
}

/// Of x as cast.
const fn cast_bytes(matrix: &DeviceMatrix, rows: u32) -> usize {
    (rows as usize * cast_depth(matrix.width) as usize * 2).next_multiple_of(256)
}

/// Bytes of workspace, counters of other kernels included.
pub(super) fn workspace_bytes(matrix: &DeviceMatrix, rows: u32) -> usize {
    let written = if is_known(matrix.format) || rows < WRITTEN_ROWS_MIN {
        0
    } else {
        written_rows(matrix) as usize * cast_depth(matrix.width) as usize * 2
    };
    COUNTERS_BYTES + cast_bytes(matrix, rows) + written
}

/// See [`Linear`]; one that [`is_for`] the library.
#[must_use]
pub fn product(linear: &Linear, products: Products, workspace: DevicePtr) -> Vec<Launch> {
    let columns = written_rows(&linear.matrix);
    if is_known(linear.matrix.format) {
        stored(linear, workspace)
    } else if is_for_fp8(linear, products) {
        written_fp8(linear, columns, workspace)
    } else {
        written(linear, columns, workspace)
    }
}

fn stored(linear: &Linear, workspace: DevicePtr) -> Vec<Launch> {
    let matrix = linear.matrix;
    let (element, is_f16) = match matrix.format {
        WeightFormat::F16 => (ProductElement::F16, true),
        _ => (ProductElement::Bf16, false),
    };
    let x = workspace.offset(COUNTERS_BYTES);
    // Rows of w end in zeros up to this width, those of x as cast too.
    let depth = matrix.format.padded_width(matrix.width);
    let part = (matrix.at, 0, matrix.rows);
    vec![
        linear_cast(linear.x, linear.rows, is_f16, x),
        part_of(linear, x, part, depth, element).launch(),
    ]
}

/// The same of a matrix of any format, `columns` outputs at a time, a multiple of 4.
#[must_use]
pub fn written(linear: &Linear, columns: u32, workspace: DevicePtr) -> Vec<Launch> {
    let matrix = linear.matrix;
    let x = workspace.offset(COUNTERS_BYTES);
    let w = x.offset(cast_bytes(&matrix, linear.rows));
    let depth = cast_depth(matrix.width);
    let mut launches = vec![linear_cast(linear.x, linear.rows, false, x)];
    for first in (0..matrix.rows).step_by(columns as usize) {
        let end = matrix.rows.min(first + columns);
        launches.push(dequantize(matrix, first..end, w, depth));
        let part = part_of(linear, x, (w, first, end - first), depth, ProductElement::Bf16);
        launches.push(part.launch());
    }
    launches
}

/// The same of 8-bit floats, which x becomes too, with a factor per row; `columns` is a multiple of 16. It fits where x and w fit as
/// bf16 if the width is more than 64: a row of x takes its columns, padded to 128, and 4 bytes instead of two for each, padded to 64.
#[must_use]
pub fn written_fp8(linear: &Linear, columns: u32, workspace: DevicePtr) -> Vec<Launch> {
    let matrix = linear.matrix;
    let depth = matrix.format.padded_width(matrix.width);
    let codes = workspace.offset(COUNTERS_BYTES);
    let x_factors = codes.offset((linear.rows * depth) as usize);
    let w = codes.offset(cast_bytes(&matrix, linear.rows));
    let mut launches = vec![fp8_round(linear.x, linear.rows, (codes, x_factors), depth)];
    for first in (0..matrix.rows).step_by(columns as usize) {
        let end = matrix.rows.min(first + columns);
        launches.push(fp8_rows(matrix, first..end, w));
        let part = part_of(linear, codes, (w, first, end - first), depth, ProductElement::Fp8);
        let product = Product {
            x_factors,
            w_factors: matrix.factors().offset(first as usize * 4),
            shape: ProductShape {
                x_stride: depth,
                ..part.shape
            },
            ..part
        };
        launches.push(product.launch());
    }
    launches
}

/// The map's `columns` outputs from `first` on, whose weights lie at `w`.
fn part_of(
    linear: &Linear,
    x: DevicePtr,
    (w, first, columns): (DevicePtr, u32, u32),
    depth: u32,
    element: ProductElement,
) -> Product {
    let bias = match linear.bias {
        DevicePtr::NULL => DevicePtr::NULL,
        bias => bias.offset(first as usize * 4),
    };
    Product {
        x_factors: DevicePtr::NULL,
        w_factors: DevicePtr::NULL,
        x,
        w,
        bias,
        out: linear.out.at.offset(first as usize * 4),
        shape: ProductShape {
            rows: linear.rows,
            columns,
            depth,
            x_stride: cast_depth(linear.matrix.width),
            w_stride: depth,
            out_stride: linear.out.stride,
            element: element as u32,
            accumulate: linear.accumulate.into(),
        },
    }
}
