//! How long kernels take, each alone and by the device's clock: launches over several sets of buffers in turn, more than a cache
//! holds. Knows no peer and judges nothing.

use std::sync::Arc;

use galerne_core::graph::Activation;
use galerne_core::ids::BlockId;

use super::attention_plan::{Plan, PlanShape};
use super::driver::{DevicePtr, DeviceView, Driver, DriverError, Launch, Products};
use super::kv::{KvElement, KvLayer};
use super::launch::attention::{Step, Tables, attention};
use super::launch::elementwise::{Elementwise, elementwise};
use super::launch::linear::{self, Linear, Means, gated, linear};
use super::launch::norm::{Kind, norm};
use super::weights::{Packing, WeightFormat};
use crate::device::{Precision, SequenceSlice};
use crate::program::AttentionLayer;

/// Several times the L2 cache of an H200.
const ROTATED_BYTES: usize = 256 << 20;
/// Long against what the first launch adds.
const RUN_SECONDS: f64 = 0.01;
/// Of these the median counts.
const RUNS: usize = 5;
const BLOCK_TOKENS: u32 = 64;

/// How large inputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// As large models have them.
    Full,
    /// To try the code: says nothing of speed.
    Tiny,
}

/// What one kernel took.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// The operation, the dtype of what it reads most of, and its shape.
    pub name: String,
    /// Of one run.
    pub seconds: f64,
    /// Memory that it must read and write.
    pub bytes: usize,
    /// Multiplications and additions, where they are what limits it; else 0.
    pub flops: f64,
}

/// Times all kernels; `found` hears each as it is done.
///
/// # Errors
/// The device failed, or has no memory for the buffers.
pub fn run(driver: &Arc<dyn Driver>, sizes: Sizes, found: &mut dyn FnMut(Timing)) -> Result<(), DriverError> {
    let bench = Bench { driver, sizes };
    found(bench.activation()?);
    found(bench.norm()?);
    let tiny = sizes == Sizes::Tiny;
    let row_counts: &[u32] = if tiny { &[1, 5] } else { &[1, 16, 64] };
    for format in [
        WeightFormat::Bf16,
        WeightFormat::Codes8,
        WeightFormat::Fp8,
        WeightFormat::Codes4,
        WeightFormat::Int4,
        WeightFormat::Nvfp4,
    ] {
        for &rows in row_counts {
            found(bench.linear(format, rows, Way::Kernels)?);
        }
    }
    for format in [WeightFormat::Bf16, WeightFormat::Int4] {
        found(bench.linear(format, row_counts[1], Way::Gated)?);
    }
    // So many that the library takes every format.
    let many = if tiny { 512 } else { 2_048 };
    let products = driver.properties()?.products;
    for format in [WeightFormat::Bf16, WeightFormat::Fp8, WeightFormat::Codes4] {
        found(bench.linear(format, many, Way::Kernels)?);
        if products >= Products::Floats16 {
            found(bench.linear(format, many, Way::Library)?);
        }
    }
    if products == Products::Floats8 {
        found(bench.linear(WeightFormat::Fp8, many, Way::LibraryOf8Bits)?);
    }
    for element in [KvElement::Bf16, KvElement::Fp8] {
        let shapes: &[(u32, u32)] = if tiny {
            &[(3, 70)]
        } else {
            &[(32, 4_096), (64, 2_048)]
        };
        for &(sequences, context) in shapes {
            found(bench.attention(element, (sequences, context - 1, 1))?);
        }
    }
    found(bench.attention(KvElement::Bf16, (1, 0, if tiny { 40 } else { 8_192 }))?);
    Ok(())
}

/// What runs a linear map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Kernels,
    Library,
    /// It, with 8-bit floats on both sides.
    LibraryOf8Bits,
    /// A kernel that ends in the activation of one half of the columns times the other.
    Gated,
}

struct Bench<'a> {
    driver: &'a Arc<dyn Driver>,
    sizes: Sizes,
}

/// Device memory, given back when dropped.
struct Buffer<'a> {
    driver: &'a Arc<dyn Driver>,
    at: DevicePtr,
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // A lost device runs nothing either.
        let _ = self.driver.finish();
        // SAFETY: allocated by `Bench::buffer`, and nothing runs any more.
        unsafe { self.driver.release(self.at) };
    }
}

