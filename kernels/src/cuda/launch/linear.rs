//! Which kernels run a linear map.

use galerne_core::graph::Activation;

use super::linear_exact::linear_exact;
use super::linear_small::{self, is_gated, linear_small};
use super::linear_tile::{linear_tile, linear_tile_sm100};
use super::product::{self, product};
use crate::cuda::driver::{DevicePtr, DeviceView, Launch, Products};
use crate::cuda::weights::DeviceMatrix;
use crate::device::Precision;

/// `out = x W^T + bias`, or `out += x W^T + bias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// `[rows, matrix.width]`
    pub x: DeviceView,
    /// `[out, in]`
    pub matrix: DeviceMatrix,
    /// `[matrix.rows]` f32, or [`DevicePtr::NULL`].
    pub bias: DevicePtr,
    /// Whether to add to what is in `out`.
    pub accumulate: bool,
    /// `[rows, matrix.rows]`; may not overlap `x`.
    pub out: DeviceView,
    /// Rows of `x` and `out`.
    pub rows: u32,
}

/// What may run linear maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Means {
    /// Which kernels.
    pub precision: Precision,
    /// Which products the driver may be asked for.
    pub products: Products,
    /// Whether `linear_tile_sm100` takes the place of the library and of `linear_tile`. Only for devices of architecture
    /// `sm_100a`. It has never run on one: nobody asks for it until it has.
    pub has_tensor_memory: bool,
}

/// Bytes of workspace that [`linear`] needs for a matrix (wherever it lies) and at most `rows_max` rows. All maps of a program
/// can share one workspace, aligned to 256 bytes, of the most that any of them needs. It is zeroed once.
#[must_use]
pub fn workspace_bytes(matrix: &DeviceMatrix, rows_max: u32) -> usize {
    let small = linear_small::workspace_bytes(matrix, rows_max);
    if rows_max <= linear_small::ROWS_MAX {
        return small;
    }
    small.max(product::workspace_bytes(matrix, rows_max))
}

/// The launches of a linear map. Where there is a library for products, it is asked from one row more than
/// [`linear_small::ROWS_MAX`] on for weights it can read, from [`product::WRITTEN_ROWS_MIN`] on for others; that it begins to be
/// faster there is a guess.
#[must_use]
pub fn linear(linear: &Linear, means: Means, workspace: DevicePtr) -> Vec<Launch> {
    match means.precision {
        Precision::Auto if linear.rows <= linear_small::ROWS_MAX => {
            vec![linear_small(linear, None, workspace)]
        }
        Precision::Auto if means.has_tensor_memory => linear_tile_sm100(linear, workspace),
        Precision::Auto if product::is_for(linear, means.products) => {
            product(linear, means.products, workspace)
        }
        Precision::Auto => linear_tile(linear, workspace),
        Precision::F32 => vec![linear_exact(linear)],
    }
}

/// The launch of a linear map whose columns are gates and, behind them, as many ups, and of `function(gate) * up` into out, `[rows,
/// matrix.rows / 2]`; nothing where that takes two.
#[must_use]
pub fn gated(linear: &Linear, function: Activation, means: Means, workspace: DevicePtr) -> Option<Launch> {
    let is_for_one = means.precision == Precision::Auto
        && linear.rows <= linear_small::ROWS_MAX
        && is_gated(&linear.matrix)
        && !linear.accumulate;
    is_for_one.then(|| linear_small(linear, Some(function), workspace))
}
