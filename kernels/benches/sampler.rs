//! Criterion benches of the CPU device's sampler: rows of 49,152 logits, flat and peaked, under the plans people use.
//! Through the public interface, so that what is timed is what a step pays.

use std::num::NonZeroUsize;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use galerne_core::dtype::DType;
use galerne_core::graph::{EmbeddingIndex, Rows};
use galerne_core::ids::{BlockId, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_kernels::conformance::{Build, Numbers};
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::device::{
    Device, KvDtype, KvSpec, LoadOptions, LoadedProgram, Precision, SampleRequest, SequenceSlice, StepBatch,
    TokenCount,
};
use galerne_kernels::program::Instr;

const VOCABULARY: usize = 49_152;
const ROWS: usize = 32;

/// A loaded program whose 32 output rows are `row`.
fn program(row: &[f32]) -> Box<dyn LoadedProgram> {
    let mut b = Build::new(1);
    let table = b.matrix(DType::F32, 1, VOCABULARY as u32);
    let name = b.program.weights[table.index()].parts[0].clone();
    b.weights.insert(&name, DType::F32, &[1, VOCABULARY as u64], row);
    let out = b.buffer(Rows::Tokens, VOCABULARY as u32);
    let index = EmbeddingIndex::Constant(0);
    b.push(Instr::Embedding { table, index, out });
    b.program.output = out;
    let options = LoadOptions {
        precision: Precision::F32,
        quantization: None,
        kv: KvSpec {
            blocks: 4,
            block_tokens: 16,
            dtype: KvDtype::default(),
        },
        step_tokens_max: ROWS,
        sequences_max: 1,
    };
    let device = CpuDevice::new(CpuOptions {
        threads: NonZeroUsize::new(1),
        isa: None,
    })
    .expect("device");
    let mut program = device.load(&b.program, &b.weights, options).expect("load");
    let batch = StepBatch {
        tokens: vec![TokenId(0); ROWS],
        sequences: vec![SequenceSlice {
            first_token: 0,
            tokens: ROWS,
            position: 0,
            blocks: vec![BlockId(0), BlockId(1)],
        }],
        generating: 0,
        output_rows: vec![],
    };
    program
        .submit(&batch)
        .and_then(|()| program.wait())
        .expect("step");
    program
}

/// Name, plan, top log-probabilities, and whether the sequence has a past.
fn settings() -> Vec<(&'static str, SamplingPlan, Option<u32>, bool)> {
    let plan = |temperature, top_p, top_k| SamplingPlan {
        temperature,
        top_p,
        top_k,
        ..SamplingPlan::default()
    };
    let penalised = SamplingPlan {
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        ..plan(0.7, 0.9, 0)
    };
    let min_p = SamplingPlan {
        min_p: 0.05,
        ..plan(1.0, 1.0, 0)
    };
    vec![
        ("greedy", plan(0.0, 1.0, 0), None, false),
        ("temperature", plan(1.0, 1.0, 0), None, false),
        ("top-p 0.9 at 0.7", plan(0.7, 0.9, 0), None, false),
        ("top-p 0.9 at 1.0", plan(1.0, 0.9, 0), None, false),
        ("top-k 40, top-p 0.9", plan(1.0, 0.9, 40), None, false),
        ("min-p 0.05", min_p, None, false),
        ("top-p with penalties", penalised, None, true),
        ("greedy, log-probabilities", plan(0.0, 1.0, 0), Some(5), false),
    ]
}

/// Name and mask: what a grammar leaves inside a string, between two values, and the worst for packing.
fn masks() -> [(&'static str, Vec<u32>); 3] {
    let words = VOCABULARY / 32;
    let mut most = vec![u32::MAX; words];
    most.iter_mut().step_by(9).for_each(|word| *word = 0xffff_fdff);
    let mut few = vec![0; words];
    few.iter_mut().step_by(100).for_each(|word| *word = 1 << 7);
    let mut numbers = Numbers::new(5);
    let half = (0..words).map(|_| numbers.below(u32::MAX)).collect();
    [("most", most), ("few", few), ("half", half)]
}

fn sampler(c: &mut Criterion) {
    let mut peaked = Numbers::new(1).normals(VOCABULARY, 2.0);
    for (i, logit) in peaked.iter_mut().step_by(977).enumerate() {
        *logit += 12.0 - 0.3 * i as f32;
    }
    let rows = [
        ("peaked", peaked),
        ("normal", Numbers::new(2).normals(VOCABULARY, 2.0)),
        ("flat", Numbers::new(3).normals(VOCABULARY, 0.01)),
    ];
    let seen: Vec<TokenCount> = (0..500)
        .map(|i| TokenCount {
            token: TokenId(i * 97),
            output: i % 3,
        })
        .collect();
    for (shape, row) in rows {
        let mut program = program(&row);
        for (name, mask) in masks() {
            let plan = SamplingPlan::default();
            let mut uniforms = Numbers::new(4);
            c.bench_function(&format!("sample/{shape}/temperature, mask of {name}"), |b| {
                b.iter(|| {
                    let request = SampleRequest {
                        row: 0,
                        plan: &plan,
                        mask: Some(&mask),
                        seen: &[],
                        uniform: uniforms.below(1 << 24) as f32 / (1 << 24) as f32,
                        logprobs: None,
                    };
                    program.sample(&[request]).expect("sample")
                });
            });
        }
        for (name, plan, logprobs, has_past) in settings() {
            let mut uniforms = Numbers::new(4);
            c.bench_function(&format!("sample/{shape}/{name}"), |b| {
                b.iter(|| {
                    let request = SampleRequest {
                        row: 0,
                        plan: &plan,
                        mask: None,
                        seen: if has_past { &seen } else { &[] },
                        uniform: uniforms.below(1 << 24) as f32 / (1 << 24) as f32,
                        logprobs,
                    };
                    program.sample(&[request]).expect("sample")
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400));
    targets = sampler
}
criterion_main!(benches);
