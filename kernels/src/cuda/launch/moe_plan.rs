//! Launcher of `moe_plan.cu`: which rows go through which expert together.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, Launch};

/// The parameter struct, `MoePlanParams` in `moe_plan.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MoePlanParams {
    chosen: DevicePtr,
    order: DevicePtr,
    tiles: DevicePtr,
    assignments: u32,
    experts: u32,
    tile_rows: u32,
    tiles_max: u32,
}

/// How many rows go together, and how many tiles that may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Rows times experts per row.
    pub assignments: u32,
    /// Experts there are.
    pub experts: u32,
    /// Most rows of a tile.
    pub rows: u32,
}

impl Tiling {
    /// Small tiles while experts have few rows each.
    #[must_use]
    pub const fn new(assignments: u32, experts: u32) -> Self {
        let rows = if assignments > 8 * experts { 32 } else { 8 };
        Self {
            assignments,
            experts,
            rows,
        }
    }

    /// Most tiles there can be: every expert may have one that is not full.
    #[must_use]
    pub const fn tiles_max(&self) -> u32 {
        let partial = if self.assignments < self.experts {
            self.assignments
        } else {
            self.experts
        };
        partial + self.assignments / self.rows
    }
}

/// Writes `order`, `[assignments]` u32, and `tiles`, `[tiles_max, 3]` u32.
#[must_use]
pub fn moe_plan(chosen: DevicePtr, (order, tiles): (DevicePtr, DevicePtr), tiling: Tiling) -> Launch {
    let params = MoePlanParams {
        chosen,
        order,
        tiles,
        assignments: tiling.assignments,
        experts: tiling.experts,
        tile_rows: tiling.rows,
        tiles_max: tiling.tiles_max(),
    };
    Launch::new("moe_plan", [1, 1, 1], 1_024, tiling.experts * 8, &params)
}
