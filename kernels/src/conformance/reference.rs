//! A naive interpreter of programs in f64: every instruction as its documentation says it, nothing fused,
//! nothing shared with any device. Slow and obviously right is the point.

use std::collections::HashMap;

use galerne_core::graph::{Activation, EmbeddingIndex, RopePairing, RouterNormalisation, Rows};
use galerne_core::ids::BlockId;

use super::weights::MemoryWeights;
use crate::device::{SequenceSlice, StepBatch};
use crate::program::{
    AttentionLayer, ExpertSpec, Instr, MixtureSpec, NormKind, NormSpec, Program, View, WeightId,
};

type Row = Vec<f64>;
/// Keys and values by layer, block and slot.
type Cache = HashMap<(usize, BlockId, usize), (Row, Row)>;

/// A program being interpreted.
pub struct Reference<'a> {
    program: &'a Program,
    weights: Vec<Row>,
    cache: Cache,
    block_tokens: usize,
}

impl<'a> Reference<'a> {
    /// Dequantizes all weights.
    #[must_use]
    pub fn new(program: &'a Program, weights: &MemoryWeights, block_tokens: usize) -> Self {
        let join = |spec: &crate::program::WeightSpec| {
            spec.parts
                .iter()
                .flat_map(|name| weights.dequantized(name))
                .map(f64::from)
                .collect()
        };
        let weights = program.weights.iter().map(join).collect();
        Self {
            program,
            weights,
            cache: Cache::new(),
            block_tokens,
        }
    }

    /// Runs a step and returns the output rows.
    pub fn step(&mut self, batch: &StepBatch) -> Vec<Row> {
        let mut run = Run {
            buffers: self
                .program
                .buffers
                .iter()
                .map(|b| vec![vec![0.0; b.width as usize]; rows(b.rows, batch)])
                .collect(),
            reference: self,
            batch,
        };
        let program = run.reference.program;
        program.instrs.iter().for_each(|instr| run.instr(instr));
        run.get(program.output)
    }

