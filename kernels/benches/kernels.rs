//! Criterion benches of the CPU device: linear maps of one and many rows for each dtype, and attention.
//! Through the public interface, so that what is timed is what a step pays. Linear maps are also compared with what the
//! machine allows: one row with the speed of reading the weights, many rows with that of the arithmetic.

#![expect(clippy::print_stdout, reason = "benches talk to a terminal")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use galerne_core::dtype::DType;
use galerne_core::graph::Rows;
use galerne_core::ids::{BlockId, TokenId};
use galerne_core::weights::WeightSource as _;
use galerne_kernels::conformance::Build;
use galerne_kernels::cpu::measure::{Arithmetic, ReadBuffer, STREAMS, gop_per_s};
use galerne_kernels::cpu::{CpuDevice, CpuOptions, Isa};
use galerne_kernels::device::{
    Device, KvDtype, KvSpec, LoadOptions, LoadedProgram, Precision, SequenceSlice, StepBatch,
};
use galerne_kernels::program::{AttentionLayer, Instr, WeightId};

const BLOCK_TOKENS: usize = 16;
/// How often a map and what bounds it are timed in turn, and for how long each.
const TURNS: usize = 15;
const TURN: Duration = Duration::from_millis(20);
/// Weights of one-row runs: about a small model.
const WEIGHT_BYTES: usize = 96 << 20;

fn load(device: &CpuDevice, build: &Build, precision: Precision) -> Box<dyn LoadedProgram> {
    let options = LoadOptions {
        precision,
        quantization: None,
        kv: KvSpec {
            blocks: 256,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 512,
        sequences_max: 8,
    };
    device
        .load(&build.program, &build.weights, options)
        .expect("load")
}

fn batch(position: usize, tokens: usize) -> StepBatch {
    let blocks = (0..(position + tokens).div_ceil(BLOCK_TOKENS) as u32)
        .map(BlockId)
        .collect();
    StepBatch {
        tokens: (0..tokens as u32).map(|i| TokenId(i % 50)).collect(),
        sequences: vec![SequenceSlice {
            first_token: 0,
            tokens,
            position: position as u32,
            blocks,
        }],
        generating: usize::from(tokens == 1),
        output_rows: vec![],
    }
}

fn step(program: &mut dyn LoadedProgram, batch: &StepBatch) {
    program
        .submit(black_box(batch))
        .and_then(|()| program.wait())
        .expect("step");
}

/// What the machine allows with all threads.
struct Limits {
    buffer: ReadBuffer,
    threads: NonZeroUsize,
}

impl Limits {
    fn new(threads: usize) -> Self {
        Self {
            buffer: ReadBuffer::new(WEIGHT_BYTES).expect("memory"),
            threads: NonZeroUsize::new(threads).expect("a device has threads"),
        }
    }

    /// The name of what bounds a map and how much of it the machine has now, in units of 1e9 per second: one row is bound
    /// by reading the weights, many by arithmetic. Unless f32 is asked for, a prompt's rows are multiplied in bf16 tiles
    /// where there are any, with weights of all dtypes but f16 and f32; elsewhere with quantized weights as bytes.
    fn look(&self, shape: Shape, dtype: DType, precision: Precision) -> (&'static str, f64) {
        let isa = Isa::detect();
        if shape.rows == 1 {
            let rate = |streams| self.buffer.gb_per_s(isa, self.threads, streams, TURN / 4);
            return (
                "GB/s of memory",
                STREAMS.into_iter().map(rate).fold(0.0, f64::max),
            );
        }
        let rounded = precision == Precision::Auto && !matches!(dtype, DType::F16 | DType::F32);
        [
            (rounded, "GFLOP/s of bf16 tiles", Arithmetic::TileBf16),
            (
                rounded && dtype.block_elements() > 1,
                "GOP/s of int8",
                Arithmetic::Int8,
            ),
            (true, "GFLOP/s of f32", Arithmetic::F32),
        ]
        .into_iter()
        .filter(|&(used, ..)| used)
        .find_map(|(_, what, arithmetic)| Some((what, gop_per_s(arithmetic, isa, self.threads, TURN)?)))
        .expect("f32 runs everywhere")
    }
}

/// The shortest step of one turn.
fn best_step(program: &mut dyn LoadedProgram, batch: &StepBatch) -> Duration {
    let end = Instant::now() + TURN;
    let mut best = Duration::MAX;
    while Instant::now() < end {
        let begin = Instant::now();
        step(program, batch);
        best = best.min(begin.elapsed());
    }
    best
}

/// Widths of a linear map and the rows it gets.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    inner: u32,
    outer: u32,
}

impl Shape {
    /// Bytes of the weights.
    fn bytes(self, dtype: DType) -> usize {
        dtype
            .row_bytes((self.inner * self.outer) as usize)
            .expect("whole blocks")
    }
}

