//! Launcher of the `attention_*.cu` kernels: attention of rows over a layer's paged keys and values, by a plan on the device.

use bytemuck::{Pod, Zeroable};

use crate::cuda::attention_plan::{Plan, PlanShape};
use crate::cuda::driver::{DevicePtr, DeviceView, Launch, TensorMap};
use crate::cuda::kv::{KvElement, KvLayer};
use crate::program::AttentionLayer;

const THREADS: u32 = 128;
const WARPS: u32 = THREADS / 32;
/// Keys that `attention_prefill_sm90` copies at once.
const PLACE_KEYS: u32 = 128;

/// The parameter struct, `AttentionParams` in `attention.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct AttentionParams {
    q: DeviceView,
    out: DeviceView,
    kv: KvLayer,
    plan: DevicePtr,
    block_table: DevicePtr,
    partial: DevicePtr,
    blocks_stride: u32,
    slots_at: u32,
    group: u32,
    window: u32,
    is_causal: u32,
    block_shift: u32,
    scale: f32,
    soft_cap: f32,
}

/// The parameter struct of `attention_prefill_sm90.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AttentionSm90Params {
    attention: AttentionParams,
    box_rows: u32,
    block_rows: u32,
    /// Written by the driver.
    pool: [u8; TensorMap::BYTES],
}

/// What a step keeps on the device for attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tables {
    /// The plan of the layer's shape, as [`Plan::encode`] writes it.
    pub plan: DevicePtr,
    /// `[sequences, blocks_stride]` block numbers by position.
    pub blocks: DevicePtr,
    /// Most blocks of a sequence.
    pub blocks_stride: u32,
    /// Partial results: [`crate::cuda::attention_plan::PlanCapacity::partial_floats`] f32, 16-byte aligned.
    pub partial: DevicePtr,
}

/// What is known of a step's sequences when its launches are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// One token of each.
    Decode,
    /// Any number of tokens.
    Mixed,
}

/// `out = attention(q)` over the layer's keys and values, for all rows of the plan; rows of padding become zeros.
/// `q` and `out` are `[rows, heads * head_width]`.
#[must_use]
pub fn attention(
    layer: &AttentionLayer,
    shape: &PlanShape,
    (q, out): (DeviceView, DeviceView),
    kv: KvLayer,
    tables: Tables,
    step: Step,
) -> Vec<Launch> {
    let params = AttentionParams {
        q,
        out,
        kv,
        plan: tables.plan,
        block_table: tables.blocks,
        partial: tables.partial,
        blocks_stride: tables.blocks_stride,
        slots_at: 0,
        group: shape.group,
        window: shape.sliding_window.unwrap_or(u32::MAX),
        is_causal: u32::from(shape.causal),
        block_shift: if kv.block_tokens.is_power_of_two() {
            kv.block_tokens.trailing_zeros()
        } else {
            32
        },
        scale: layer.scale,
        soft_cap: layer.soft_cap.unwrap_or(0.0),
    };
    let tiles: &[bool] = match step {
        Step::Decode if shape.decodes_in_small_tiles() => &[true],
        Step::Decode => &[false],
        Step::Mixed => &[true, false],
    };
    let part = |&is_small: &bool| {
        let slots_at = Plan::slots_at(shape, is_small);
        tile_launch(shape, is_small, &AttentionParams { slots_at, ..params })
    };
    let mut launches: Vec<Launch> = tiles.iter().map(part).collect();
    let grid = [shape.slots[0], shape.kv_heads, 1];
    launches.push(Launch::new("attention_merge", grid, THREADS, 0, &params));
    launches
}

/// The shape with the tiles of `attention_prefill_sm90`, if that kernel takes the layer's keys and values. Only for devices of
/// architecture `sm_90a`. It has never run on one: nobody asks for it until it has.
#[must_use]
pub fn with_warpgroups(shape: PlanShape, kv: &KvLayer, multiprocessors: u32) -> PlanShape {
    match Fast::of(kv) {
        Some(fast) if fast.has_warpgroups() => shape.with_warpgroups(multiprocessors),
        _ => shape,
    }
}

fn tile_launch(shape: &PlanShape, is_small: bool, params: &AttentionParams) -> Launch {
    let grid = [shape.slots[usize::from(!is_small)], shape.kv_heads, 1];
    match Fast::of(&params.kv) {
        Some(fast) if is_small => fast.decode(grid, params),
        Some(fast) if shape.has_warpgroups() => fast.prefill_sm90(grid, params),
        Some(fast) => fast.prefill(grid, params),
        None => exact(grid, params),
    }
}

/// Any shape, in f32.
fn exact(grid: [u32; 3], params: &AttentionParams) -> Launch {
    let kernel = match params.kv.element() {
        KvElement::F32 => "attention_exact_f32",
        KvElement::Bf16 => "attention_exact_bf16",
        KvElement::F16 => "attention_exact_f16",
        KvElement::Int8 => "attention_exact_int8",
        KvElement::Fp8 => "attention_exact_fp8",
    };
    let shared_bytes = WARPS * (32 * 8 + 32 * 4 + 2 * params.kv.head_width * 4);
    Launch::new(kernel, grid, THREADS, shared_bytes, params)
}

/// The tensor core kernels' instance for a layer: they take rows of whole 16-byte pieces, at most 256 wide.
struct Fast {
    element: KvElement,
    /// Index of the element and of the padded width in the tables of names.
    index: (usize, usize),
    /// Head width the instance is compiled for.
    width: u32,
}

