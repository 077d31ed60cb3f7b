//! Launcher of `dequantize.cu`: a matrix of any format as bf16.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, Launch};
use crate::cuda::weights::{DeviceMatrix, MatrixParams};

/// The parameter struct, `DequantizeParams` in `dequantize.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct DequantizeParams {
    matrix: MatrixParams,
    out: DevicePtr,
    stride: u32,
    first_row: u32,
}

/// Writes rows of the matrix to `out`, `[rows, stride]` bf16, aligned to 16 bytes; `stride` is a multiple of 8 and at least the width.
#[must_use]
pub fn dequantize(matrix: DeviceMatrix, rows: Range<u32>, out: DevicePtr, stride: u32) -> Launch {
    let params = DequantizeParams {
        matrix: matrix.into(),
        out,
        stride,
        first_row: rows.start,
    };
    let threads = (stride / 8).next_multiple_of(32).clamp(32, 256);
    Launch::new("dequantize", [rows.len() as u32, 1, 1], threads, 0, &params)
}