/// One program of so many equal linear maps.
fn linears(shape: Shape, dtype: DType, maps: usize) -> Build {
    let mut build = Build::new(1);
    let x = build.input(shape.inner);
    let out = build.buffer(Rows::Tokens, shape.outer);
    let weight = build.matrix(dtype, shape.outer, shape.inner);
    for map in 0..maps {
        if map > 0 {
            // The same numbers under a name of their own, so in memory of their own: making new ones takes longer than
            // timing them.
            let mut again = build.program.weights[weight.index()].clone();
            let name = format!("{} again {map}", again.parts[0]);
            let (shape, bytes) = {
                let stored = build
                    .weights
                    .weight(&again.parts[0])
                    .expect("in memory")
                    .expect("just made");
                (stored.shape.to_vec(), stored.bytes.to_vec())
            };
            build.weights.insert_bytes(&name, dtype, &shape, bytes);
            again.parts[0] = name;
            build.program.weights.push(again);
        }
        let weight = WeightId(weight.0 + map as u32);
        build.push(Instr::Linear {
            x,
            weight,
            bias: None,
            accumulate: false,
            out,
        });
    }
    build.program.output = out;
    build
}

fn linear(c: &mut Criterion) {
    let device = CpuDevice::new(CpuOptions::default()).expect("device");
    let limits = Limits::new(device.info().threads);
    // Gate and up of the demo model as one map, and for many rows its gate and its down.
    for (rows, inner, outer) in [
        (1, 576, 3_072),
        (8, 576, 3_072),
        (512, 576, 1_536),
        (512, 1_536, 576),
    ] {
        let shape = Shape { rows, inner, outer };
        let mut group = c.benchmark_group(format!("linear {inner} to {outer}, {rows} rows"));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(500));
        for dtype in [
            DType::Q4_1,
            DType::Q4_0,
            DType::Q8_0,
            DType::Bf16,
            DType::F16,
            DType::F32,
        ] {
            let maps = match rows {
                // Bound by reading the weights, so they are more than the caches hold.
                1 => WEIGHT_BYTES.div_ceil(shape.bytes(dtype)),
                8 => 1,
                // So many that waking the workers and making the input count for little.
                _ => 8,
            };
            let build = linears(shape, dtype, maps);
            let operations = 2 * u64::from(inner) * u64::from(outer) * (rows * maps) as u64;
            group.throughput(Throughput::Elements(operations));
            for precision in [Precision::Auto, Precision::F32] {
                let mut program = load(&device, &build, precision);
                let (batch, mut chosen) = (batch(0, rows), false);
                group.bench_function(format!("{dtype} {precision:?}"), |b| {
                    chosen = true;
                    b.iter(|| step(program.as_mut(), &batch));
                });
                if !chosen {
                    continue; // on the command line
                }
                let work = if rows == 1 {
                    maps * shape.bytes(dtype)
                } else {
                    operations as usize
                };
                // In turn: a machine that others use too is not the same for the length of a run.
                let mut turns = [(); TURNS].map(|()| {
                    let s = best_step(program.as_mut(), &batch).as_secs_f64();
                    let rate = work as f64 / s / 1e9;
                    let (what, limit) = limits.look(shape, dtype, precision);
                    (rate / limit, rate, limit, what)
                });
                turns.sort_by(|a, b| a.0.total_cmp(&b.0));
                let (share, rate, limit, what) = turns[TURNS / 2];
                println!(
                    "    {rate:.1}: {:.1}% ({:.1} to {:.1}) of the measured {limit:.1} {what}",
                    100.0 * share,
                    100.0 * turns[0].0,
                    100.0 * turns[TURNS - 1].0,
                );
            }
        }
    }
}

fn attention(c: &mut Criterion) {
    let device = CpuDevice::new(CpuOptions::default()).expect("device");
    let mut build = Build::new(1);
    build.program.context_tokens_max = 4_096;
    build.attention(AttentionLayer {
        heads: 9,
        kv_heads: 3,
        head_width: 64,
        scale: 0.125,
        causal: true,
        sliding_window: None,
        soft_cap: None,
    });
    let mut group = c.benchmark_group("attention, 9 heads of 64, 3 kv heads");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    for (position, tokens) in [(512, 1), (2_048, 1), (0, 256), (1_792, 256)] {
        let mut program = load(&device, &build, Precision::Auto);
        for chunk in (0..position).step_by(256) {
            step(program.as_mut(), &batch(chunk, 256.min(position - chunk)));
        }
        let batch = batch(position, tokens);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(format!("{tokens} tokens after {position}"), |b| {
            b.iter(|| step(program.as_mut(), &batch));
        });
    }
}

criterion_group!(kernels, linear, attention);
criterion_main!(kernels);
