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
    eps: f32,
    weight_offset: f32,
}

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
    (x, delta, out): (DeviceView, DeviceView, DeviceView),
    weight: DevicePtr,
    (rows, group): (u32, u32),
    eps: f32,
) -> Launch {
    let (kernel, bias, weight_offset) = match kind {
        Kind::Rms { weight_offset } => ("norm_rms", DevicePtr::NULL, weight_offset),
        Kind::Layer { bias } => ("norm_layer", bias, 0.0),
    };
    let params = NormParams {
        x,
        delta,
        out,
        weight,
        bias,
        rows,
        group,
        eps,
        weight_offset,
    };
    let threads = group.div_ceil(4).next_multiple_of(32).clamp(32, 1_024);
    Launch::new(
        kernel,
        [x.width / group, rows, 1],
        threads,
        group * 4 + 128,
        &params,
    )
}
