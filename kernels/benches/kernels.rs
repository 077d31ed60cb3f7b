//! Criterion benches of the CPU device: linear maps of one and many rows for each dtype, and attention.
//! Through the public interface, so that what is timed is what a step pays. Linear maps are also compared with what the
//! machine allows: one row with the speed of reading the weights, many rows with that of the arithmetic.

#![expect(clippy::print_stdout, reason = "benches talk to a terminal")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
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
/// Inner and outer width of the linear maps.
const INNER: u32 = 576;
const OUTER: u32 = 3_072;
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

/// What the machine allows with all threads: the best seen so far in this run.
struct Limits {
    buffer: ReadBuffer,
    threads: NonZeroUsize,
    read_gb_per_s: f64,
    f32_gop_per_s: f64,
    int8_gop_per_s: Option<f64>,
    tile_bf16_gop_per_s: Option<f64>,
}

impl Limits {
    fn new(threads: usize) -> Self {
        Self {
            buffer: ReadBuffer::new(WEIGHT_BYTES).expect("memory"),
            threads: NonZeroUsize::new(threads).expect("a device has threads"),
            read_gb_per_s: 0.0,
            f32_gop_per_s: 0.0,
            int8_gop_per_s: None,
            tile_bf16_gop_per_s: None,
        }
    }

    /// Measures again beside each kernel: a machine that others use too is not the same for the length of a run.
    fn look(&mut self) {
        let (isa, time) = (Isa::detect(), Duration::from_millis(50));
        for streams in STREAMS {
            let rate = self.buffer.gb_per_s(isa, self.threads, streams, time);
            self.read_gb_per_s = self.read_gb_per_s.max(rate);
        }
        let gop = |arithmetic| gop_per_s(arithmetic, isa, self.threads, time);
        self.f32_gop_per_s = self.f32_gop_per_s.max(gop(Arithmetic::F32).unwrap_or(0.0));
        for (best, arithmetic) in [
            (&mut self.int8_gop_per_s, Arithmetic::Int8),
            (&mut self.tile_bf16_gop_per_s, Arithmetic::TileBf16),
        ] {
            *best = [*best, gop(arithmetic)].into_iter().flatten().reduce(f64::max);
        }
    }

    /// Unless f32 is asked for, a prompt's rows are multiplied in bf16 tiles where there are any, with weights of all dtypes but
    /// f16 and f32; elsewhere with quantized weights as bytes.
    fn arithmetic(&self, dtype: DType, precision: Precision) -> (&'static str, f64) {
        let f32 = ("GFLOP/s of f32", self.f32_gop_per_s);
        if precision == Precision::F32 || matches!(dtype, DType::F16 | DType::F32) {
            return f32;
        }
        let tiles = self
            .tile_bf16_gop_per_s
            .map(|peak| ("GFLOP/s of bf16 tiles", peak));
        let found = tiles.or_else(|| {
            self.int8_gop_per_s
                .filter(|_| dtype.block_elements() > 1)
                .map(|peak| ("GOP/s of int8", peak))
        });
        found.unwrap_or(f32)
    }
}

/// Times steps and remembers the fastest mean.
fn best_step(b: &mut Bencher<'_>, program: &mut dyn LoadedProgram, batch: &StepBatch, best: &mut Duration) {
    b.iter_custom(|iterations| {
        let begin = Instant::now();
        for _ in 0..iterations {
            step(program, batch);
        }
        let elapsed = begin.elapsed();
        *best = (*best).min(elapsed.div_f64(iterations as f64));
        elapsed
    });
}

/// Bytes of one map's weights.
fn map_bytes(dtype: DType) -> usize {
    dtype.row_bytes((INNER * OUTER) as usize).expect("whole blocks")
}

/// One program of so many equal linear maps.
fn linears(dtype: DType, maps: usize) -> Build {
    let mut build = Build::new(1);
    let x = build.input(INNER);
    let out = build.buffer(Rows::Tokens, OUTER);
    let weight = build.matrix(dtype, OUTER, INNER);
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
    let mut limits = Limits::new(device.info().threads);
    for rows in [1_usize, 8, 512] {
        let mut group = c.benchmark_group(format!("linear {INNER} to {OUTER}, {rows} rows"));
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
                1 => WEIGHT_BYTES.div_ceil(map_bytes(dtype)),
                8 => 1,
                // So many that waking the workers and making the input count for little.
                _ => 8,
            };
            let build = linears(dtype, maps);
            let operations = 2 * u64::from(INNER) * u64::from(OUTER) * (rows * maps) as u64;
            group.throughput(Throughput::Elements(operations));
            for precision in [Precision::Auto, Precision::F32] {
                let mut program = load(&device, &build, precision);
                let (batch, mut best) = (batch(0, rows), Duration::MAX);
                group.bench_function(format!("{dtype} {precision:?}"), |b| {
                    best_step(b, program.as_mut(), &batch, &mut best);
                });
                if best == Duration::MAX {
                    continue; // not chosen on the command line
                }
                limits.look();
                let (s, bytes) = (best.as_secs_f64(), maps * map_bytes(dtype));
                let (what, rate, limit) = if rows == 1 {
                    ("GB/s of memory", bytes as f64 / s / 1e9, limits.read_gb_per_s)
                } else {
                    let (what, peak) = limits.arithmetic(dtype, precision);
                    (what, operations as f64 / s / 1e9, peak)
                };
                println!(
                    "    {rate:.1}: {:.1}% of the measured {limit:.1} {what}",
                    100.0 * rate / limit
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
