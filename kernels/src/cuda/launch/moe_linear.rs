//! Launcher of `moe_linear.cu`: linear maps of a mixture's experts, the rows of each expert together.

use bytemuck::{Pod, Zeroable};
use galerne_core::graph::Activation;

use super::elementwise::activation_number;
use super::linear_small::{Plan, names};
use super::mixture::ExpertTable;
use super::moe_plan::Tiling;
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::MatrixParams;

/// The parameter struct, `MoeLinearParams` in `moe_linear.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MoeLinearParams {
    x: DeviceView,
    out: DeviceView,
    matrix: MatrixParams,
    experts: DevicePtr,
    order: DevicePtr,
    tiles: DevicePtr,
    x_divisor: u32,
    stage_chunks: u32,
    activation: u32,
    unused: u32,
}

/// Without and with an activation, by format and rows of a tile.
const KERNELS: [[[&str; 2]; 13]; 2] = [
    names!("moe_linear_": "_8", "_32"),
    names!("moe_linear_": "_8_gated", "_32_gated"),
];

/// `out[a] = x[a / x_divisor] W_e^T` for the assignments of `order` and `tiles`, which `moe_plan` made; with an activation as
/// [`linear_small`](super::linear_small::linear_small).
#[must_use]
pub fn moe_linear(
    (x, x_divisor): (DeviceView, u32),
    (experts, activation): (&ExpertTable, Option<Activation>),
    (order, tiles): (DevicePtr, DevicePtr),
    tiling: Tiling,
    out: DeviceView,
) -> Launch {
    let plan = Plan::whole(&experts.matrix, tiling.rows);
    let params = MoeLinearParams {
        x,
        out,
        matrix: experts.matrix.into(),
        experts: experts.addresses,
        order,
        tiles,
        x_divisor,
        stage_chunks: plan.stage_chunks,
        activation: activation_number(activation),
        unused: 0,
    };
    let kernels = &KERNELS[usize::from(activation.is_some())];
    let kernel = kernels[experts.matrix.format as usize][usize::from(tiling.rows > 8)];
    Launch::new(
        kernel,
        [plan.blocks, tiling.tiles_max(), 1],
        256,
        plan.shared_bytes,
        &params,
    )
}
