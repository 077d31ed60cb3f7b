//! Launcher of `linear_small.cu`: linear maps of up to 64 rows, which stream the weights once.

use bytemuck::{Pod, Zeroable};
use galerne_core::graph::Activation;

use super::elementwise::activation_number;
use super::linear::Linear;
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::{DeviceMatrix, MatrixParams, PANEL_ROWS};

/// The parameter struct, `LinearSmallParams` in `linear_small.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct LinearSmallParams {
    x: DeviceView,
    out: DeviceView,
    matrix: MatrixParams,
    bias: DevicePtr,
    partial: DevicePtr,
    counters: DevicePtr,
    rows: u32,
    accumulate: u32,
    splits: u32,
    split_chunks: u32,
    stage_chunks: u32,
    activation: u32,
}

/// Most rows of x.
pub const ROWS_MAX: u32 = 64;
/// Bytes of the workspace's beginning, which is zeroed once.
pub(super) const COUNTERS_BYTES: usize = (4 * BLOCKS_WANTED as usize).next_multiple_of(256);
/// Outputs of a block.
pub(super) const COLUMNS: u32 = 128;
/// Blocks that keep a GPU of 132 multiprocessors busy, two on each; how many there are must not change a result, so the
/// number is not the device's.
const BLOCKS_WANTED: u32 = 264;
/// Fewer columns than this are not worth a block's beginning and end.
const SPLIT_COLUMNS_MIN: u32 = 512;
/// Of x, as bf16.
const STAGE_BYTES_MAX: u32 = 65_536;
/// Kernels take chunks in batches of 1, 2 or 4.
const BATCH_CHUNKS: u32 = 4;

/// Kernels' names by format, then by the endings given.
macro_rules! names {
    ($prefix:literal: $($end:literal),*) => {
        $crate::cuda::launch::linear_small::names!(
            @ $prefix, [$($end),*],
            "f32", "f16", "bf16", "codes4", "codes4_min", "codes4_super", "codes8", "codes8_min", "codes8_super",
            "codes8_pair", "fp8", "nvfp4", "int4"
        )
    };
    (@ $prefix:literal, $ends:tt, $($format:literal),*) => {
        [$($crate::cuda::launch::linear_small::names!(@@ $prefix, $format, $ends)),*]
    };
    (@@ $prefix:literal, $format:literal, [$($end:literal),*]) => {
        [$(concat!($prefix, $format, $end)),*]
    };
}
pub(super) use names;

/// Without and with an activation, by format and rows.
const KERNELS: [[[&str; 4]; 13]; 2] = [
    names!("linear_small_": "_8", "_16", "_32", "_64"),
    names!("linear_small_": "_8_gated", "_16_gated", "_32_gated", "_64_gated"),
];

/// How the columns of x are shared out. All but the stage follow from the matrix's shape alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Blocks over the outputs.
    pub(super) blocks: u32,
    /// Blocks that share the columns of x.
    pub(super) splits: u32,
    /// Chunks of each.
    pub(super) split_chunks: u32,
    /// Chunks of x in shared memory.
    pub(super) stage_chunks: u32,
    /// Shared memory.
    pub(super) shared_bytes: u32,
    /// The kernel's rows: 8, 16, 32 or 64, as a power of two above 8.
    pub(super) size: usize,
}

impl Plan {
    pub(super) fn new(matrix: &DeviceMatrix, rows: u32) -> Self {
        let blocks = matrix.rows.div_ceil(COLUMNS).max(1);
        let splits_max = matrix.width.div_ceil(SPLIT_COLUMNS_MIN).max(1);
        Self::shared_by((BLOCKS_WANTED / blocks).clamp(1, splits_max), matrix, rows)
    }

    /// No block shares its columns of x.
    pub(super) fn whole(matrix: &DeviceMatrix, rows: u32) -> Self {
        Self::shared_by(1, matrix, rows)
    }

    fn shared_by(splits_max: u32, matrix: &DeviceMatrix, rows: u32) -> Self {
        let chunk = if matrix.format.plain_bytes().is_some() {
            32
        } else {
            128
        };
        let chunks = matrix.width.div_ceil(chunk);
        let blocks = matrix.rows.div_ceil(COLUMNS);
        let split_chunks = chunks.div_ceil(splits_max).next_multiple_of(BATCH_CHUNKS);
        let size = rows.clamp(8, ROWS_MAX).next_power_of_two();
        let chunk_bytes = chunk * size * 2;
        let stage_chunks = (STAGE_BYTES_MAX / chunk_bytes).min(split_chunks);
        Self {
            blocks,
            splits: chunks.div_ceil(split_chunks),
            split_chunks,
            stage_chunks,
            shared_bytes: (stage_chunks * chunk_bytes).max(size * COLUMNS * 4),
            size: (size / 8).trailing_zeros() as usize,
        }
    }

    /// Of the sums of splits.
    pub(super) const fn partial_bytes(&self) -> usize {
        if self.splits == 1 {
            return 0;
        }
        (self.blocks * self.splits * COLUMNS * 4) as usize * (8 << self.size)
    }
}

/// Bytes of workspace, counters included.
pub(super) fn workspace_bytes(matrix: &DeviceMatrix, rows: u32) -> usize {
    COUNTERS_BYTES + Plan::new(matrix, rows).partial_bytes()
}

/// Whether the rows of a matrix are gates and, behind them, as many ups, such that maps by it can end in an activation.
#[must_use]
pub const fn is_gated(matrix: &DeviceMatrix) -> bool {
    matrix.rows.is_multiple_of(2 * PANEL_ROWS)
}

/// See [`Linear`]; at most [`ROWS_MAX`] rows. With an activation `f` the matrix [`is_gated`], and out, `[rows, matrix.rows / 2]`, becomes
/// `f(gate) * up` of the map's columns.
#[must_use]
pub fn linear_small(linear: &Linear, activation: Option<Activation>, workspace: DevicePtr) -> Launch {
    let plan = Plan::new(&linear.matrix, linear.rows);
    let params = LinearSmallParams {
        x: linear.x,
        out: linear.out,
        matrix: linear.matrix.into(),
        bias: linear.bias,
        partial: workspace.offset(COUNTERS_BYTES),
        counters: workspace,
        rows: linear.rows,
        accumulate: linear.accumulate.into(),
        splits: plan.splits,
        split_chunks: plan.split_chunks,
        stage_chunks: plan.stage_chunks,
        activation: activation_number(activation),
    };
    let kernel = KERNELS[usize::from(activation.is_some())][linear.matrix.format as usize][plan.size];
    let splits = if linear.rows == 0 { 0 } else { plan.splits };
    Launch::new(kernel, [plan.blocks, splits, 1], 256, plan.shared_bytes, &params)
}
