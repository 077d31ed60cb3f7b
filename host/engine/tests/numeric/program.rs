//! A program, instruction by instruction, as the device's contract says, and no kinder: buffers start as NaN, an
//! output that overlaps an input where it may not is an error, and `k` is garbage after an append.

use galerne_core::graph::{Activation, EmbeddingIndex, Rows};
use galerne_core::ids::LayerId;
use galerne_kernels::program::{
    AttentionLayer, ExpertSpec, Instr, MixtureSpec, NormKind, NormSpec, Program, RopeId, View, WeightId,
};

use super::{Weights, math};

/// A KV layer: keys and values by position.
type Cache = (Vec<Vec<f64>>, Vec<Vec<f64>>);

/// One sequence, computed in chunks.
pub struct Interpreter<'a> {
    program: &'a Program,
    weights: &'a Weights,
    caches: Vec<Cache>,
    buffers: Vec<Vec<Vec<f64>>>,
    position: usize,
}

impl<'a> Interpreter<'a> {
    pub fn new(program: &'a Program, weights: &'a Weights) -> Self {
        let caches = vec![Cache::default(); program.layers.len()];
        Self {
            program,
            weights,
            caches,
            buffers: Vec::new(),
            position: 0,
        }
    }

    /// Computes the next tokens; the output rows for those wanted.
    pub fn run(&mut self, tokens: &[u32], outputs: &[usize]) -> Vec<Vec<f64>> {
        let rows = |rows: Rows| match rows {
            Rows::Tokens => tokens.len(),
            Rows::Outputs => outputs.len(),
            Rows::Sequences => 1,
        };
        let buffers = self.program.buffers.iter();
        self.buffers = buffers
            .map(|b| vec![vec![f64::NAN; b.width as usize]; rows(b.rows)])
            .collect();
        for instr in &self.program.instrs {
            self.exec(instr, tokens, outputs);
        }
        self.position += tokens.len();
        self.read(self.program.output)
    }

    fn read(&self, view: View) -> Vec<Vec<f64>> {
        let columns = view.start as usize..(view.start + view.width) as usize;
        self.buffers[view.buffer.index()]
            .iter()
            .map(|row| row[columns.clone()].to_vec())
            .collect()
    }

    fn write(&mut self, view: View, rows: Vec<Vec<f64>>) {
        let buffer = &mut self.buffers[view.buffer.index()];
        assert_eq!(buffer.len(), rows.len(), "rows of {view:?}");
        for (to, from) in buffer.iter_mut().zip(rows) {
            assert_eq!(from.len(), view.width as usize, "columns of {view:?}");
            to[view.start as usize..(view.start + view.width) as usize].copy_from_slice(&from);
        }
    }

    fn weight(&self, id: WeightId) -> Vec<f64> {
        let spec = &self.program.weights[id.index()];
        let values: Vec<f64> = spec
            .parts
            .iter()
            .flat_map(|name| self.weights.values(name).0)
            .collect();
        assert_eq!(values.len(), (spec.rows * spec.width) as usize, "{spec:?}");
        values
    }

