//! Launcher of `moe_exact.cu`: linear maps of a mixture's experts in f32 throughout.

use bytemuck::{Pod, Zeroable};

use super::mixture::ExpertTable;
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::MatrixParams;

/// The parameter struct, `MoeExactParams` in `moe_exact.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MoeExactParams {
    x: DeviceView,
    out: DeviceView,
    matrix: MatrixParams,
    experts: DevicePtr,
    chosen: DevicePtr,
    x_divisor: u32,
    experts_count: u32,
}

const THREADS: u32 = 128;

/// `out[a] = x[a / x_divisor] W_e^T` with `e = chosen[a]`.
#[must_use]
pub fn moe_exact(
    (x, x_divisor): (DeviceView, u32),
    experts: &ExpertTable,
    (chosen, assignments): (DevicePtr, u32),
    out: DeviceView,
) -> Launch {
    let params = MoeExactParams {
        x,
        out,
        matrix: experts.matrix.into(),
        experts: experts.addresses,
        chosen,
        x_divisor,
        experts_count: experts.count,
    };
    let grid = [assignments, experts.matrix.rows.div_ceil(THREADS), 1];
    Launch::new("moe_exact", grid, THREADS, 0, &params)
}
