//! Criterion benches of the CPU device: linear maps of one and many rows for each dtype, and attention.
//! Through the public interface, so that what is timed is what a step pays.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use galerne_core::dtype::DType;
use galerne_core::graph::Rows;
use galerne_core::ids::{BlockId, TokenId};
use galerne_kernels::conformance::Build;
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::device::{
    Device, KvDtype, KvSpec, LoadOptions, LoadedProgram, Precision, SequenceSlice, StepBatch,
};
use galerne_kernels::program::{AttentionLayer, Instr};

const BLOCK_TOKENS: usize = 16;

fn load(device: &CpuDevice, build: &Build, precision: Precision) -> Box<dyn LoadedProgram> {
    let options = LoadOptions {
        precision,
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
        output_rows: vec![],
    }
}

fn step(program: &mut dyn LoadedProgram, batch: &StepBatch) {
    program
        .submit(black_box(batch))
        .and_then(|()| program.wait())
        .expect("step");
}

fn linear(c: &mut Criterion) {
    let device = CpuDevice::new(CpuOptions::default()).expect("device");
    let (inner, outer) = (576, 3_072);
    for rows in [1usize, 8, 256] {
        let mut group = c.benchmark_group(format!("linear {inner} to {outer}, {rows} rows"));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(500));
        group.throughput(Throughput::Elements(
            2 * u64::from(inner) * u64::from(outer) * rows as u64,
        ));
        for dtype in [
            DType::Q4_1,
            DType::Q4_0,
            DType::Q8_0,
            DType::Bf16,
            DType::F16,
            DType::F32,
        ] {
            for precision in [Precision::Auto, Precision::F32] {
                let mut build = Build::new(1);
                let x = build.input(inner);
                let weight = build.matrix(dtype, outer, inner);
                let out = build.buffer(Rows::Tokens, outer);
                build.push(Instr::Linear {
                    x,
                    weight,
                    bias: None,
                    accumulate: false,
                    out,
                });
                build.program.output = out;
                let mut program = load(&device, &build, precision);
                let batch = batch(0, rows);
                group.bench_function(format!("{dtype} {precision:?}"), |b| {
                    b.iter(|| step(program.as_mut(), &batch));
                });
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
