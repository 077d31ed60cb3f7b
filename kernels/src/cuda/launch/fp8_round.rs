//! Launcher of `fp8_round.cu`: rows of x as 8-bit floats with a factor each.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};

/// The parameter struct, `Fp8RoundParams` in `fp8_round.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Fp8RoundParams {
    x: DeviceView,
    codes: DevicePtr,
    factors: DevicePtr,
    depth: u32,
    unused: u32,
}

/// Rounds `x`, `[rows, width]`, to `codes`, `[rows, depth]` bytes, aligned to 16, and `factors`, `[rows]` f32; `depth` is a multiple of 16
/// and at least the width.
#[must_use]
pub fn fp8_round(x: DeviceView, rows: u32, (codes, factors): (DevicePtr, DevicePtr), depth: u32) -> Launch {
    let params = Fp8RoundParams {
        x,
        codes,
        factors,
        depth,
        unused: 0,
    };
    let threads = (depth / 16).next_multiple_of(32).clamp(32, 256);
    Launch::new("fp8_round", [rows, 1, 1], threads, 32 * 4, &params)
}
