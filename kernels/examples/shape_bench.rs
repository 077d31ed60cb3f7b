//! Times a program with SmolLM2-135M's shape and random weights: prefill of 512 tokens in the device's steps, decode
//! of 128 tokens after them, and decode of several sequences at once. Arguments: `[q4_1|q4_0|q8_0|bf16|f16|f32]
//! [auto|f32] [threads] [portable|avx2|avx512-vnni|avx512-bf16|amx] [prefill|long|decode|batch|clients]`; the
//! last for a profile of one kind of step alone.
#![expect(clippy::print_stdout, reason = "a measurement is for reading")]

use std::num::NonZeroUsize;
use std::time::Instant;

use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, EmbeddingIndex, RopePairing, Rows};
use galerne_core::ids::{BlockId, LayerId, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_kernels::conformance::{MemoryWeights, Numbers};
use galerne_kernels::cpu::{CpuDevice, CpuOptions, Isa};
use galerne_kernels::device::{
    Device, KvDtype, KvSpec, LoadOptions, LoadedProgram, Precision, SampleRequest, SequenceSlice, StepBatch,
};
use galerne_kernels::program::{
    AttentionLayer, BufferId, BufferSpec, Instr, NormKind, NormSpec, Program, RopeId, RopeSpec, View,
    WeightId, WeightSpec,
};

const LAYERS: u32 = 30;
const WIDTH: u32 = 576;
const FFN: u32 = 1536;
const HEADS: u32 = 9;
const KV_HEADS: u32 = 3;
const HEAD: u32 = 64;
const VOCABULARY: u32 = 49_152;
const BLOCK_TOKENS: usize = 16;

struct Builder {
    program: Program,
    weights: MemoryWeights,
    numbers: Numbers,
}

impl Builder {
    fn buffer(&mut self, rows: Rows, width: u32) -> View {
        let buffer = BufferId(self.program.buffers.len() as u32);
        self.program.buffers.push(BufferSpec { rows, width });
        View {
            buffer,
            start: 0,
            width,
        }
    }

    fn weight(&mut self, parts: &[(&str, u32)], width: u32, dtype: DType) -> WeightId {
        for &(name, rows) in parts {
            let bytes = random_bytes(dtype, rows as usize * width as usize, &mut self.numbers);
            self.weights
                .insert_bytes(name, dtype, &[u64::from(rows), u64::from(width)], bytes);
        }
        let spec = WeightSpec {
            parts: parts.iter().map(|(name, _)| (*name).to_owned()).collect(),
            rows: parts.iter().map(|(_, rows)| rows).sum(),
            width,
        };
        self.program.weights.push(spec);
        WeightId(self.program.weights.len() as u32 - 1)
    }

    fn norm(&mut self, name: &str) -> NormSpec {
        self.weights
            .insert(name, DType::F32, &[u64::from(WIDTH)], &[1.0; WIDTH as usize]);
        self.program.weights.push(WeightSpec {
            parts: vec![name.to_owned()],
            rows: 1,
            width: WIDTH,
        });
        let weight = WeightId(self.program.weights.len() as u32 - 1);
        NormSpec {
            kind: NormKind::Rms { weight_offset: 0.0 },
            weight,
            width: WIDTH,
            eps: 1e-5,
        }
    }

    fn linear(&mut self, x: View, weight: WeightId, out: View, accumulate: bool) {
        self.program.instrs.push(Instr::Linear {
            x,
            weight,
            bias: None,
            accumulate,
            out,
        });
    }
}

/// Random codes with a scale that keeps activations of a usual size.
fn random_bytes(dtype: DType, elements: usize, numbers: &mut Numbers) -> Vec<u8> {
    if dtype.block_elements() == 1 {
        return galerne_kernels::quant::quantize(dtype, &numbers.normals(elements, 0.04));
    }
    let mut bytes = Vec::with_capacity(elements / 32 * dtype.block_bytes());
    for _ in 0..elements / 32 {
        let header: &[f32] = match dtype {
            DType::Q4_1 => &[0.01, -0.075],
            DType::Q4_0 => &[0.01],
            _ => &[0.0005],
        };
        bytes.extend(galerne_kernels::quant::quantize(DType::F16, header));
        for _ in header.len() * 2..dtype.block_bytes() {
            bytes.push((numbers.next_bits() >> 32) as u8);
        }
    }
    bytes
}

fn layer(b: &mut Builder, l: u32, dtype: DType, residual: View, x: View) {
    let name = |part: &str| format!("{l}.{part}");
    let (q, kv) = (HEADS * HEAD, KV_HEADS * HEAD);
    let qkv = b.weight(
        &[(&name("q"), q), (&name("k"), kv), (&name("v"), kv)],
        WIDTH,
        dtype,
    );
    let o = b.weight(&[(&name("o"), WIDTH)], q, dtype);
    let gate_up = b.weight(&[(&name("gate"), FFN), (&name("up"), FFN)], WIDTH, dtype);
    let down = b.weight(&[(&name("down"), WIDTH)], FFN, dtype);
    let both = b.buffer(Rows::Tokens, q + 2 * kv);
    let part = |start, width| View {
        buffer: both.buffer,
        start,
        width,
    };
    let attended = b.buffer(Rows::Tokens, q);
    let inner = b.buffer(Rows::Tokens, 2 * FFN);
    let half = |start| View {
        buffer: inner.buffer,
        start,
        width: FFN,
    };
    let (norm_a, norm_b) = (b.norm(&name("norm_a")), b.norm(&name("norm_b")));
    b.program.instrs.push(Instr::Norm {
        x: residual,
        norm: norm_a,
        out: x,
    });
    b.linear(x, qkv, both, false);
    b.program.instrs.push(Instr::RopeAppend {
        layer: LayerId(l),
        q: part(0, q),
        k: part(q, kv),
        v: part(q + kv, kv),
        q_rope: Some(RopeId(0)),
        k_rope: Some(RopeId(0)),
    });
    b.program.instrs.push(Instr::Attention {
        layer: LayerId(l),
        q: part(0, q),
        out: attended,
    });
    b.linear(attended, o, residual, true);
    b.program.instrs.push(Instr::Norm {
        x: residual,
        norm: norm_b,
        out: x,
    });
    b.linear(x, gate_up, inner, false);
    b.program.instrs.push(Instr::ActivateMul {
        gate: half(0),
        up: half(FFN),
        function: Activation::Silu,
        out: half(0),
    });
    b.linear(half(0), down, residual, true);
}

fn build(dtype: DType) -> Builder {
    let inv_freq = (0..HEAD / 2)
        .map(|i| 10_000f32.powf(-2.0 * i as f32 / HEAD as f32))
        .collect();
    let spec = AttentionLayer {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_width: HEAD,
        scale: 0.125,
        causal: true,
        sliding_window: None,
        soft_cap: None,
    };
    let program = Program {
        instrs: vec![],
        buffers: vec![],
        weights: vec![],
        ropes: vec![RopeSpec {
            inv_freq,
            pairing: RopePairing::Half,
            attention_factor: 1.0,
        }],
        layers: vec![spec; LAYERS as usize],
        output: View {
            buffer: BufferId(0),
            start: 0,
            width: 0,
        },
        context_tokens_max: 8_192,
    };
    let mut b = Builder {
        program,
        weights: MemoryWeights::default(),
        numbers: Numbers::new(1),
    };
    let table_dtype = if dtype.block_elements() == 1 {
        dtype
    } else {
        DType::Q8_0
    };
    let table = b.weight(&[("embedding", VOCABULARY)], WIDTH, table_dtype);
    let (residual, x) = (b.buffer(Rows::Tokens, WIDTH), b.buffer(Rows::Tokens, WIDTH));
    let embedding = Instr::Embedding {
        table,
        index: EmbeddingIndex::Tokens,
        out: residual,
    };
    b.program.instrs.push(embedding);
    for l in 0..LAYERS {
        layer(&mut b, l, dtype, residual, x);
    }
    let last = b.buffer(Rows::Outputs, WIDTH);
    let normed = b.buffer(Rows::Outputs, WIDTH);
    let logits = b.buffer(Rows::Outputs, VOCABULARY);
    let norm = b.norm("norm");
    b.program.instrs.push(Instr::OutputRows {
        x: residual,
        out: last,
    });
    b.program.instrs.push(Instr::Norm {
        x: last,
        norm,
        out: normed,
    });
    b.linear(normed, table, logits, false);
    b.program.output = logits;
    b
}

fn slice(
    first_token: usize,
    tokens: usize,
    position: usize,
    lane: usize,
    lane_blocks: usize,
) -> SequenceSlice {
    let first = (lane * lane_blocks) as u32;
    let blocks = (0..(position + tokens).div_ceil(BLOCK_TOKENS) as u32)
        .map(|b| BlockId(first + b))
        .collect();
    SequenceSlice {
        first_token,
        tokens,
        position: position as u32,
        blocks,
    }
}

/// Tokens per second of prefill in steps of `chunk`.
fn prefill(program: &mut dyn LoadedProgram, tokens: usize, chunk: usize) -> f64 {
    let start = Instant::now();
    for position in (0..tokens).step_by(chunk) {
        let count = chunk.min(tokens - position);
        let batch = StepBatch {
            tokens: (0..count as u32)
                .map(|i| TokenId((i * 37) % VOCABULARY))
                .collect(),
            sequences: vec![slice(0, count, position, 0, 1)],
            generating: 0,
            output_rows: if position + count == tokens {
                vec![count - 1]
            } else {
                vec![]
            },
        };
        program
            .submit(&batch)
            .and_then(|()| program.wait())
            .expect("prefill step");
    }
    tokens as f64 / start.elapsed().as_secs_f64()
}

/// Tokens per second of `steps` greedy steps of `lanes` sequences.
fn decode(program: &mut dyn LoadedProgram, lanes: usize, from: usize, steps: usize) -> f64 {
    let lane_blocks = (from + steps).div_ceil(BLOCK_TOKENS) + 1;
    let plan = SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    };
    let start = Instant::now();
    for step in 0..steps {
        let batch = StepBatch {
            tokens: vec![TokenId(step as u32); lanes],
            sequences: (0..lanes)
                .map(|lane| slice(lane, 1, from + step, lane, lane_blocks))
                .collect(),
            generating: lanes,
            output_rows: (0..lanes).collect(),
        };
        program
            .submit(&batch)
            .and_then(|()| program.wait())
            .expect("decode step");
        let request = |row| SampleRequest {
            row,
            plan: &plan,
            mask: None,
            seen: &[],
            uniform: 0.5,
            logprobs: None,
        };
        let requests: Vec<_> = (0..lanes).map(request).collect();
        program.sample(&requests).expect("sample");
    }
    (steps * lanes) as f64 / start.elapsed().as_secs_f64()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let dtype = arguments
        .iter()
        .find_map(|word| DType::from_name(word))
        .unwrap_or(DType::Q4_1);
    let isa = Isa::ALL.into_iter().find(|isa| has(isa.name()));
    let threads = arguments
        .iter()
        .find_map(|word| word.parse::<NonZeroUsize>().ok());
    let exact = arguments.iter().skip(1).any(|word| word == "f32");
    let device = CpuDevice::new(CpuOptions { threads, isa }).expect("device");
    let b = build(dtype);
    let chunk = device.info().step_tokens;
    let options = LoadOptions {
        precision: if exact { Precision::F32 } else { Precision::Auto },
        quantization: None,
        kv: KvSpec {
            blocks: 4_096,
            block_tokens: BLOCK_TOKENS,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 512,
        sequences_max: 64,
    };
    let start = Instant::now();
    let mut program = device.load(&b.program, &b.weights, options).expect("load");
    println!(
        "{:?} {dtype} {:?}: loaded in {:?}",
        device.info(),
        options.precision,
        start.elapsed()
    );
    let program = program.as_mut();
    if has("prefill") {
        (0..20).for_each(|_| println!("prefill 512: {:.0} tokens/s", prefill(program, 512, chunk)));
        return;
    }
    if has("long") {
        (0..10).for_each(|_| println!("prefill 2048: {:.0} tokens/s", prefill(program, 2048, chunk)));
        return;
    }
    if has("decode") {
        (0..20).for_each(|_| println!("decode: {:.1} tokens/s", decode(program, 1, 128, 64)));
        return;
    }
    if has("batch") {
        (0..20).for_each(|_| println!("16 sequences: {:.1} tokens/s", decode(program, 16, 288, 8)));
        return;
    }
    if has("clients") {
        (0..20).for_each(|_| println!("32 sequences: {:.1} tokens/s", decode(program, 32, 128, 8)));
        return;
    }
    for round in 0..3 {
        println!(
            "round {round}: prefill 128 {:.0}, 512 {:.0}, 512 in one step {:.0}, 2048 {:.0}; decode {:.1} tokens/s",
            prefill(program, 128, chunk),
            prefill(program, 512, chunk),
            prefill(program, 512, 512),
            prefill(program, 2048, chunk),
            decode(program, 1, 128, 64),
        );
    }
    for (temperature, top_k, top_p) in [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 0.9), (0.7, 40, 0.9)] {
        let plan = SamplingPlan {
            temperature,
            top_k,
            top_p,
            ..SamplingPlan::default()
        };
        let request = SampleRequest {
            row: 0,
            plan: &plan,
            mask: None,
            seen: &[],
            uniform: 0.5,
            logprobs: None,
        };
        let start = Instant::now();
        (0..20).for_each(|_| drop(program.sample(&[request]).expect("sample")));
        println!(
            "sample at {temperature}, top-k {top_k}, top-p {top_p}: {:?}",
            start.elapsed() / 20
        );
    }
    for lanes in [2, 4, 8, 16, 32] {
        println!(
            "{lanes} sequences: decode {:.1} tokens/s",
            decode(program, lanes, 128, 16)
        );
    }
}
