//! Launcher of `linear_exact.cu`: linear maps in f32 throughout, of every weight format.

use bytemuck::{Pod, Zeroable};

use super::linear::Linear;
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::MatrixParams;

/// The parameter struct, `LinearExactParams` in `linear_exact.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct LinearExactParams {
    x: DeviceView,
    out: DeviceView,
    matrix: MatrixParams,
    bias: DevicePtr,
    rows: u32,
    accumulate: u32,
}

const COLUMNS: u32 = 64;
const ROWS: u32 = 32;
const DEPTH: u32 = 32;

/// See [`Linear`].
#[must_use]
pub fn linear_exact(linear: &Linear) -> Launch {
    let params = LinearExactParams {
        x: linear.x,
        out: linear.out,
        matrix: linear.matrix.into(),
        bias: linear.bias,
        rows: linear.rows,
        accumulate: linear.accumulate.into(),
    };
    let grid = [
        linear.matrix.rows.div_ceil(COLUMNS),
        linear.rows.div_ceil(ROWS),
        1,
    ];
    Launch::new("linear_exact", grid, 256, DEPTH * (COLUMNS + ROWS) * 4, &params)
}
