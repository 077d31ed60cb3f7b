//! How fast a model decodes, and how long a GPU waits between steps: on the device alone with a long context, then through the
//! engine, plain and with a guest.
//!
//! The context is not computed but taken as it lies in the KV pool: what is there does not change how fast it is read.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use galerne_core::ids::{BlockId, TokenId};
use galerne_core::limits::EngineLimits;
use galerne_core::sampling::SamplingPlan;
use galerne_engine::handle::{self, EngineOptions};
use galerne_kernels::device::{
    KvSpec, LoadOptions, LoadedProgram, Precision, SampleOutcome, SampleRequest, SequenceSlice, StepBatch,
};
use galerne_plugin::PluginHost;

use super::model::SeededModel;
use super::{Checked, Figure, ModelArgs};
use crate::commands::bench_runs::{Runs, Way};
use crate::config::{DataArgs, QuantizeArg};
use crate::guests;

const BLOCK_TOKENS: u32 = 64;
/// Steps before those that count.
const WARM: u32 = 4;
/// Prompt tokens of each sequence that goes through the engine.
const PROMPT: u32 = 16;
/// Output tokens of those: enough that all sequences decode together for a while.
const OUTPUT: u32 = 64;
const GUEST: &str = "mirostat";

/// What is decoded.
pub(super) struct Load<'a> {
    pub(super) batch: &'a [u32],
    pub(super) context: u32,
    pub(super) steps: u32,
}

pub(super) fn run(data: &DataArgs, checked: &Checked, args: &ModelArgs, load: &Load<'_>) -> Result<()> {
    let largest = *load
        .batch
        .iter()
        .max()
        .context("--batch: expected at least one number")?;
    ensure!(
        largest > 0 && load.steps > 1,
        "--batch, --steps: expected at least 1 and 2"
    );
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let model = SeededModel::new(&plugins, args)?;
    let tokens = (load.context + WARM + load.steps).max(PROMPT + OUTPUT);
    let blocks_each = tokens.div_ceil(BLOCK_TOKENS);
    let options = LoadOptions {
        precision: Precision::Auto,
        quantization: args.quantize.map(Into::into),
        kv: KvSpec {
            blocks: (blocks_each * largest) as usize,
            block_tokens: BLOCK_TOKENS as usize,
            dtype: args.kv_dtype.into(),
        },
        step_tokens_max: (PROMPT * largest) as usize,
        sequences_max: largest as usize,
    };
    if let Some(gpu) = &checked.gpu {
        gpu.measure_gaps()?;
    }
    let begin = Instant::now();
    let mut program = checked.load(&model, options)?;
    let name = args.name();
    Figure {
        name: format!("load {name}"),
        value: Some(begin.elapsed().as_secs_f64()),
        unit: Some("s"),
        ..Figure::default()
    }
    .print()?;
    let kv_token_bytes: usize = model
        .program
        .layers
        .iter()
        .map(|layer| layer.kv_heads as usize * options.kv_dtype().token_bytes(layer.head_width as usize))
        .sum();
    let weight_bytes = program.memory().weight_bytes - model.table_bytes;
    let others = if args.quantize == Some(QuantizeArg::Fp8) {
        ["bf16", "fp8"].as_slice()
    } else {
        &["bf16"]
    };
    for &batch in load.batch {
        let what = format!("{name} x {batch} at {}", load.context);
        let rate = on_device(&mut *program, &model, batch, blocks_each, load)?;
        let bytes = weight_bytes + kv_token_bytes * (load.context * batch) as usize;
        Figure {
            name: format!("decode {what}"),
            value: Some(rate),
            unit: Some("tokens/s"),
            bytes_per_s: Some(bytes as f64 / f64::from(batch) * rate),
            peers: others
                .iter()
                .map(|dtype| format!("transformers {dtype} x {batch} at {}", load.context))
                .collect(),
            ..Figure::default()
        }
        .print()?;
        print_gap(&what, &mut checked.gaps())?;
    }
    through_the_engine(program, &model, checked, &plugins, (&name, largest), options)
}

