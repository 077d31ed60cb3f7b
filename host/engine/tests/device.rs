//! Lowered programs on the CPU device and on the CUDA device, whose kernels the shim runs, in f32, against graphs in f64; and
//! whole generations on both.

mod numeric;
mod support;

use std::sync::Arc;

use galerne_core::ids::{BlockId, TenantId, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_core::validate::ValidGraph;
use galerne_cuda_shim::{Lazy, Shim};
use galerne_engine::handle::{EngineHandle, EngineOptions, start};
use galerne_engine::lowering::lower;
use galerne_engine::request::{Request, Sampling};
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::cuda::CudaDevice;
use galerne_kernels::device::{
    Device, DeviceError, KvDtype, KvSpec, LoadOptions, LoadedProgram, MemoryUse, Precision, SampleOutcome,
    SampleRequest, SequenceSlice, StepBatch,
};

use proptest::prelude::*;

use numeric::Weights;
use numeric::build::{Family, VOCABULARY, arbitrary, decoder, encoder};
use support::proposer::Proposer;
use support::{Record, limits, request};

const BLOCK_TOKENS: usize = 4;

fn families() -> [(&'static str, Family); 6] {
    let none = Family::default();
    [
        ("llama", none),
        (
            "qwen2",
            Family {
                qkv_bias: true,
                ..none
            },
        ),
        (
            "qwen3",
            Family {
                head_norms: true,
                ..none
            },
        ),
        ("gemma", Family { gemma: true, ..none }),
        (
            "mixtral",
            Family {
                experts: true,
                ..none
            },
        ),
        (
            "phi",
            Family {
                parallel: true,
                ..none
            },
        ),
    ]
}

/// A device of every machine.
#[derive(Debug, Clone, Copy)]
enum On {
    Cpu,
    CudaShim,
    /// The same, but nothing runs before it is waited for, as on a GPU that is busy.
    CudaLazy,
}

impl On {
    const ALL: [Self; 3] = [Self::Cpu, Self::CudaShim, Self::CudaLazy];

    fn device(self) -> Box<dyn Device> {
        match self {
            Self::Cpu => {
                let options = CpuOptions {
                    threads: std::num::NonZeroUsize::new(2),
                    isa: None,
                };
                Box::new(CpuDevice::new(options).expect("every machine has a CPU"))
            }
            Self::CudaShim => {
                Box::new(CudaDevice::new(Arc::new(Shim::new(3))).expect("the shim always opens"))
            }
            Self::CudaLazy => {
                Box::new(CudaDevice::new(Arc::new(Lazy::new(4))).expect("the shim always opens"))
            }
        }
    }
}

fn load(on: On, graph: &ValidGraph, weights: &Weights, blocks: usize) -> Box<dyn LoadedProgram> {
    let device = on.device();
    let options = LoadOptions {
        precision: Precision::F32,
        quantization: None,
        kv: KvSpec {
            blocks,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 32,
        sequences_max: 4,
    };
    device
        .load(&lower(graph).expect("within limits"), weights, options)
        .expect("the program loads")
}

/// Parts of sequences: tokens, first position, blocks.
type Part<'a> = (&'a [u32], u32, &'a [u32]);

/// Runs one step that wants every row, and compares the rows with those expected.
fn step(program: &mut dyn LoadedProgram, parts: &[Part<'_>], expected: &[Vec<Vec<f64>>], what: &str) {
    let mut batch = StepBatch::default();
    for (tokens, position, blocks) in parts {
        batch.sequences.push(SequenceSlice {
            first_token: batch.tokens.len(),
            tokens: tokens.len(),
            position: *position,
            blocks: blocks.iter().copied().map(BlockId).collect(),
        });
        batch.tokens.extend(tokens.iter().copied().map(TokenId));
    }
    batch.output_rows = (0..batch.tokens.len()).collect();
    program.submit(&batch).expect("a sound batch");
    program.wait().expect("the device works");
    let got = program.read_output().expect("the device works");
    let mut rows = got.chunks_exact(VOCABULARY as usize);
    for (which, (tokens, position, _)) in parts.iter().enumerate() {
        for offset in 0..tokens.len() {
            let row = rows.next().expect("one row per token");
            let position = *position as usize + offset;
            for (column, (e, g)) in expected[which][position].iter().zip(row).enumerate() {
                // f32 sums of at most 40 products in other orders than f64's, over two layers.
                let close = (e - f64::from(*g)).abs() <= 2e-4 * (1.0 + e.abs());
                assert!(
                    close,
                    "{what}: sequence {which}, position {position}, token {column}: {e}, {g}"
                );
            }
        }
    }
    assert_eq!(rows.next(), None, "{what}: rows beyond those wanted");
}

#[test]
fn logits_are_the_graphs_whole_chunked_and_batched() {
    let (a, b) = ([3_u32, 14, 15, 9, 26, 5, 3, 5], [7_u32, 7, 28, 0, 1, 1]);
    let all = |tokens: &[u32]| (0..tokens.len()).collect::<Vec<_>>();
    let cases = On::ALL
        .into_iter()
        .flat_map(|on| families().map(|family| (on, family)));
    for (on, (name, family)) in cases {
        let (graph, weights) = decoder(family);
        let expected = [&a[..], &b].map(|tokens| numeric::graph::run(&graph, &weights, tokens, &all(tokens)));
        let mut program = load(on, &graph, &weights, 8);
        step(
            &mut *program,
            &[(&a, 0, &[5, 2])],
            &expected[..1],
            &format!("{on:?}: {name} whole"),
        );
        let parts: [Part<'_>; 2] = [(&a[..3], 0, &[1]), (&b[..5], 0, &[7, 0])];
        step(
            &mut *program,
            &parts,
            &expected,
            &format!("{on:?}: {name} first chunks"),
        );
        let parts: [Part<'_>; 2] = [(&a[3..4], 3, &[1]), (&b[5..], 5, &[7, 0])];
        step(
            &mut *program,
            &parts,
            &expected,
            &format!("{on:?}: {name} decode"),
        );
        let parts: [Part<'_>; 1] = [(&a[4..], 4, &[1, 6])];
        step(
            &mut *program,
            &parts,
            &expected,
            &format!("{on:?}: {name} last chunk"),
        );
    }
}

#[test]
fn an_encoder_pools_each_sequence_of_a_batch() {
    On::ALL.into_iter().for_each(encoder_pools);
}

fn encoder_pools(on: On) {
    let (graph, weights) = encoder();
    let mut program = load(on, &graph, &weights, 8);
    let sequences = [vec![3_u32, 14, 15, 9, 26], vec![7, 7, 28]];
    let mut batch = StepBatch::default();
    for (tokens, blocks) in sequences
        .iter()
        .zip([vec![BlockId(3), BlockId(0)], vec![BlockId(6)]])
    {
        let first_token = batch.tokens.len();
        batch.sequences.push(SequenceSlice {
            first_token,
            tokens: tokens.len(),
            position: 0,
            blocks,
        });
        batch.tokens.extend(tokens.iter().copied().map(TokenId));
    }
    program.submit(&batch).expect("a sound batch");
    program.wait().expect("the device works");
    let got = program.read_output().expect("the device works");
    let expected: Vec<f64> = sequences
        .iter()
        .flat_map(|tokens| numeric::graph::run(&graph, &weights, tokens, &[]).remove(0))
        .collect();
    assert_eq!(expected.len(), got.len());
    for (column, (e, g)) in expected.iter().zip(&got).enumerate() {
        assert!(
            (e - f64::from(*g)).abs() <= 2e-4,
            "{on:?}: column {column}: {e}, {g}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    // Values of arbitrary graphs may be too wild to compare in f32; that the device accepts and runs whatever
    // is lowered is what matters here. `lowering.rs` compares them in f64.
    #[test]
    fn devices_run_whatever_is_lowered(choices in proptest::collection::vec(any::<[u16; 4]>(), 1..28)) {
        let (graph, weights) = arbitrary(&choices);
        let batch = StepBatch {
            tokens: [3, 14, 15, 9, 26].map(TokenId).to_vec(),
            sequences: vec![SequenceSlice {
                first_token: 0,
                tokens: 5,
                position: 0,
                blocks: vec![BlockId(1), BlockId(4)],
            }],
            generating: 0,
            output_rows: vec![1, 4],
        };
        for on in On::ALL {
            let mut program = load(on, &graph, &weights, 8);
            program.submit(&batch).expect("a sound batch");
            program.wait().expect("the device works");
            let rows = program.read_output().expect("the device works").len();
            prop_assert_eq!(rows, 2 * VOCABULARY as usize);
        }
    }
}

fn engine(on: On, graph: &ValidGraph, weights: &Weights, blocks: usize) -> EngineHandle {
    // Fewer tokens a step than a prompt has: prefill comes in chunks, some without an output.
    engine_with_steps(on, graph, weights, (blocks, 7))
}

fn engine_with_steps(
    on: On,
    graph: &ValidGraph,
    weights: &Weights,
    (blocks, step_tokens): (usize, usize),
) -> EngineHandle {
    start_with(load(on, graph, weights, blocks), graph, (blocks, step_tokens))
}

fn start_with(
    program: Box<dyn LoadedProgram>,
    graph: &ValidGraph,
    (blocks, step_tokens): (usize, usize),
) -> EngineHandle {
    let options = EngineOptions {
        limits: limits(blocks, BLOCK_TOKENS, step_tokens, 4),
        check_integrity: true,
        ..EngineOptions::default()
    };
    start(program, VOCABULARY, graph.graph().context_tokens_max, options)
}

/// Submits all prompts at once; their greedy tokens.
fn generate(engine: &EngineHandle, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    generate_all(engine, prompts.iter().map(|prompt| request(prompt, 12)))
}

/// Submits all requests at once; their tokens.
fn generate_all(engine: &EngineHandle, requests: impl Iterator<Item = Request>) -> Vec<Vec<u32>> {
    submit_all(engine, requests).iter().map(Record::tokens).collect()
}

/// Submits all requests at once and waits for their ends.
fn submit_all(engine: &EngineHandle, requests: impl Iterator<Item = Request>) -> Vec<Record> {
    let submit = |request: Request| {
        let record = Record::default();
        engine.submit(request, record.sink()).expect("accepted");
        record
    };
    let records: Vec<_> = requests.map(submit).collect();
    while records.iter().any(|record| record.end().is_none()) {
        assert!(engine.is_alive(), "the engine has ended: {:?}", engine.stats());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    engine.check_integrity().expect("sound");
    records
}

#[test]
fn generations_do_not_depend_on_device_batch_cache_or_preemption() {
    On::ALL.into_iter().for_each(generations);
}

fn generations(on: On) {
    let (graph, weights) = decoder(Family {
        head_norms: true,
        ..Family::default()
    });
    let prompts: Vec<Vec<u32>> = (0..6_u32)
        .map(|i| (0..5 + i).map(|p| (p * p + i / 2) % VOCABULARY).collect())
        .collect();
    let roomy = engine(on, &graph, &weights, 64);
    let together = generate(&roomy, &prompts);
    let cached = generate(&roomy, &prompts);
    assert!(roomy.stats().prefix_hit_tokens > 0, "{:?}", roomy.stats());
    let tight = engine(on, &graph, &weights, 7);
    let preempted = generate(&tight, &prompts);
    assert!(tight.stats().preemptions > 0, "{:?}", tight.stats());
    let runs_ahead = !matches!(on, On::Cpu);
    assert_eq!(roomy.stats().steps_ahead > 0, runs_ahead, "{:?}", roomy.stats());
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = engine(on, &graph, &weights, 64);
        let single = generate(&alone, std::slice::from_ref(prompt)).remove(0);
        assert_eq!(
            single,
            greedy(&graph, &weights, prompt, 12),
            "{on:?}: sequence {i} and the graph"
        );
        assert_eq!(
            (&single, &single),
            (&together[i], &cached[i]),
            "{on:?}: sequence {i}"
        );
        assert_eq!(single, preempted[i], "{on:?}: sequence {i}");
    }
}

#[test]
fn guesses_change_no_token_and_save_steps() {
    [On::Cpu, On::CudaLazy].into_iter().for_each(guesses);
}

fn guesses(on: On) {
    let (graph, weights) = decoder(Family::default());
    let plan = |temperature| SamplingPlan {
        temperature,
        ..SamplingPlan::default()
    };
    let requests = |with_guests: bool| {
        (0..6_u32).map(move |i| {
            let prompt: Vec<u32> = (0..5 + i).map(|p| (p * p + i / 2) % VOCABULARY).collect();
            let rule = plan(if i % 3 == 2 { 0.2 } else { 0.0 });
            let sampling = if with_guests {
                Sampling::Guest(Box::new(Proposer::by_bigrams(rule, [0; 3], &prompt)))
            } else {
                Sampling::Plan(rule)
            };
            Request {
                sampling,
                ..request(&prompt, 40)
            }
        })
    };
    let run = |sizes, with_guests| {
        let engine = engine_with_steps(on, &graph, &weights, sizes);
        let tokens = generate_all(&engine, requests(with_guests));
        (tokens, engine.stats())
    };
    let (plain, _) = run((96, 32), false);
    let (roomy, stats) = run((96, 32), true);
    let (tight, tight_stats) = run((24, 7), true);
    assert_eq!((&plain, &plain), (&roomy, &tight), "{on:?}");
    assert!(tight_stats.preemptions > 0, "{on:?}: {tight_stats:?}");
    let (accepted, proposed) = (stats.tokens_accepted, stats.tokens_proposed);
    assert!(0 < accepted && accepted < proposed, "{on:?}: {stats:?}");
    // One after the other: how many steps sequences share depends on when they come.
    let steps = |with_guests| {
        let engine = engine_with_steps(on, &graph, &weights, (96, 32));
        for request in requests(with_guests) {
            generate_all(&engine, std::iter::once(request));
        }
        engine.stats().steps
    };
    let (plain_steps, guessing_steps) = (steps(false), steps(true));
    assert_eq!(plain_steps, 6 * 40, "{on:?}");
    assert!(
        guessing_steps + accepted / 2 < plain_steps,
        "{on:?}: {guessing_steps} steps"
    );
}

/// A program that does not run ahead.
struct InTurn(Box<dyn LoadedProgram>);

impl LoadedProgram for InTurn {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.0.submit(batch)
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        self.0.wait()
    }

    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
        self.0.sample(requests)
    }

    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
        self.0.read_output()
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
        self.0.copy_blocks(pairs)
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.0.zero_blocks(blocks)
    }

    fn memory(&self) -> MemoryUse {
        self.0.memory()
    }
}

#[test]
fn running_ahead_changes_no_token_and_no_logprob() {
    let (graph, weights) = decoder(Family::default());
    let requests = || {
        (0..5_u32).map(|i| {
            let prompt: Vec<u32> = (0..3 + i).map(|p| (p * p + i) % VOCABULARY).collect();
            let plan = SamplingPlan {
                temperature: if i % 2 == 0 { 0.9 } else { 0.0 },
                ..SamplingPlan::default()
            };
            Request {
                // Now and then one ends that was to go on, and another tenant gets its blocks.
                stop_tokens: (0..3).map(TokenId).collect(),
                tenant: TenantId(u64::from(i % 2)),
                seed: u64::from(i),
                sampling: Sampling::Plan(plan),
                logprobs: Some(2),
                ..request(&prompt, 30)
            }
        })
    };
    let run = |runs_ahead: bool| {
        let program = load(On::CudaLazy, &graph, &weights, 40);
        let program = if runs_ahead {
            program
        } else {
            Box::new(InTurn(program))
        };
        let engine = start_with(program, &graph, (40, 32));
        let records = submit_all(&engine, requests());
        let events: Vec<_> = records.iter().map(Record::tokens_with_logprobs).collect();
        (events, engine.stats().steps_ahead)
    };
    let (plain, none) = run(false);
    let (ahead, steps_ahead) = run(true);
    assert_eq!(none, 0);
    assert!(steps_ahead > 0);
    assert!(plain.iter().any(|tokens| tokens.len() < 30), "none has stopped");
    assert_eq!(plain, ahead);
}

/// Greedy tokens by the graph alone, everything computed anew for each.
fn greedy(graph: &ValidGraph, weights: &Weights, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let row = numeric::graph::run(graph, weights, &tokens, &[tokens.len() - 1]).remove(0);
        let best = (0..VOCABULARY).max_by(|a, b| row[*a as usize].total_cmp(&row[*b as usize]));
        tokens.extend(best);
    }
    tokens.split_off(prompt.len())
}