    /// As [`crate::device::LoadedProgram::copy_blocks`].
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let copied: Vec<_> = self
            .cache
            .iter()
            .filter(|((_, block, _), _)| *block == from)
            .map(|(k, v)| (*k, v.clone()))
            .collect();
        for ((layer, _, slot), value) in copied {
            self.cache.insert((layer, to, slot), value);
        }
    }

    fn matrix_row(&self, id: WeightId, row: usize) -> &[f64] {
        let width = self.program.weights[id.index()].width as usize;
        &self.weights[id.index()][row * width..][..width]
    }

    fn times(&self, x: &[f64], id: WeightId) -> Row {
        let rows = self.program.weights[id.index()].rows as usize;
        (0..rows)
            .map(|r| self.matrix_row(id, r).iter().zip(x).map(|(w, x)| w * x).sum())
            .collect()
    }

    fn normalise(&self, x: &[f64], norm: &NormSpec) -> Row {
        let weight = &self.weights[norm.weight.index()];
        let n = f64::from(norm.width);
        let eps = f64::from(norm.eps);
        x.chunks(norm.width as usize)
            .flat_map(|group| match norm.kind {
                NormKind::Rms { weight_offset } => {
                    let rms = (group.iter().map(|v| v * v).sum::<f64>() / n + eps).sqrt();
                    let offset = f64::from(weight_offset);
                    group
                        .iter()
                        .zip(weight)
                        .map(|(v, w)| v / rms * (w + offset))
                        .collect::<Row>()
                }
                NormKind::Layer { bias } => {
                    let mean = group.iter().sum::<f64>() / n;
                    let variance = group.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
                    let bias = |i: usize| bias.map_or(0.0, |bias| self.weights[bias.index()][i]);
                    let value =
                        |(i, v): (usize, &f64)| (v - mean) / (variance + eps).sqrt() * weight[i] + bias(i);
                    group.iter().enumerate().map(value).collect()
                }
            })
            .collect()
    }

    fn rotate(&self, x: &[f64], rope: usize, head_width: usize, position: u32) -> Row {
        let spec = &self.program.ropes[rope];
        let pairs = spec.inv_freq.len();
        let factor = f64::from(spec.attention_factor);
        let mut out = x.to_vec();
        for head in out.chunks_mut(head_width) {
            let before = head.to_vec();
            for (i, frequency) in spec.inv_freq.iter().enumerate() {
                let (a, b) = match spec.pairing {
                    RopePairing::Half => (i, i + pairs),
                    RopePairing::Interleaved => (2 * i, 2 * i + 1),
                };
                let (sine, cosine) = (f64::from(position) * f64::from(*frequency)).sin_cos();
                head[a] = factor * (before[a] * cosine - before[b] * sine);
                head[b] = factor * (before[b] * cosine + before[a] * sine);
            }
        }
        out
    }

    fn feed_forward(&self, x: &[f64], expert: ExpertSpec, function: Activation) -> Row {
        let both = self.times(x, expert.gate_up);
        let (gate, up) = both.split_at(both.len() / 2);
        let inner: Row = gate
            .iter()
            .zip(up)
            .map(|(g, u)| activation(function, *g) * u)
            .collect();
        self.times(&inner, expert.down)
    }

    fn mixture(&self, x: &[f64], spec: &MixtureSpec) -> Row {
        let scores = self.times(x, spec.router);
        let total: f64 = scores.iter().map(|s| s.exp()).sum();
        let weight = |score: f64| match spec.normalisation {
            RouterNormalisation::SigmoidChosen => 1.0 / (1.0 + (-score).exp()),
            RouterNormalisation::SoftmaxAll | RouterNormalisation::SoftmaxChosen => score.exp() / total,
        };
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(spec.top_k as usize);
        let chosen: f64 = order.iter().map(|&e| weight(scores[e])).sum();
        let divisor = if spec.normalisation == RouterNormalisation::SoftmaxAll {
            1.0
        } else {
            chosen
        };
        let mut out = vec![0.0; x.len()];
        let mut add = |weight: f64, values: Row| {
            out.iter_mut()
                .zip(values)
                .for_each(|(out, value)| *out += weight * value);
        };
        for e in order {
            add(
                weight(scores[e]) / divisor,
                self.feed_forward(x, spec.experts[e], spec.function),
            );
        }
        if let Some(shared) = spec.shared {
            let gate = spec
                .shared_gate
                .map_or(1.0, |g| activation(Activation::Sigmoid, self.times(x, g)[0]));
            add(gate, self.feed_forward(x, shared, spec.function));
        }
        out
    }

    /// Attention of one token's query.
    fn attend(&self, q: &[f64], layer: usize, slice: &SequenceSlice, position: usize) -> Row {
        let spec: &AttentionLayer = &self.program.layers[layer];
        let width = spec.head_width as usize;
        let end = if spec.causal {
            position + 1
        } else {
            slice.position as usize + slice.tokens
        };
        let window = spec.sliding_window.map_or(usize::MAX, |w| w as usize);
        let start = (position + 1).saturating_sub(window);
        let seen: Vec<&(Row, Row)> = (start..end)
            .filter_map(|p| {
                self.cache
                    .get(&(layer, slice.blocks[p / self.block_tokens], p % self.block_tokens))
            })
            .collect();
        assert_eq!(seen.len(), end - start, "every position was appended");
        let group = (spec.heads / spec.kv_heads) as usize;
        let head = |(h, q): (usize, &[f64])| {
            let columns = h / group * width..(h / group + 1) * width;
            let scores: Row = seen
                .iter()
                .map(|(k, _)| {
                    let dot: f64 = q.iter().zip(&k[columns.clone()]).map(|(q, k)| q * k).sum();
                    let score = dot * f64::from(spec.scale);
                    spec.soft_cap
                        .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            let mut out = vec![0.0; width];
            for (score, (_, v)) in scores.iter().zip(&seen) {
                let weight = (score - largest).exp() / total;
                out.iter_mut()
                    .zip(&v[columns.clone()])
                    .for_each(|(out, v)| *out += weight * v);
            }
            out
        };
        q.chunks(width).enumerate().flat_map(head).collect()
    }
}

struct Run<'r, 'a> {
    reference: &'r mut Reference<'a>,
    batch: &'r StepBatch,
    buffers: Vec<Vec<Row>>,
}

fn rows(rows: Rows, batch: &StepBatch) -> usize {
    match rows {
        Rows::Tokens => batch.tokens.len(),
        Rows::Outputs => batch.output_rows.len(),
        Rows::Sequences => batch.sequences.len(),
    }
}

impl Run<'_, '_> {
    fn get(&self, view: View) -> Vec<Row> {
        let columns = view.start as usize..(view.start + view.width) as usize;
        self.buffers[view.buffer.index()]
            .iter()
            .map(|row| row[columns.clone()].to_vec())
            .collect()
    }

    fn put(&mut self, view: View, rows: Vec<Row>) {
        for (to, from) in self.buffers[view.buffer.index()].iter_mut().zip(rows) {
            to[view.start as usize..][..view.width as usize].copy_from_slice(&from);
        }
    }

    fn map(&mut self, x: View, out: View, f: impl Fn(f64) -> f64) {
        let rows = self
            .get(x)
            .into_iter()
            .map(|row| row.into_iter().map(&f).collect())
            .collect();
        self.put(out, rows);
    }

    fn zip(&mut self, a: View, b: View, out: View, f: impl Fn(f64, f64) -> f64) {
        let both = self.get(a).into_iter().zip(self.get(b));
        let rows = both
            .map(|(a, b)| a.into_iter().zip(b).map(|(a, b)| f(a, b)).collect())
            .collect();
        self.put(out, rows);
    }

    /// Each token's sequence and position.
    fn tokens(&self) -> Vec<(&SequenceSlice, u32)> {
        let mut tokens = Vec::with_capacity(self.batch.tokens.len());
        for slice in &self.batch.sequences {
            tokens.extend((0..slice.tokens).map(|i| (slice, slice.position + i as u32)));
        }
        tokens
    }

    fn rotated(&self, x: View, rope: Option<usize>, head_width: u32) -> Vec<Row> {
        let Some(rope) = rope else { return self.get(x) };
        let rows = self.get(x).into_iter().zip(self.tokens());
        rows.map(|(x, (_, position))| self.reference.rotate(&x, rope, head_width as usize, position))
            .collect()
    }

    fn instr(&mut self, instr: &Instr) {
        match instr {
            Instr::Embedding { table, index, out } => {
                let entry = |(token, (_, position)): (usize, (&SequenceSlice, u32))| match index {
                    EmbeddingIndex::Tokens => self.batch.tokens[token].index(),
                    EmbeddingIndex::Positions(offset) => (position + offset) as usize,
                    EmbeddingIndex::Constant(row) => *row as usize,
                };
                let entries = self.tokens().into_iter().enumerate().map(entry);
                let rows = entries
                    .map(|entry| self.reference.matrix_row(*table, entry).to_vec())
                    .collect();
                self.put(*out, rows);
            }
            Instr::Linear {
                x,
                weight,
                bias,
                accumulate,
                out,
            } => {
                let before = self.get(*out);
                let value = |(x, before): (Row, Row)| {
                    let mut row = self.reference.times(&x, *weight);
                    for (i, (value, before)) in row.iter_mut().zip(before).enumerate() {
                        *value += bias.map_or(0.0, |bias| self.reference.weights[bias.index()][i]);
                        *value += if *accumulate { before } else { 0.0 };
                    }
                    row
                };
                let rows = self.get(*x).into_iter().zip(before).map(value).collect();
                self.put(*out, rows);
            }
            Instr::Norm { x, norm, out } => {
                let rows = self
                    .get(*x)
                    .iter()
                    .map(|row| self.reference.normalise(row, norm))
                    .collect();
                self.put(*out, rows);
            }
            Instr::AddNorm {
                residual,
                delta,
                norm,
                out,
            } => {
                self.zip(*residual, *delta, *residual, |a, b| a + b);
                self.instr(&Instr::Norm {
                    x: *residual,
                    norm: *norm,
                    out: *out,
                });
            }
            Instr::Rope { x, rope, head_width } => {
                let rows = self.rotated(*x, Some(rope.index()), *head_width);
                self.put(*x, rows);
            }
            Instr::RopeAppend {
                layer,
                q,
                k,
                v,
                q_rope,
                k_rope,
            } => {
                let width = self.reference.program.layers[layer.index()].head_width;
                let q_rows = self.rotated(*q, q_rope.map(|rope| rope.index()), width);
                let k_rows = self.rotated(*k, k_rope.map(|rope| rope.index()), width);
                let v_rows = self.get(*v);
                self.put(*q, q_rows);
                let tokens = self.block_tokens();
                let places: Vec<_> = self
                    .tokens()
                    .into_iter()
                    .map(|(slice, p)| (slice.blocks[p as usize / tokens], p as usize % tokens))
                    .collect();
                for (((block, slot), k), v) in places.into_iter().zip(k_rows).zip(v_rows) {
                    self.reference.cache.insert((layer.index(), block, slot), (k, v));
                }
            }
            Instr::Attention { layer, q, out } => {
                let rows = self.get(*q).into_iter().zip(self.tokens());
                let attend = |(q, (slice, p)): (Row, (&SequenceSlice, u32))| {
                    self.reference.attend(&q, layer.index(), slice, p as usize)
                };
                let rows = rows.map(attend).collect();
                self.put(*out, rows);
            }
            Instr::ActivateMul {
                gate,
                up,
                function,
                out,
            } => {
                self.zip(*gate, *up, *out, |g, u| activation(*function, g) * u);
            }
            Instr::Add { a, b, out } => self.zip(*a, *b, *out, |a, b| a + b),
            Instr::Mul { a, b, out } => self.zip(*a, *b, *out, |a, b| a * b),
            Instr::Scale { x, factor, out } => self.map(*x, *out, |x| x * f64::from(*factor)),
            Instr::Activate { x, function, out } => self.map(*x, *out, |x| activation(*function, x)),
            Instr::SoftCap { x, cap, out } => {
                let cap = f64::from(*cap);
                self.map(*x, *out, |x| cap * (x / cap).tanh());
            }
            Instr::Copy {
                x,
                out,
                group,
                x_stride,
                out_stride,
                groups,
            } => {
                let mut rows = self.get(*out);
                for (to, from) in rows.iter_mut().zip(self.get(*x)) {
                    for g in 0..*groups {
                        for i in 0..*group {
                            to[(g * out_stride + i) as usize] = from[(g * x_stride + i) as usize];
                        }
                    }
                }
                self.put(*out, rows);
            }
            Instr::Mixture { x, mixture, out } => {
                let rows = self
                    .get(*x)
                    .iter()
                    .map(|row| self.reference.mixture(row, mixture))
                    .collect();
                self.put(*out, rows);
            }
            Instr::MeanPool { x, out } => {
                let x = self.get(*x);
                let mean = |slice: &SequenceSlice| {
                    let rows = &x[slice.first_token..slice.first_token + slice.tokens];
                    let column = |c: usize| rows.iter().map(|row| row[c]).sum::<f64>() / rows.len() as f64;
                    (0..out.width as usize).map(column).collect()
                };
                self.put(*out, self.batch.sequences.iter().map(mean).collect());
            }
            Instr::ClsPool { x, out } => {
                let x = self.get(*x);
                self.put(
                    *out,
                    self.batch
                        .sequences
                        .iter()
                        .map(|s| x[s.first_token].clone())
                        .collect(),
                );
            }
            Instr::L2Normalise { x, width, out } => {
                let row = |row: Row| {
                    let group = |group: &[f64]| {
                        let length = group.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
                        group.iter().map(|v| v / length).collect::<Row>()
                    };
                    row.chunks(*width as usize).flat_map(group).collect()
                };
                let rows = self.get(*x).into_iter().map(row).collect();
                self.put(*out, rows);
            }
            Instr::OutputRows { x, out } => {
                let x = self.get(*x);
                self.put(
                    *out,
                    self.batch.output_rows.iter().map(|&row| x[row].clone()).collect(),
                );
            }
        }
    }

    fn block_tokens(&self) -> usize {
        self.reference.block_tokens
    }
}

fn activation(function: Activation, x: f64) -> f64 {
    match function {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    }
}

/// The error function by Simpson's rule over its integral.
fn erf(x: f64) -> f64 {
    const STEPS: u32 = 2_000;
    let h = x / f64::from(STEPS);
    let f = |i: u32| (-(h * f64::from(i)).powi(2)).exp();
    let inner: f64 = (1..STEPS)
        .map(|i| if i % 2 == 1 { 4.0 } else { 2.0 } * f(i))
        .sum();
    std::f64::consts::FRAC_2_SQRT_PI * h / 3.0 * (f(0) + inner + f(STEPS))
}
