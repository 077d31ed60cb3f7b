//! Launcher of `norm.cu`: RMS norm and layer norm of rows or heads, with the residual add before it.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};

/// The parameter struct, `NormParams` in `norm.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct NormParams {
    x: DeviceView,
    delta: DeviceView,
    out: DeviceView,
    weight: DevicePtr,
    bias: DevicePtr,
    rows: u32,
    group: u32,
    team: u32,
    eps: f32,
    weight_offset: f32,
    reserved: u32,
}

/// Threads of a block that has several teams.
const SMALL_BLOCK: u32 = 128;
/// Threads of a team that shares its block: a warp.
const WARP: u32 = 32;
/// Columns a thread keeps in registers: four vectors, `KEPT` in `norm.cu`.
const KEPT: u32 = 16;
/// Room for the warps' sums.
const SUMS_BYTES: u32 = 128;

/// Which normalisation, with its operands in f32 on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// `x / rms(x) * (weight + weight_offset)`
    Rms {
        /// Added to every weight.
        weight_offset: f32,
    },
    /// `(x - mean) / sqrt(var + eps) * weight + bias`
    Layer {
        /// `[group]`, or [`DevicePtr::NULL`].
        bias: DevicePtr,
    },
}

/// `x += delta` if there is a delta; `out = norm(x)` over groups of `group` columns. All views `[rows, width]`.
#[must_use]
pub fn norm(
    kind: Kind,
    views: (DeviceView, DeviceView, DeviceView),
    weight: DevicePtr,
    shape: (u32, u32),
    eps: f32,
) -> Launch {
    let (kernels, bias, weight_offset) = match kind {
        Kind::Rms { weight_offset } => (["norm_rms", "norm_rms_vector"], DevicePtr::NULL, weight_offset),
        Kind::Layer { bias } => (["norm_layer", "norm_layer_vector"], bias, 0.0),
    };
    launch(kernels, views, (weight, bias), shape, (eps, weight_offset))
}

/// `out = x / max(|x|, 1e-12)` over groups of `group` columns; `out` may be `x`. Both `[rows, width]`.
#[must_use]
pub fn l2_normalise(x: DeviceView, out: DeviceView, shape: (u32, u32)) -> Launch {
    let kernels = ["norm_l2", "norm_l2_vector"];
    let nothing = (DevicePtr::NULL, DevicePtr::NULL);
    launch(kernels, (x, DeviceView::NONE, out), nothing, shape, (1e-12, 0.0))
}

fn launch(
    [any, vector]: [&'static str; 2],
    (x, delta, out): (DeviceView, DeviceView, DeviceView),
    (weight, bias): (DevicePtr, DevicePtr),
    (rows, group): (u32, u32),
    (eps, weight_offset): (f32, f32),
) -> Launch {
    let is_vector = [x, delta, out].into_iter().all(DeviceView::is_vector_aligned)
        && weight.0.is_multiple_of(16)
        && bias.0.is_multiple_of(16)
        && group.is_multiple_of(4)
        && group <= 1_024 * KEPT;
    let units = rows * (x.width / group);
    let (kernel, team, threads, blocks, values_bytes) = if !is_vector {
        let threads = group.div_ceil(4).next_multiple_of(WARP).min(1_024);
        (any, threads, threads, units, group * 4)
    } else if group <= WARP * KEPT {
        (vector, WARP, SMALL_BLOCK, units.div_ceil(SMALL_BLOCK / WARP), 0)
    } else {
        let threads = group.div_ceil(KEPT).next_multiple_of(WARP);
        (vector, threads, threads, units, 0)
    };
    let params = NormParams {
        x,
        delta,
        out,
        weight,
        bias,
        rows,
        group,
        team,
        eps,
        weight_offset,
        reserved: 0,
    };
    Launch::new(
        kernel,
        [blocks, 1, 1],
        threads,
        SUMS_BYTES + values_bytes,
        &params,
    )
}
