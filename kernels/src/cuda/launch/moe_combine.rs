//! Launcher of `moe_combine.cu`: the weighted sum of what a row's experts found.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};

/// The parameter struct, `MoeCombineParams` in `moe_combine.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MoeCombineParams {
    y: DeviceView,
    shared: DeviceView,
    out: DeviceView,
    chosen: DevicePtr,
    weights: DevicePtr,
    gate: DevicePtr,
    top_k: u32,
    unused: u32,
}

/// `y` is `[rows * top_k, width]`, `chosen` and `weights` are `moe_route`'s; `shared` is `[rows, width]` or
/// [`DeviceView::NONE`], its `gate` `[rows]` f32 or [`DevicePtr::NULL`].
#[must_use]
pub fn moe_combine(
    y: DeviceView,
    (chosen, weights, top_k): (DevicePtr, DevicePtr, u32),
    (shared, gate): (DeviceView, DevicePtr),
    out: DeviceView,
    rows: u32,
) -> Launch {
    let params = MoeCombineParams {
        y,
        shared,
        out,
        chosen,
        weights,
        gate,
        top_k,
        unused: 0,
    };
    let threads = out.width.next_multiple_of(32).min(256);
    Launch::new(
        "moe_combine",
        [out.width.div_ceil(threads), rows, 1],
        threads,
        0,
        &params,
    )
}