    fn exec(&mut self, instr: &Instr, tokens: &[u32], outputs: &[usize]) {
        match instr {
            Instr::Embedding { table, index, out } => {
                let (values, width) = (self.weight(*table), out.width as usize);
                let row = |(i, token): (usize, &u32)| {
                    let entry = match index {
                        EmbeddingIndex::Tokens => *token as usize,
                        EmbeddingIndex::Positions(offset) => self.position + i + *offset as usize,
                        EmbeddingIndex::Constant(row) => *row as usize,
                    };
                    values[entry * width..(entry + 1) * width].to_vec()
                };
                let rows = tokens.iter().enumerate().map(row).collect();
                self.write(*out, rows);
            }
            Instr::Linear {
                x,
                weight,
                bias,
                accumulate,
                out,
            } => {
                disjoint(*x, *out);
                let weight = self.weight(*weight);
                let bias = bias.map(|id| self.weight(id));
                let mut rows: Vec<Vec<f64>> = self
                    .read(*x)
                    .iter()
                    .map(|row| math::linear(row, &weight, bias.as_deref()))
                    .collect();
                if *accumulate {
                    rows = zip(&rows, &self.read(*out), |a, b| a + b);
                }
                self.write(*out, rows);
            }
            Instr::Norm { x, norm, out } => {
                same_or_disjoint(*x, *out);
                let rows = self.norm(*x, norm);
                self.write(*out, rows);
            }
            Instr::AddNorm {
                residual,
                delta,
                norm,
                out,
            } => {
                disjoint(*residual, *delta);
                disjoint(*residual, *out);
                disjoint(*delta, *out);
                self.write(
                    *residual,
                    zip(&self.read(*residual), &self.read(*delta), |a, b| a + b),
                );
                let rows = self.norm(*residual, norm);
                self.write(*out, rows);
            }
            Instr::Rope { x, rope, head_width } => {
                let rows = self.rotated(*x, Some(*rope), *head_width);
                self.write(*x, rows);
            }
            Instr::RopeAppend {
                layer,
                q,
                k,
                v,
                q_rope,
                k_rope,
            } => {
                self.append(*layer, [*q, *k, *v], [*q_rope, *k_rope]);
            }
            Instr::Attention { layer, q, out } => {
                disjoint(*q, *out);
                let heads = heads(&self.program.layers[layer.index()]);
                let (keys, values) = &self.caches[layer.index()];
                let row =
                    |(i, q): (usize, &Vec<f64>)| math::attend(q, self.position + i, keys, values, heads);
                let rows = self.read(*q).iter().enumerate().map(row).collect();
                self.write(*out, rows);
            }
            Instr::ActivateMul {
                gate,
                up,
                function,
                out,
            } => {
                same_or_disjoint(*gate, *out);
                disjoint(*up, *out);
                let function: Activation = *function;
                let gate: Vec<Vec<f64>> = map(&self.read(*gate), |x| math::activate(x, function));
                self.write(*out, zip(&gate, &self.read(*up), |a, b| a * b));
            }
            Instr::Add { a, b, out } => self.elementwise(*a, *b, *out, |a, b| a + b),
            Instr::Mul { a, b, out } => self.elementwise(*a, *b, *out, |a, b| a * b),
            Instr::Scale { x, factor, out } => {
                same_or_disjoint(*x, *out);
                self.write(*out, map(&self.read(*x), |x| x * f64::from(*factor)));
            }
            Instr::Activate { x, function, out } => {
                same_or_disjoint(*x, *out);
                self.write(*out, map(&self.read(*x), |x| math::activate(x, *function)));
            }
            Instr::SoftCap { x, cap, out } => {
                same_or_disjoint(*x, *out);
                self.write(*out, map(&self.read(*x), |x| math::soft_cap(x, *cap)));
            }
            Instr::Copy {
                x,
                out,
                group,
                x_stride,
                out_stride,
                groups,
            } => {
                disjoint(*x, *out);
                let (from, mut to) = (self.read(*x), self.read(*out));
                for (from, to) in from.iter().zip(&mut to) {
                    for g in 0..*groups {
                        let (f, t) = ((g * x_stride) as usize, (g * out_stride) as usize);
                        to[t..t + *group as usize].copy_from_slice(&from[f..f + *group as usize]);
                    }
                }
                self.write(*out, to);
            }
            Instr::Mixture { x, mixture, out } => {
                disjoint(*x, *out);
                let rows = self
                    .read(*x)
                    .iter()
                    .map(|row| self.mixture(row, mixture))
                    .collect();
                self.write(*out, rows);
            }
            Instr::MeanPool { x, out } => {
                let rows = self.read(*x);
                let mean = |c: usize| rows.iter().map(|row| row[c]).sum::<f64>() / rows.len() as f64;
                let row = (0..x.width as usize).map(mean).collect();
                self.write(*out, vec![row]);
            }
            Instr::ClsPool { x, out } => {
                let rows = self.read(*x);
                self.write(*out, vec![rows[0].clone()]);
            }
            Instr::L2Normalise { x, width, out } => {
                same_or_disjoint(*x, *out);
                let rows = groups(&self.read(*x), *width, math::l2_normalise);
                self.write(*out, rows);
            }
            Instr::OutputRows { x, out } => {
                let rows = self.read(*x);
                self.write(*out, outputs.iter().map(|row| rows[*row].clone()).collect());
            }
        }
    }

    fn elementwise(&mut self, a: View, b: View, out: View, f: fn(f64, f64) -> f64) {
        same_or_disjoint(a, out);
        same_or_disjoint(b, out);
        self.write(out, zip(&self.read(a), &self.read(b), f));
    }

