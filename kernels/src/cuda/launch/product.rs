//! Launcher of linear maps of many rows by the driver's library, whose x is cast to 16 bits first.

use super::linear::Linear;
use super::linear_small::COUNTERS_BYTES;
use super::linear_tile::{cast_depth, linear_cast};
use crate::cuda::driver::{DevicePtr, Launch, Product, ProductShape};
use crate::cuda::weights::WeightFormat;

/// Whether the library is for this map: it knows 16-bit floats, and wants everything aligned to 16 bytes. Code formats lie in tiles
/// that it cannot read, 8-bit floats too.
#[must_use]
pub const fn is_for(linear: &Linear) -> bool {
    let is_known = matches!(linear.matrix.format, WeightFormat::F16 | WeightFormat::Bf16);
    is_known && linear.out.is_vector_aligned() && linear.bias.0.is_multiple_of(16)
}

/// See [`Linear`]; one that [`is_for`] the library. The workspace is as for `linear_tile`.
#[must_use]
pub fn product(linear: &Linear, workspace: DevicePtr) -> Vec<Launch> {
    let matrix = linear.matrix;
    let is_f16 = matrix.format == WeightFormat::F16;
    let x = workspace.offset(COUNTERS_BYTES);
    // Rows of w end in zeros up to this width, those of x as cast too.
    let depth = matrix.format.padded_width(matrix.width);
    let product = Product {
        x,
        w: matrix.at,
        bias: linear.bias,
        out: linear.out.at,
        shape: ProductShape {
            rows: linear.rows,
            columns: matrix.rows,
            depth,
            x_stride: cast_depth(matrix.width),
            w_stride: depth,
            out_stride: linear.out.stride,
            is_f16: is_f16.into(),
            accumulate: linear.accumulate.into(),
        },
    };
    vec![linear_cast(linear.x, linear.rows, is_f16, x), product.launch()]
}
