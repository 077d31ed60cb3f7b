//! Launcher of `mean_pool.cu`: the mean of each sequence's rows.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};

const THREADS: u32 = 128;

/// The parameter struct, `MeanPoolParams` in `mean_pool.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MeanPoolParams {
    x: DeviceView,
    out: DeviceView,
    first_rows: DevicePtr,
    row_counts: DevicePtr,
    is_vector: u32,
    reserved: u32,
}

/// `out[s]` = mean of rows `first_rows[s] ..` of `x`, `row_counts[s]` many; zeros if there are none. Both lists are `[sequences]` u32
/// on the device.
#[must_use]
pub fn mean_pool(
    x: DeviceView,
    out: DeviceView,
    (first_rows, row_counts): (DevicePtr, DevicePtr),
    sequences: u32,
) -> Launch {
    let is_vector = x.is_vector_aligned() && out.is_vector_aligned();
    let params = MeanPoolParams {
        x,
        out,
        first_rows,
        row_counts,
        is_vector: u32::from(is_vector),
        reserved: 0,
    };
    let vectors = if is_vector { out.width / 4 } else { out.width };
    let grid = [vectors.div_ceil(THREADS), sequences, 1];
    Launch::new("mean_pool", grid, THREADS, 0, &params)
}