impl<'a> Bench<'a> {
    fn buffer(&self, content: &[u8]) -> Result<Buffer<'a>, DriverError> {
        let at = self.driver.allocate(content.len())?;
        let buffer = Buffer {
            driver: self.driver,
            at,
        };
        // SAFETY: allocated just now, of this size.
        unsafe { self.driver.write(at, content)? };
        Ok(buffer)
    }

    /// Numbers that are ordinary as f32, bf16 and f16.
    fn numbers(&self, bytes: usize) -> Result<Buffer<'a>, DriverError> {
        let mut state = 1_u32;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 16) as u16 & 0x81ff | 0x3c00).to_le_bytes()
        };
        let content: Vec<u8> = std::iter::repeat_with(next)
            .take(bytes.div_ceil(2))
            .flatten()
            .collect();
        self.buffer(&content)
    }

    fn view(buffer: &Buffer<'_>, width: u32) -> DeviceView {
        DeviceView {
            at: buffer.at,
            stride: width,
            width,
        }
    }

    /// How many sets of buffers are used in turn.
    fn sets(&self, bytes: usize) -> usize {
        match self.sizes {
            Sizes::Full => ROTATED_BYTES / bytes.max(1) + 2,
            Sizes::Tiny => 2,
        }
    }

    /// Seconds of one set's launches. Their order is kept, so that each begins when the one before it is done.
    fn time(&self, sets: &[Vec<Launch>]) -> Result<f64, DriverError> {
        let graph = self.driver.graph(&sets.concat())?;
        let timed = |times: u32| -> Result<f64, DriverError> {
            let seconds = self.driver.time(&mut || {
                // SAFETY: the buffers outlive the graph, and are as large as the launchers were told.
                (0..times).try_for_each(|_| unsafe { graph.enqueue() })
            })?;
            Ok(seconds / f64::from(times) / sets.len() as f64)
        };
        let first = timed(1)?;
        if self.sizes == Sizes::Tiny {
            return Ok(first);
        }
        let one = timed(1)?.max(1e-9) * sets.len() as f64;
        let times = (RUN_SECONDS / one).ceil() as u32;
        let mut runs = (0..RUNS).map(|_| timed(times)).collect::<Result<Vec<_>, _>>()?;
        runs.sort_by(f64::total_cmp);
        Ok(runs[RUNS / 2])
    }

    fn activation(&self) -> Result<Timing, DriverError> {
        let (rows, width) = self.rows_and_width();
        let one = (rows * width * 4) as usize;
        let operands = (0..3 * self.sets(3 * one)).map(|_| self.numbers(one));
        let operands = operands.collect::<Result<Vec<_>, _>>()?;
        let launch = |set: &[Buffer<'_>]| {
            let [gate, up, out] = [0, 1, 2].map(|operand| Self::view(&set[operand], width));
            vec![elementwise(
                Elementwise::ActivateMul(Activation::Silu),
                gate,
                up,
                out,
                rows,
            )]
        };
        let sets: Vec<_> = operands.chunks(3).map(launch).collect();
        Ok(Timing {
            name: format!("silu and product f32 {rows} x {width}"),
            seconds: self.time(&sets)?,
            bytes: 3 * one,
            flops: 0.0,
        })
    }

    fn norm(&self) -> Result<Timing, DriverError> {
        let (rows, width) = self.rows_and_width();
        let one = (rows * width * 4) as usize;
        let weight = self.numbers(width as usize * 4)?;
        let operands = (0..2 * self.sets(2 * one)).map(|_| self.numbers(one));
        let operands = operands.collect::<Result<Vec<_>, _>>()?;
        let launch = |set: &[Buffer<'_>]| {
            let [x, out] = [0, 1].map(|operand| Self::view(&set[operand], width));
            let kind = Kind::Rms { weight_offset: 0.0 };
            vec![norm(
                kind,
                (x, DeviceView::NONE, out),
                weight.at,
                (rows, width),
                1e-5,
            )]
        };
        let sets: Vec<_> = operands.chunks(2).map(launch).collect();
        Ok(Timing {
            name: format!("rms norm f32 {rows} x {width}"),
            seconds: self.time(&sets)?,
            bytes: 2 * one,
            flops: 0.0,
        })
    }

    const fn rows_and_width(&self) -> (u32, u32) {
        match self.sizes {
            Sizes::Full => (4_096, 4_096),
            Sizes::Tiny => (3, 64),
        }
    }

    fn linear(&self, format: WeightFormat, rows: u32, way: Way) -> Result<Timing, DriverError> {
        let (inner, outer) = match self.sizes {
            Sizes::Full => (4_096, 28_672),
            Sizes::Tiny => (128, 64),
        };
        let packing = Packing::with_format(format, outer, inner);
        let matrices = (0..self.sets(packing.bytes())).map(|_| self.numbers(packing.bytes()));
        let matrices = matrices.collect::<Result<Vec<_>, _>>()?;
        let x = self.numbers((rows * inner * 4) as usize)?;
        let out = self.numbers((rows * outer * 4) as usize)?;
        let matrix = packing.matrix(DevicePtr::NULL);
        let workspace = self.buffer(&vec![0; linear::workspace_bytes(&matrix, rows).max(16)])?;
        let means = Means {
            precision: Precision::Auto,
            products: match way {
                Way::Kernels | Way::Gated => Products::None,
                Way::Library => Products::Floats16,
                Way::LibraryOf8Bits => Products::Floats8,
            },
            has_tensor_memory: false,
        };
        let launch = |buffer: &Buffer<'_>| {
            let map = Linear {
                x: Self::view(&x, inner),
                matrix: packing.matrix(buffer.at),
                bias: DevicePtr::NULL,
                accumulate: false,
                out: Self::view(&out, outer),
                rows,
            };
            match way {
                Way::Kernels | Way::Library | Way::LibraryOf8Bits => linear(&map, means, workspace.at),
                Way::Gated => gated(&map, Activation::Silu, means, workspace.at)
                    .into_iter()
                    .collect(),
            }
        };
        let sets: Vec<_> = matrices.iter().map(launch).collect();
        let (by, written) = match way {
            Way::Kernels => ("", outer),
            Way::Library => ("-by-library", outer),
            Way::LibraryOf8Bits => ("-w8a8-by-library", outer),
            Way::Gated => ("-gated", outer / 2),
        };
        Ok(Timing {
            name: format!("linear {format:?}{by} {rows} x {inner} to {outer}").to_lowercase(),
            seconds: self.time(&sets)?,
            bytes: packing.bytes() + (rows * (inner + written) * 4) as usize,
            flops: 2.0 * f64::from(rows) * f64::from(inner) * f64::from(outer),
        })
    }

    /// `(sequences, tokens in the KV blocks, tokens of the step)`.
    fn attention(
        &self,
        element: KvElement,
        (sequences, before, tokens): (u32, u32, u32),
    ) -> Result<Timing, DriverError> {
        let (heads, kv_heads, head_width) = match self.sizes {
            Sizes::Full => (32, 8, 128),
            Sizes::Tiny => (4, 2, 64),
        };
        let layer = AttentionLayer {
            heads,
            kv_heads,
            head_width,
            scale: 1.0 / (head_width as f32).sqrt(),
            causal: true,
            sliding_window: None,
            soft_cap: None,
        };
        let shape = PlanShape::new(&layer, self.driver.properties()?.multiprocessors);
        let keys = before + tokens;
        let blocks_each = keys.div_ceil(BLOCK_TOKENS);
        let lane = |lane: u32| SequenceSlice {
            first_token: (lane * tokens) as usize,
            tokens: tokens as usize,
            position: before,
            blocks: (0..blocks_each)
                .map(|block| BlockId(block * sequences + lane))
                .collect(),
        };
        let slices: Vec<SequenceSlice> = (0..sequences).map(lane).collect();
        let rows = sequences * tokens;
        let (mut plan, mut words) = (Plan::default(), Vec::new());
        shape.plan(&slices, rows as usize, &mut plan);
        plan.encode(&mut words);
        let table: Vec<u32> = slices
            .iter()
            .flat_map(|slice| slice.blocks.iter().map(|block| block.0))
            .collect();
        let (plan, table) = (
            self.buffer(bytemuck::cast_slice(&words))?,
            self.buffer(bytemuck::cast_slice(&table))?,
        );
        let capacity = shape.capacity(rows as usize, sequences as usize);
        let partial = self.numbers(capacity.partial_floats * 4)?;
        let width = heads * head_width;
        let q = self.numbers((rows * width * 4) as usize)?;
        let out = self.numbers((rows * width * 4) as usize)?;
        let block_bytes = KvLayer::bytes_per_block(&layer, BLOCK_TOKENS, element);
        let pool_bytes = block_bytes * (blocks_each * sequences) as usize;
        let pools = (0..self.sets(pool_bytes)).map(|_| self.numbers(pool_bytes));
        let pools = pools.collect::<Result<Vec<_>, _>>()?;
        let step = if tokens == 1 { Step::Decode } else { Step::Mixed };
        let launch = |pool: &Buffer<'_>| {
            let tables = Tables {
                plan: plan.at,
                blocks: table.at,
                blocks_stride: blocks_each,
                partial: partial.at,
            };
            let kv = KvLayer::new(pool.at, block_bytes as u64, &layer, BLOCK_TOKENS, element);
            let views = (Self::view(&q, width), Self::view(&out, width));
            attention(&layer, &shape, views, kv, tables, step)
        };
        let sets: Vec<_> = pools.iter().map(launch).collect();
        let what = if tokens == 1 { "decode" } else { "prefill" };
        let pairs = f64::from(rows) * (f64::from(before) + f64::from(tokens + 1) / 2.0);
        Ok(Timing {
            name: format!("attention {element:?} {what} {sequences} x {keys}").to_lowercase(),
            seconds: self.time(&sets)?,
            bytes: 2 * (sequences * keys * kv_heads * head_width) as usize * element.bytes(),
            flops: if tokens == 1 {
                0.0
            } else {
                4.0 * f64::from(width) * pairs
            },
        })
    }
}
