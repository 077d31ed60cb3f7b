//! Launcher of `linear_tile.cu` and `linear_tile_sm100.cu`: linear maps of many rows, whose x is cast to 16 bits first.

use bytemuck::{Pod, Zeroable};

use super::linear::Linear;
use super::linear_small::{COUNTERS_BYTES, names};
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::{MatrixParams, WeightFormat};

/// The parameter struct, `LinearCastParams` in `linear_tile.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct LinearCastParams {
    x: DeviceView,
    out: DevicePtr,
    rows: u32,
    depth: u32,
}

/// The parameter struct, `LinearTileParams` in `linear_tile.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct LinearTileParams {
    x: DevicePtr,
    out: DeviceView,
    matrix: MatrixParams,
    bias: DevicePtr,
    rows: u32,
    depth: u32,
    accumulate: u32,
    unused: u32,
}

/// Rows and columns of a block.
const TILE: u32 = 128;
/// Of k in one step.
const DEPTH: u32 = 64;

/// By format.
const KERNELS: [[&str; 1]; 13] = names!("linear_tile_": "");
const KERNELS_SM100: [[&str; 1]; 13] = names!("linear_tile_sm100_": "");
/// Two tiles of x and two of weights.
const TILES_BYTES: u32 = 2 * 2 * TILE * DEPTH * 2;

/// Elements of a row of x as cast: `width`, padded.
#[must_use]
pub const fn cast_depth(width: u32) -> u32 {
    width.next_multiple_of(DEPTH)
}

/// Casts `x`, `[rows, width]`, to `[rows, cast_depth(width)]` at `out`, 16-byte aligned: bf16, or f16 if `is_f16`.
#[must_use]
pub fn linear_cast(x: DeviceView, rows: u32, is_f16: bool, out: DevicePtr) -> Launch {
    let depth = cast_depth(x.width);
    let params = LinearCastParams { x, out, rows, depth };
    let kernel = if is_f16 {
        "linear_cast_f16"
    } else {
        "linear_cast_bf16"
    };
    let threads = (depth / 8).next_multiple_of(32).min(256);
    Launch::new(kernel, [rows, 1, 1], threads, 0, &params)
}

/// See [`Linear`].
#[must_use]
pub fn linear_tile(linear: &Linear, workspace: DevicePtr) -> Vec<Launch> {
    launches(linear, workspace, &KERNELS, TILES_BYTES)
}

/// See [`Linear`]. For devices of architecture `sm_100a`.
#[must_use]
pub fn linear_tile_sm100(linear: &Linear, workspace: DevicePtr) -> Vec<Launch> {
    // The tiles at a multiple of 1,024 bytes, two barriers and an address.
    launches(linear, workspace, &KERNELS_SM100, 1_024 + TILES_BYTES + 32)
}

fn launches(
    linear: &Linear,
    workspace: DevicePtr,
    kernels: &[[&'static str; 1]; 13],
    shared_bytes: u32,
) -> Vec<Launch> {
    let x = workspace.offset(COUNTERS_BYTES);
    let format = linear.matrix.format;
    let params = LinearTileParams {
        x,
        out: linear.out,
        matrix: linear.matrix.into(),
        bias: linear.bias,
        rows: linear.rows,
        depth: cast_depth(linear.matrix.width),
        accumulate: linear.accumulate.into(),
        unused: 0,
    };
    let grid = [linear.rows.div_ceil(TILE), linear.matrix.rows.div_ceil(TILE), 1];
    let [kernel] = kernels[format as usize];
    vec![
        linear_cast(linear.x, linear.rows, format == WeightFormat::F16, x),
        Launch::new(kernel, grid, 256, shared_bytes, &params),
    ]
}