    fn norm(&self, x: View, norm: &NormSpec) -> Vec<Vec<f64>> {
        let weight = self.weight(norm.weight);
        let eps = f64::from(norm.eps);
        match norm.kind {
            NormKind::Rms { weight_offset } => groups(&self.read(x), norm.width, |h| {
                math::rms_norm(h, &weight, eps, f64::from(weight_offset))
            }),
            NormKind::Layer { bias } => {
                let bias = bias.map(|id| self.weight(id));
                groups(&self.read(x), norm.width, |h| {
                    math::layer_norm(h, &weight, bias.as_deref(), eps)
                })
            }
        }
    }

    fn rotated(&self, x: View, rope: Option<RopeId>, head_width: u32) -> Vec<Vec<f64>> {
        let mut rows = self.read(x);
        let Some(rope) = rope.map(|id| &self.program.ropes[id.index()]) else {
            return rows;
        };
        for (i, row) in rows.iter_mut().enumerate() {
            for head in row.chunks_exact_mut(head_width as usize) {
                math::rope(
                    head,
                    self.position + i,
                    &rope.inv_freq,
                    rope.pairing,
                    rope.attention_factor,
                );
            }
        }
        rows
    }

    fn append(&mut self, layer: LayerId, [q, k, v]: [View; 3], [q_rope, k_rope]: [Option<RopeId>; 2]) {
        let head_width = self.program.layers[layer.index()].head_width;
        let rotated_q = self.rotated(q, q_rope, head_width);
        let (keys, values) = (self.rotated(k, k_rope, head_width), self.read(v));
        if k_rope.is_some() {
            // "may be left rotated or not"
            let garbage = map(&keys, |_| f64::NAN);
            disjoint(q, k);
            disjoint(v, k);
            self.write(k, garbage);
        }
        if q_rope.is_some() {
            disjoint(q, k);
            disjoint(q, v);
            self.write(q, rotated_q);
        }
        let cache = &mut self.caches[layer.index()];
        cache.0.extend(keys);
        cache.1.extend(values);
    }

    fn mixture(&self, row: &[f64], mixture: &MixtureSpec) -> Vec<f64> {
        let feed = |expert: &ExpertSpec| {
            let both = math::linear(row, &self.weight(expert.gate_up), None);
            let (gate, up) = both.split_at(both.len() / 2);
            let inner: Vec<f64> = gate
                .iter()
                .zip(up)
                .map(|(g, u)| math::activate(*g, mixture.function) * u)
                .collect();
            math::linear(&inner, &self.weight(expert.down), None)
        };
        let scores = math::linear(row, &self.weight(mixture.router), None);
        let mut out = vec![0.0; row.len()];
        let mut add = |part: Vec<f64>, factor: f64| {
            out.iter_mut().zip(part).for_each(|(o, p)| *o += factor * p);
        };
        for (expert, weight) in math::route(&scores, mixture.top_k as usize, mixture.normalisation) {
            add(feed(&mixture.experts[expert]), weight);
        }
        if let Some(shared) = &mixture.shared {
            let gate = mixture.shared_gate.map_or(1.0, |id| {
                math::activate(math::linear(row, &self.weight(id), None)[0], Activation::Sigmoid)
            });
            add(feed(shared), gate);
        }
        out
    }
}

fn heads(layer: &AttentionLayer) -> math::Heads {
    math::Heads {
        heads: layer.heads,
        kv_heads: layer.kv_heads,
        head_width: layer.head_width,
        scale: layer.scale,
        causal: layer.causal,
        window: layer.sliding_window,
        cap: layer.soft_cap,
    }
}

fn map(rows: &[Vec<f64>], f: impl Fn(f64) -> f64) -> Vec<Vec<f64>> {
    rows.iter()
        .map(|row| row.iter().map(|x| f(*x)).collect())
        .collect()
}

fn zip(a: &[Vec<f64>], b: &[Vec<f64>], f: impl Fn(f64, f64) -> f64) -> Vec<Vec<f64>> {
    a.iter()
        .zip(b)
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect())
        .collect()
}

fn groups(rows: &[Vec<f64>], width: u32, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<Vec<f64>> {
    rows.iter()
        .map(|row| row.chunks_exact(width as usize).flat_map(&f).collect())
        .collect()
}

fn disjoint(a: View, b: View) {
    let apart = a.buffer != b.buffer || a.start + a.width <= b.start || b.start + b.width <= a.start;
    assert!(apart, "{a:?} and {b:?} overlap");
}

fn same_or_disjoint(a: View, b: View) {
    if a != b {
        disjoint(a, b);
    }
}
