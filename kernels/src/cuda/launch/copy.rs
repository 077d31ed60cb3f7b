//! Launchers of `copy.cu`: groups of columns, of the same rows or of listed ones.

use bytemuck::{Pod, Zeroable};

use super::{SPREAD_THREADS, spread};
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};

/// The parameter struct, `CopyParams` in `copy.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct CopyParams {
    x: DeviceView,
    out: DeviceView,
    indices: DevicePtr,
    rows: u32,
    group: u32,
    groups: u32,
    x_stride: u32,
    out_stride: u32,
    is_vector: u32,
}

/// Groups of columns: see [`crate::program::Instr::Copy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Columns copied together.
    pub group: u32,
    /// Number of groups.
    pub groups: u32,
    /// Columns between groups in `x`.
    pub x_stride: u32,
    /// Columns between groups in `out`.
    pub out_stride: u32,
}

/// Copies groups of columns of every row; `x` and `out` lie apart.
#[must_use]
pub fn copy_columns(x: DeviceView, out: DeviceView, groups: Groups, rows: u32) -> Launch {
    copy(x, out, DevicePtr::NULL, groups, rows)
}

/// `out[r] = x[indices[r]]` for `indices` `[rows]` u32 on the device, of views as wide as each other that lie apart: output rows, and
/// the first row of each sequence.
#[must_use]
pub fn gather_rows(x: DeviceView, out: DeviceView, indices: DevicePtr, rows: u32) -> Launch {
    let groups = Groups {
        group: out.width,
        groups: 1,
        x_stride: 0,
        out_stride: 0,
    };
    copy(x, out, indices, groups, rows)
}

fn copy(x: DeviceView, out: DeviceView, indices: DevicePtr, groups: Groups, rows: u32) -> Launch {
    let Groups {
        group,
        groups,
        x_stride,
        out_stride,
    } = groups;
    let addresses = [x.at.0, out.at.0];
    let columns = [x.stride, out.stride, group, x_stride, out_stride];
    let is_vector =
        addresses.iter().all(|at| at.is_multiple_of(16)) && columns.iter().all(|n| n.is_multiple_of(4));
    let params = CopyParams {
        x,
        out,
        indices,
        rows,
        group,
        groups,
        x_stride,
        out_stride,
        is_vector: u32::from(is_vector),
    };
    let vectors = if is_vector { group / 4 } else { group } * groups * rows;
    Launch::new(
        "copy_columns",
        [spread(vectors), 1, 1],
        SPREAD_THREADS,
        0,
        &params,
    )
}
