//! Launcher of `fp8_rows.cu`: a matrix of 8-bit floats row by row.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, Launch};
use crate::cuda::weights::{DeviceMatrix, MatrixParams};

/// The parameter struct, `Fp8RowsParams` in `fp8_rows.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Fp8RowsParams {
    matrix: MatrixParams,
    out: DevicePtr,
    first_row: u32,
    unused: u32,
}

/// Writes the codes of rows of a matrix of [`Fp8`](crate::cuda::weights::WeightFormat::Fp8) to `out`, `[rows, padded width]` bytes, aligned to
/// 16.
#[must_use]
pub fn fp8_rows(matrix: DeviceMatrix, rows: Range<u32>, out: DevicePtr) -> Launch {
    let params = Fp8RowsParams {
        matrix: matrix.into(),
        out,
        first_row: rows.start,
        unused: 0,
    };
    let threads = (matrix.format.padded_width(matrix.width) / 16)
        .next_multiple_of(32)
        .min(256);
    Launch::new("fp8_rows", [rows.len() as u32, 1, 1], threads, 0, &params)
}