/// The middle one, if any were measured.
fn print_gap(what: &str, seconds: &mut [f64]) -> Result<()> {
    seconds.sort_by(f64::total_cmp);
    let Some(middle) = seconds.get(seconds.len() / 2) else {
        return Ok(());
    };
    Figure {
        name: format!("gap between steps {what}"),
        value: Some(middle * 1e6),
        unit: Some("us"),
        ..Figure::default()
    }
    .print()
}

/// Tokens per second of `batch` sequences, each token fed back.
fn on_device(
    program: &mut dyn LoadedProgram,
    model: &SeededModel,
    batch: u32,
    blocks_each: u32,
    load: &Load<'_>,
) -> Result<f64> {
    let plan = SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    };
    let requests: Vec<SampleRequest<'_>> = (0..batch as usize)
        .map(|row| SampleRequest {
            row,
            plan: &plan,
            mask: None,
            seen: &[],
            uniform: 0.5,
            logprobs: None,
        })
        .collect();
    let lane = |lane: u32| SequenceSlice {
        first_token: lane as usize,
        tokens: 1,
        position: load.context,
        blocks: (0..blocks_each)
            .map(|block| BlockId(block * batch + lane))
            .collect(),
    };
    let mut step = StepBatch {
        tokens: (0..batch)
            .map(|lane| TokenId(lane * 7_919 % model.vocabulary))
            .collect(),
        sequences: (0..batch).map(lane).collect(),
        generating: batch as usize,
        output_rows: (0..batch as usize).collect(),
    };
    let mut begin = Instant::now();
    for index in 0..WARM + load.steps {
        if index == WARM {
            begin = Instant::now();
        }
        program.submit(&step)?;
        for (token, outcome) in step.tokens.iter_mut().zip(program.sample(&requests)?) {
            if let SampleOutcome::Token { token: drawn, .. } = outcome {
                *token = drawn;
            }
        }
        for sequence in &mut step.sequences {
            sequence.position += 1;
        }
    }
    Ok(f64::from(batch * load.steps) / begin.elapsed().as_secs_f64())
}

/// All sequences, plain and with a sampling guest each, in turn so that a drifting machine moves both.
fn through_the_engine(
    program: Box<dyn LoadedProgram>,
    model: &SeededModel,
    checked: &Checked,
    plugins: &PluginHost,
    (name, batch): (&str, u32),
    options: LoadOptions,
) -> Result<()> {
    let engine = handle::start(
        program,
        model.vocabulary,
        model.program.context_tokens_max,
        EngineOptions {
            limits: EngineLimits {
                step_tokens_max: options.step_tokens_max,
                sequences_max: options.sequences_max,
                block_tokens: options.kv.block_tokens,
                blocks: options.kv.blocks,
                ..EngineLimits::default()
            },
            ..EngineOptions::default()
        },
    );
    let guest = plugins.load_sampler(GUEST, guests::embedded(GUEST)?)?;
    let runs = Runs {
        engine: &engine,
        grammars: None,
        context: PROMPT,
    };
    let mut ways = [
        ("engine", Way::Plain, vec![], vec![]),
        ("engine with a guest each", Way::Guest(&*guest), vec![], vec![]),
    ];
    for _ in 0..3 {
        for (_, way, rates, gaps) in &mut ways {
            rates.push(runs.decode(batch, OUTPUT, *way)?);
            gaps.extend(checked.gaps());
        }
    }
    for (what, _, rates, gaps) in &mut ways {
        rates.sort_by(f64::total_cmp);
        let what = format!("{name} x {batch} at {PROMPT}, {what}");
        Figure {
            name: format!("decode {what}"),
            value: Some(rates[rates.len() / 2]),
            unit: Some("tokens/s"),
            ..Figure::default()
        }
        .print()?;
        print_gap(&what, gaps)?;
    }
    engine.shutdown();
    Ok(())
}