const WIDTHS: [u32; 4] = [64, 96, 128, 256];

impl Fast {
    fn of(kv: &KvLayer) -> Option<Self> {
        let element = kv.element();
        let number = match element {
            KvElement::F32 => return None,
            KvElement::Bf16 => 0,
            KvElement::F16 => 1,
            KvElement::Int8 => 2,
            KvElement::Fp8 => 3,
        };
        let row_bytes = kv.head_width * element.bytes() as u32;
        let is_aligned = [u64::from(row_bytes), kv.bytes.0, kv.block_bytes]
            .iter()
            .all(|n| n.is_multiple_of(16));
        let index = WIDTHS.iter().position(|&width| kv.head_width <= width)?;
        is_aligned.then_some(Self {
            element,
            index: (number, index),
            width: WIDTHS[index],
        })
    }

    /// Bytes in shared memory of as many keys and their values, with padding and scales.
    const fn stage_bytes(&self, keys: u32) -> u32 {
        let row_bytes = self.width * self.element.bytes() as u32 + 16;
        let scales = match self.element {
            KvElement::Int8 => 2 * keys * 4,
            _ => 0,
        };
        2 * keys * row_bytes + scales
    }

    fn has_warpgroups(&self) -> bool {
        self.element.bytes() == 2 && matches!(self.width, 64 | 128)
    }

    fn decode(&self, grid: [u32; 3], params: &AttentionParams) -> Launch {
        const NAMES: [[&str; 4]; 4] = [
            [
                "attention_decode_bf16_64",
                "attention_decode_bf16_96",
                "attention_decode_bf16_128",
                "attention_decode_bf16_256",
            ],
            [
                "attention_decode_f16_64",
                "attention_decode_f16_96",
                "attention_decode_f16_128",
                "attention_decode_f16_256",
            ],
            [
                "attention_decode_int8_64",
                "attention_decode_int8_96",
                "attention_decode_int8_128",
                "attention_decode_int8_256",
            ],
            [
                "attention_decode_fp8_64",
                "attention_decode_fp8_96",
                "attention_decode_fp8_128",
                "attention_decode_fp8_256",
            ],
        ];
        let stages = if self.element.bytes() == 1 { 6 } else { 3 };
        let shared_bytes = WARPS * stages * self.stage_bytes(16);
        Launch::new(
            NAMES[self.index.0][self.index.1],
            grid,
            THREADS,
            shared_bytes,
            params,
        )
    }

    fn prefill(&self, grid: [u32; 3], params: &AttentionParams) -> Launch {
        const NAMES: [[&str; 4]; 4] = [
            [
                "attention_prefill_bf16_64",
                "attention_prefill_bf16_96",
                "attention_prefill_bf16_128",
                "attention_prefill_bf16_256",
            ],
            [
                "attention_prefill_f16_64",
                "attention_prefill_f16_96",
                "attention_prefill_f16_128",
                "attention_prefill_f16_256",
            ],
            [
                "attention_prefill_int8_64",
                "attention_prefill_int8_96",
                "attention_prefill_int8_128",
                "attention_prefill_int8_256",
            ],
            [
                "attention_prefill_fp8_64",
                "attention_prefill_fp8_96",
                "attention_prefill_fp8_128",
                "attention_prefill_fp8_256",
            ],
        ];
        // Queries of 64 rows in 16 bits.
        let queries = if self.width > 128 { 64 * self.width * 2 } else { 0 };
        let shared_bytes = 2 * self.stage_bytes(64) + queries;
        Launch::new(
            NAMES[self.index.0][self.index.1],
            grid,
            THREADS,
            shared_bytes,
            params,
        )
    }
    fn prefill_sm90(&self, grid: [u32; 3], params: &AttentionParams) -> Launch {
        let kernel = match (self.element, self.width) {
            (KvElement::Bf16, 64) => "attention_prefill_sm90_bf16_64",
            (KvElement::Bf16, _) => "attention_prefill_sm90_bf16_128",
            (_, 64) => "attention_prefill_sm90_f16_64",
            _ => "attention_prefill_sm90_f16_128",
        };
        // Four places of 128 rows, at a multiple of 1,024 bytes, and their barriers.
        let shared_bytes = 1_024 + 4 * PLACE_KEYS * self.width * 2 + 64;
        let kv = &params.kv;
        let row_bytes = kv.head_width * 2;
        // A pool is a matrix if blocks are whole rows apart, and boxes fill places if both are powers of two.
        let is_matrix = kv.block_bytes.is_multiple_of(u64::from(row_bytes))
            && kv.block_tokens.is_power_of_two()
            && kv.block_tokens >= 8;
        let block_rows = u32::try_from(kv.block_bytes / u64::from(row_bytes));
        let (box_rows, block_rows) = match block_rows {
            Ok(rows) if is_matrix => (kv.block_tokens.min(PLACE_KEYS), rows),
            _ => (0, 0),
        };
        let all = AttentionSm90Params {
            attention: *params,
            box_rows,
            block_rows,
            pool: [0; TensorMap::BYTES],
        };
        let launch = Launch::new(kernel, grid, 384, shared_bytes, &all);
        if box_rows == 0 {
            return launch;
        }
        launch.with_tensor_map(TensorMap {
            at: std::mem::offset_of!(AttentionSm90Params, pool),
            base: kv.bytes,
            width: kv.head_width,
            box_rows,
        })
    }
}
