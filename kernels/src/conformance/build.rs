//! Building small programs by hand. Knows nothing of devices.

use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, EmbeddingIndex, RopePairing, Rows};
use galerne_core::ids::LayerId;

use super::weights::{MemoryWeights, Numbers};
use crate::program::{
    AttentionLayer, BufferId, BufferSpec, Instr, NormKind, NormSpec, Program, RopeId, RopeSpec, View,
    WeightId, WeightSpec,
};

/// Entries of the tables that tokens are looked up in.
pub(super) const VOCABULARY: u32 = 50;

/// A program under construction with random weights.
#[derive(Debug, Clone)]
pub struct Build {
    /// The program so far.
    pub program: Program,
    /// Its weights.
    pub weights: MemoryWeights,
    /// Where random numbers come from.
    pub numbers: Numbers,
}

impl Build {
    /// Nothing yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let program = Program {
            instrs: vec![],
            buffers: vec![],
            weights: vec![],
            ropes: vec![],
            layers: vec![],
            output: View {
                buffer: BufferId(0),
                start: 0,
                width: 0,
            },
            context_tokens_max: 512,
        };
        Self {
            program,
            weights: MemoryWeights::default(),
            numbers: Numbers::new(seed),
        }
    }

    /// A new buffer.
    pub fn buffer(&mut self, rows: Rows, width: u32) -> View {
        let buffer = BufferId(self.program.buffers.len() as u32);
        self.program.buffers.push(BufferSpec { rows, width });
        View {
            buffer,
            start: 0,
            width,
        }
    }

    /// A random matrix of one part.
    pub fn matrix(&mut self, dtype: DType, rows: u32, width: u32) -> WeightId {
        self.parts(&[(dtype, rows)], width)
    }

    /// A random matrix of several parts.
    pub fn parts(&mut self, parts: &[(DType, u32)], width: u32) -> WeightId {
        let id = self.program.weights.len();
        let mut names = vec![];
        for (part, &(dtype, rows)) in parts.iter().enumerate() {
            let name = format!("w{id}.{part}");
            let size = 1.0 / (width as f32).sqrt();
            let values = self.numbers.normals(rows as usize * width as usize, size);
            self.weights
                .insert(&name, dtype, &[u64::from(rows), u64::from(width)], &values);
            names.push(name);
        }
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        self.program.weights.push(WeightSpec {
            parts: names,
            rows,
            width,
        });
        WeightId(id as u32)
    }

    /// A random vector around 1.
    pub fn vector(&mut self, width: u32) -> WeightId {
        let id = self.program.weights.len();
        let name = format!("v{id}");
        let values: Vec<f32> = (0..width).map(|_| 1.0 + self.numbers.normal(0.3)).collect();
        self.weights
            .insert(&name, DType::F32, &[u64::from(width)], &values);
        self.program.weights.push(WeightSpec {
            parts: vec![name],
            rows: 1,
            width,
        });
        WeightId(id as u32)
    }

    /// Appends an instruction.
    pub fn push(&mut self, instr: Instr) {
        self.program.instrs.push(instr);
    }

    /// Random rows by token.
    pub fn input(&mut self, width: u32) -> View {
        let out = self.buffer(Rows::Tokens, width);
        self.input_into(out);
        out
    }

    /// Random rows by token, into part of a buffer.
    pub fn input_into(&mut self, out: View) {
        let table = self.matrix(DType::F32, VOCABULARY, out.width);
        // Matrices are scaled for unit outputs; inputs should be of unit size themselves.
        let name = self.program.weights[table.index()].parts[0].clone();
        let values = self.numbers.normals((VOCABULARY * out.width) as usize, 1.0);
        self.weights.insert(
            &name,
            DType::F32,
            &[u64::from(VOCABULARY), u64::from(out.width)],
            &values,
        );
        self.push(Instr::Embedding {
            table,
            index: EmbeddingIndex::Tokens,
            out,
        });
    }

    /// A rotation of `pairs` pairs.
    pub fn rope(&mut self, pairs: u32, pairing: RopePairing, attention_factor: f32) -> RopeId {
        let inv_freq = (0..pairs)
            .map(|i| 100f32.powf(-(i as f32) / pairs as f32))
            .collect();
        self.program.ropes.push(RopeSpec {
            inv_freq,
            pairing,
            attention_factor,
        });
        RopeId(self.program.ropes.len() as u32 - 1)
    }

    /// Queries, keys and values by token through one attention layer; the result is the program's output.
    pub fn attention(&mut self, spec: AttentionLayer) {
        let (q, kv) = (spec.heads * spec.head_width, spec.kv_heads * spec.head_width);
        let all = self.buffer(Rows::Tokens, q + 2 * kv);
        let part = |start, width| View { start, width, ..all };
        let (q, k, v) = (part(0, q), part(q, kv), part(q + kv, kv));
        for view in [q, k, v] {
            self.input_into(view);
        }
        let rope = (spec.head_width >= 2).then(|| self.rope(spec.head_width / 2, RopePairing::Half, 1.0));
        let layer = LayerId(self.program.layers.len() as u32);
        self.program.layers.push(spec);
        self.push(Instr::RopeAppend {
            layer,
            q,
            k,
            v,
            q_rope: rope,
            k_rope: rope,
        });
        let out = self.buffer(Rows::Tokens, q.width);
        self.push(Instr::Attention { layer, q, out });
        self.program.output = out;
    }

    /// A Llama-shaped model with logits of 50 entries at the wanted rows, fused as a lowering does it. If rows of the
    /// model's width are not whole blocks of `dtype`, only the widest matrix has it and the others are `Q5_0`.
    #[must_use]
    pub fn transformer(dtype: DType, layers: u32, seed: u64) -> Self {
        let (width, down_dtype) = (64, dtype);
        let (dtype, ffn) = match dtype.block_elements() {
            256 => (DType::Q5_0, 256),
            _ => (dtype, 96),
        };
        let spec = AttentionLayer {
            heads: 4,
            kv_heads: 2,
            head_width: 16,
            scale: 0.25,
            causal: true,
            sliding_window: None,
            soft_cap: None,
        };
        let mut b = Self::new(seed);
        let x = b.input(width);
        let rope = b.rope(8, RopePairing::Half, 1.0);
        for l in 0..layers {
            let normed = b.buffer(Rows::Tokens, width);
            b.norm(x, normed);
            let all = b.buffer(Rows::Tokens, 128);
            let part = |start, width| View { start, width, ..all };
            let qkv = b.parts(&[(dtype, 64), (dtype, 32), (dtype, 32)], width);
            b.push(Instr::Linear {
                x: normed,
                weight: qkv,
                bias: None,
                accumulate: false,
                out: all,
            });
            let (layer, q) = (LayerId(l), part(0, 64));
            b.program.layers.push(spec);
            let (k, v) = (part(64, 32), part(96, 32));
            b.push(Instr::RopeAppend {
                layer,
                q,
                k,
                v,
                q_rope: Some(rope),
                k_rope: Some(rope),
            });
            let out = b.buffer(Rows::Tokens, width);
            b.push(Instr::Attention { layer, q, out });
            let o = b.matrix(dtype, width, width);
            b.push(Instr::Linear {
                x: out,
                weight: o,
                bias: None,
                accumulate: true,
                out: x,
            });
            let normed = b.buffer(Rows::Tokens, width);
            b.norm(x, normed);
            let inner = b.buffer(Rows::Tokens, 2 * ffn);
            let gate_up = b.parts(&[(dtype, ffn), (dtype, ffn)], width);
            b.push(Instr::Linear {
                x: normed,
                weight: gate_up,
                bias: None,
                accumulate: false,
                out: inner,
            });
            let (gate, up) = (
                View { width: ffn, ..inner },
                View {
                    start: ffn,
                    width: ffn,
                    ..inner
                },
            );
            b.push(Instr::ActivateMul {
                gate,
                up,
                function: Activation::Silu,
                out: gate,
            });
            let down = b.matrix(down_dtype, width, ffn);
            b.push(Instr::Linear {
                x: gate,
                weight: down,
                bias: None,
                accumulate: true,
                out: x,
            });
        }
        let (last, normed) = (b.buffer(Rows::Outputs, width), b.buffer(Rows::Outputs, width));
        b.push(Instr::OutputRows { x, out: last });
        b.norm(last, normed);
        let logits = b.buffer(Rows::Outputs, VOCABULARY);
        let head = b.matrix(dtype, VOCABULARY, width);
        b.push(Instr::Linear {
            x: normed,
            weight: head,
            bias: None,
            accumulate: false,
            out: logits,
        });
        b.program.output = logits;
        b
    }

    fn norm(&mut self, x: View, out: View) {
        let weight = self.vector(x.width);
        let norm = NormSpec {
            kind: NormKind::Rms { weight_offset: 0.0 },
            weight,
            width: x.width,
            eps: 1e-5,
        };
        self.push(Instr::Norm { x, norm, out });
    }
}
