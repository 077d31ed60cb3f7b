//! Launcher of `moe_route.cu`: which experts rows go to.

use bytemuck::{Pod, Zeroable};
use galerne_core::graph::RouterNormalisation;

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::{DeviceMatrix, MatrixParams};

/// The parameter struct, `MoeRouteParams` in `moe_route.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MoeRouteParams {
    x: DeviceView,
    router: MatrixParams,
    sequence_of: DevicePtr,
    chosen: DevicePtr,
    weights: DevicePtr,
    top_k: u32,
    normalisation: u32,
}

/// Writes `chosen` u32 and `weights` f32, both `[rows, top_k]`. `sequence_of` is `[rows]` u32, 0xffffffff for rows that are
/// only padding, or [`DevicePtr::NULL`].
#[must_use]
pub fn moe_route(
    (x, router): (DeviceView, DeviceMatrix),
    sequence_of: DevicePtr,
    (chosen, weights): (DevicePtr, DevicePtr),
    (top_k, normalisation): (u32, RouterNormalisation),
    rows: u32,
) -> Launch {
    let params = MoeRouteParams {
        x,
        router: router.into(),
        sequence_of,
        chosen,
        weights,
        top_k,
        normalisation: match normalisation {
            RouterNormalisation::SoftmaxAll => 0,
            RouterNormalisation::SoftmaxChosen => 1,
            RouterNormalisation::SigmoidChosen => 2,
        },
    };
    Launch::new("moe_route", [rows, 1, 1], 256, router.rows * 4, &params)
}
