//! Times attention and the rope-append of one layer on one thread, apart from the rest of a step: minima of many
//! short runs, as fractions of the arithmetic or bytes they need. Pin it to a core: `taskset -c 1`.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use galerne_core::ids::{BlockId, TokenId};
use galerne_kernels::conformance::Build;
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::device::{
    Device, KvDtype, KvSpec, LoadOptions, LoadedProgram, Precision, SequenceSlice, StepBatch,
};
use galerne_kernels::program::{AttentionLayer, Instr};

const BLOCK_TOKENS: usize = 16;
const REPEATS: usize = 2;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const WIDTH: usize = 64;

fn batch(sequences: usize, position: usize, tokens: usize) -> StepBatch {
    let slice = |s: usize| SequenceSlice {
        first_token: s * tokens,
        tokens,
        position: position as u32,
        blocks: (0..(position + tokens).div_ceil(BLOCK_TOKENS))
            .map(|b| BlockId((b * sequences + s) as u32))
            .collect(),
    };
    StepBatch {
        tokens: (0..(sequences * tokens) as u32)
            .map(|i| TokenId(i % 50))
            .collect(),
        sequences: (0..sequences).map(slice).collect(),
        generating: if tokens == 1 { sequences } else { 0 },
        output_rows: vec![],
    }
}

/// Which instruction to repeat.
type Repeat = Option<fn(&Instr) -> bool>;

/// Three programs that differ in what they repeat: nothing, attention, rope and append.
fn build(repeat: Repeat) -> Build {
    let mut build = Build::new(1);
    build.program.context_tokens_max = 4_096;
    build.attention(AttentionLayer {
        heads: HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_width: WIDTH as u32,
        scale: 0.125,
        causal: true,
        sliding_window: None,
        soft_cap: None,
    });
    if let Some(wanted) = repeat {
        let instr = build.program.instrs.iter().find(|instr| wanted(instr)).cloned();
        let instr = instr.expect("an instruction of the program");
        for _ in 0..REPEATS {
            build.push(instr.clone());
        }
    }
    build
}

fn run(program: &mut dyn LoadedProgram, batch: &StepBatch) -> Duration {
    let start = Instant::now();
    program.submit(batch).and_then(|()| program.wait()).expect("step");
    start.elapsed()
}

fn main() {
    let device = CpuDevice::new(CpuOptions {
        threads: NonZeroUsize::new(1),
        isa: None,
    })
    .expect("device");
    let options = LoadOptions {
        precision: Precision::Auto,
        quantization: None,
        kv: KvSpec {
            blocks: 8_192,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 512,
        sequences_max: 128,
    };
    let repeats: [Repeat; 3] = [
        None,
        Some(|i| matches!(i, Instr::Attention { .. })),
        Some(|i| matches!(i, Instr::RopeAppend { .. })),
    ];
    let mut programs = repeats.map(|repeat| {
        let build = build(repeat);
        device
            .load(&build.program, &build.weights, options)
            .expect("load")
    });
    println!("sequences tokens position  attention us  GFLOP/s  KV GB/s at 2 bytes  rope-append us");
    for (sequences, position, tokens) in [
        (1, 1_536, 32),
        (1, 0, 64),
        (1, 0, 512),
        (1, 512, 512),
        (1, 1_536, 512),
        (1, 128, 1),
        (1, 512, 1),
        (1, 2_048, 1),
        (16, 256, 1),
        (32, 512, 1),
        (128, 1_000, 1),
    ] {
        let batch = batch(sequences, position, tokens);
        let mut best = [Duration::MAX; 3];
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1_000) {
            for (best, program) in best.iter_mut().zip(&mut programs) {
                *best = (*best).min(run(program.as_mut(), &batch));
            }
        }
        let each = |i: usize| best[i].saturating_sub(best[0]).as_secs_f64() / REPEATS as f64;
        let pairs: usize = (0..tokens).map(|t| position + t + 1).sum::<usize>() * sequences;
        let flops = (pairs * HEADS * WIDTH * 4) as f64;
        let bytes = ((position + tokens) * sequences * KV_HEADS * WIDTH * 4) as f64;
        println!(
            "{sequences:9} {tokens:6} {position:8} {:13.1} {:8.1} {:19.1} {:15.1}",
            each(1) * 1e6,
            flops / each(1) / 1e9,
            bytes / each(1) / 1e9,
            each(2) * 1e6,
        );
    }
}
