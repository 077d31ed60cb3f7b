//! Launchers of `rope.cu`: rotation of queries in place, and of keys on their way to the KV blocks, with the values.

use bytemuck::{Pod, Zeroable};
use galerne_core::graph::RopePairing;

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::kv::{KvElement, KvLayer};
use crate::cuda::tables::TableAddresses;
use crate::program::RopeSpec;

const THREADS: u32 = 256;
const LANES: u32 = 32;

/// The parameter struct, `RopeParams` in `rope.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct RopeParams {
    q: DeviceView,
    k: DeviceView,
    v: DeviceView,
    kv: KvLayer,
    q_table: DevicePtr,
    k_table: DevicePtr,
    positions: DevicePtr,
    owners: DevicePtr,
    block_table: DevicePtr,
    rows: u32,
    heads: u32,
    head_width: u32,
    q_pairs: u32,
    k_pairs: u32,
    q_interleaved: u32,
    k_interleaved: u32,
    blocks_stride: u32,
    is_vector: u32,
    reserved: u32,
}

/// A rotation whose table is on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// What [`table`] made.
    pub table: DevicePtr,
    /// Rotated pairs of a head.
    pub pairs: u32,
    /// Which.
    pub pairing: RopePairing,
}

impl Rotation {
    /// A rotation as `rope.cu` takes it: the table, its pairs, whether they lie side by side.
    fn parts(rotation: Option<Self>) -> (DevicePtr, u32, u32) {
        rotation.map_or((DevicePtr::NULL, 0, 0), |rotation| {
            let is_interleaved = rotation.pairing == RopePairing::Interleaved;
            (rotation.table, rotation.pairs, u32::from(is_interleaved))
        })
    }
}

/// Cosines and sines of all positions below `positions`: `[positions, 2, pairs]` f32, of angles rounded to f32 as in the models' own
/// implementation.
#[must_use]
pub fn table(spec: &RopeSpec, positions: u32) -> Vec<f32> {
    let pairs = spec.inv_freq.len();
    let mut table = vec![0.0; positions as usize * 2 * pairs];
    for (position, row) in (0..positions).zip(table.chunks_exact_mut(2 * pairs)) {
        let (cosines, sines) = row.split_at_mut(pairs);
        for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&spec.inv_freq) {
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            *cosine = c as f32 * spec.attention_factor;
            *sine = s as f32 * spec.attention_factor;
        }
    }
    table
}

/// Rotates every head of `x`, `[rows, heads * head_width]`, in place. Rows of padding stay.
#[must_use]
pub fn rope(
    x: DeviceView,
    rotation: Rotation,
    head_width: u32,
    rows: u32,
    tables: &TableAddresses,
) -> Launch {
    let nothing = KvLayer::zeroed();
    launch(
        [x, DeviceView::NONE, DeviceView::NONE],
        [Some(rotation), None],
        (nothing, head_width),
        rows,
        tables,
    )
}

/// Rotates `q` in place and appends `k`, rotated, and `v` to the layer's blocks: see [`crate::program::Instr::RopeAppend`]. `k` is left
/// as it is. Rows of padding are left alone.
#[must_use]
pub fn rope_append(
    (q, k, v): (DeviceView, DeviceView, DeviceView),
    (q_rope, k_rope): (Option<Rotation>, Option<Rotation>),
    layer: KvLayer,
    rows: u32,
    tables: &TableAddresses,
) -> Launch {
    launch(
        [q, k, v],
        [q_rope, k_rope],
        (layer, layer.head_width),
        rows,
        tables,
    )
}

fn launch(
    [q, k, v]: [DeviceView; 3],
    [q_rope, k_rope]: [Option<Rotation>; 2],
    (kv, head_width): (KvLayer, u32),
    rows: u32,
    tables: &TableAddresses,
) -> Launch {
    let (q_table, q_pairs, q_interleaved) = Rotation::parts(q_rope);
    let (k_table, k_pairs, k_interleaved) = Rotation::parts(k_rope);
    let is_vector = [q, k, v].into_iter().all(DeviceView::is_vector_aligned)
        && [head_width, q_pairs, k_pairs]
            .iter()
            .all(|columns| columns.is_multiple_of(4));
    let heads = q.width / head_width;
    let params = RopeParams {
        q,
        k,
        v,
        kv,
        q_table,
        k_table,
        positions: tables.positions,
        owners: tables.owners,
        block_table: tables.blocks,
        rows,
        heads,
        head_width,
        q_pairs,
        k_pairs,
        q_interleaved,
        k_interleaved,
        blocks_stride: tables.blocks_stride,
        is_vector: u32::from(is_vector),
        reserved: 0,
    };
    let kernel = match kv.element() {
        KvElement::F32 => "rope_append_f32",
        KvElement::Bf16 => "rope_append_bf16",
        KvElement::F16 => "rope_append_f16",
        KvElement::Int8 => "rope_append_int8",
        KvElement::Fp8 => "rope_append_fp8",
    };
    let vectors = heads * if is_vector { q_pairs / 4 } else { q_pairs };
    let jobs = vectors.div_ceil(LANES) + 2 * kv.kv_heads;
    Launch::new(
        kernel,
        [rows, jobs.div_ceil(THREADS / LANES), 1],
        THREADS,
        0,
        &params,
    )
}
