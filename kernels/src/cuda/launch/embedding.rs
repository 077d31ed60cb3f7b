//! Launcher of `embedding.cu`: rows of a table, by numbers that lie on the device.

use bytemuck::{Pod, Zeroable};
use galerne_core::graph::EmbeddingIndex;

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::{DeviceMatrix, MatrixParams};

/// The parameter struct, `EmbeddingParams` in `embedding.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct EmbeddingParams {
    out: DeviceView,
    table: MatrixParams,
    index: DevicePtr,
    offset: u32,
    first: u32,
}

/// `out[r] = table[index of r]` for the rows whose entry is among `first .. first + table.rows`; the others are left
/// alone, so that a table in several formats takes one launch per part. `tokens` and `positions` are `[rows]` u32.
#[must_use]
pub fn embedding(
    (table, first): (DeviceMatrix, u32),
    index: EmbeddingIndex,
    (tokens, positions): (DevicePtr, DevicePtr),
    out: DeviceView,
    rows: u32,
) -> Launch {
    let (index, offset) = match index {
        EmbeddingIndex::Tokens => (tokens, 0),
        EmbeddingIndex::Positions(offset) => (positions, offset),
        EmbeddingIndex::Constant(entry) => (DevicePtr::NULL, entry),
    };
    let params = EmbeddingParams {
        out,
        table: table.into(),
        index,
        offset,
        first,
    };
    let threads = table.width.div_ceil(8).next_multiple_of(32).clamp(32, 256);
    Launch::new("embedding", [rows, 1, 1], threads, 0, &params)
}
