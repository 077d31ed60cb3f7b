//! A graph, node by node, exactly as its contract says.

use galerne_core::graph::{EmbeddingIndex, FeedForward, Op};
use galerne_core::ids::NodeId;
use galerne_core::validate::ValidGraph;

use super::{Weights, math};

type Rows = Vec<Vec<f64>>;

/// The output rows for one sequence; `outputs` are the token rows whose output is wanted.
pub fn run(graph: &ValidGraph, weights: &Weights, tokens: &[u32], outputs: &[usize]) -> Rows {
    let mut values: Vec<Rows> = Vec::new();
    for (index, op) in graph.graph().nodes.iter().enumerate() {
        let node = NodeId(u32::try_from(index).expect("small"));
        let value = eval(graph, weights, tokens, outputs, &values, node, op);
        values.push(value);
    }
    values[graph.graph().output.index()].clone()
}

fn eval(
    graph: &ValidGraph,
    weights: &Weights,
    tokens: &[u32],
    outputs: &[usize],
    values: &[Rows],
    node: NodeId,
    op: &Op,
) -> Rows {
    let rows = |x: &NodeId| &values[x.index()];
    let map = |x: &NodeId, f: &dyn Fn(f64) -> f64| -> Rows {
        rows(x)
            .iter()
            .map(|row| row.iter().map(|x| f(*x)).collect())
            .collect()
    };
    let zip = |a: &NodeId, b: &NodeId, f: fn(f64, f64) -> f64| -> Rows {
        let row = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect();
        rows(a).iter().zip(rows(b)).map(row).collect()
    };
    let width = graph.shape(node).width as usize;
    let heads = |x: &NodeId, f: &dyn Fn(usize, &[f64]) -> Vec<f64>| -> Rows {
        let width = graph.shape(*x).width as usize;
        let row = |(p, row): (usize, &Vec<f64>)| row.chunks_exact(width).flat_map(|h| f(p, h)).collect();
        rows(x).iter().enumerate().map(row).collect()
    };
    match op {
        Op::Embedding { weight, index } => {
            let (table, width) = weights.values(weight);
            let row = |(position, token): (usize, &u32)| {
                let entry = match index {
                    EmbeddingIndex::Tokens => *token as usize,
                    EmbeddingIndex::Positions(offset) => position + *offset as usize,
                    EmbeddingIndex::Constant(row) => *row as usize,
                };
                table[entry * width..(entry + 1) * width].to_vec()
            };
            tokens.iter().enumerate().map(row).collect()
        }
        Op::Linear { x, weight, bias } => {
            let bias = bias.as_ref().map(|name| weights.values(name).0);
            let weight = weights.values(weight).0;
            rows(x)
                .iter()
                .map(|row| math::linear(row, &weight, bias.as_deref()))
                .collect()
        }
        Op::Logits { x, weight } => {
            let weight = weights.values(weight).0;
            rows(x)
                .iter()
                .map(|row| math::linear(row, &weight, None))
                .collect()
        }
        Op::RmsNorm {
            x,
            weight,
            eps,
            weight_offset,
        } => {
            let weight = weights.values(weight).0;
            heads(x, &|_, h| {
                math::rms_norm(h, &weight, f64::from(*eps), f64::from(*weight_offset))
            })
        }
        Op::LayerNorm { x, weight, bias, eps } => {
            let weight = weights.values(weight).0;
            let bias = bias.as_ref().map(|name| weights.values(name).0);
            heads(x, &|_, h| {
                math::layer_norm(h, &weight, bias.as_deref(), f64::from(*eps))
            })
        }
        Op::Rope {
            x,
            inv_freq,
            pairing,
            attention_factor,
        } => heads(x, &|p, h| {
            let mut head = h.to_vec();
            math::rope(&mut head, p, inv_freq, *pairing, *attention_factor);
            head
        }),
        Op::Attention { q, k, v, spec } => {
            let heads = math::Heads {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_width: spec.head_width,
                scale: spec.scale,
                causal: spec.causal,
                window: spec.sliding_window,
                cap: spec.soft_cap,
            };
            let row = |(p, q): (usize, &Vec<f64>)| math::attend(q, p, rows(k), rows(v), heads);
            rows(q).iter().enumerate().map(row).collect()
        }
        Op::Add { a, b } => zip(a, b, |a, b| a + b),
        Op::Mul { a, b } => zip(a, b, |a, b| a * b),
        Op::Scale { x, factor } => map(x, &|x| x * f64::from(*factor)),
        Op::Activate { x, function } => map(x, &|x| math::activate(x, *function)),
        Op::SoftCap { x, cap } => map(x, &|x| math::soft_cap(x, *cap)),
        Op::Slice { x, start, length } => {
            let (start, end) = (*start as usize, (*start + *length) as usize);
            heads(x, &|_, h| h[start..end].to_vec())
        }
        Op::Concat { parts } => {
            let row = |r: usize| {
                let head = |h: usize| {
                    parts.iter().flat_map(move |part| {
                        let width = graph.shape(*part).width as usize;
                        rows(part)[r][h * width..(h + 1) * width].to_vec()
                    })
                };
                (0..graph.shape(node).heads as usize).flat_map(head).collect()
            };
            (0..rows(&parts[0]).len()).map(row).collect()
        }
        Op::ReshapeHeads { x, .. } => rows(x).clone(),
        Op::MixtureOfExperts { .. } => mixture(weights, values, op),
        Op::MeanPool { x } => {
            let count = rows(x).len() as f64;
            let columns = rows(x)[0].len();
            vec![
                (0..columns)
                    .map(|c| rows(x).iter().map(|row| row[c]).sum::<f64>() / count)
                    .collect(),
            ]
        }
        Op::ClsPool { x } => vec![rows(x)[0].clone()],
        Op::L2Normalise { x } => {
            assert!(width > 0);
            heads(x, &|_, h| math::l2_normalise(h))
        }
        Op::OutputRows { x } => outputs.iter().map(|row| rows(x)[*row].clone()).collect(),
    }
}

fn mixture(weights: &Weights, values: &[Rows], op: &Op) -> Rows {
    let Op::MixtureOfExperts {
        x,
        router,
        experts,
        top_k,
        normalisation,
        function,
        shared,
        shared_gate,
    } = op
    else {
        unreachable!("called for mixtures")
    };
    let feed = |row: &[f64], expert: &FeedForward| {
        let gate = math::linear(row, &weights.values(&expert.gate).0, None);
        let up = math::linear(row, &weights.values(&expert.up).0, None);
        let inner: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| math::activate(*g, *function) * u)
            .collect();
        math::linear(&inner, &weights.values(&expert.down).0, None)
    };
    let one = |row: &Vec<f64>| {
        let scores = math::linear(row, &weights.values(router).0, None);
        let mut out = vec![0.0; row.len()];
        let mut add = |part: Vec<f64>, factor: f64| {
            out.iter_mut().zip(part).for_each(|(o, p)| *o += factor * p);
        };
        for (expert, weight) in math::route(&scores, *top_k as usize, *normalisation) {
            add(feed(row, &experts[expert]), weight);
        }
        if let Some(shared) = shared {
            let gate = shared_gate.as_ref().map_or(1.0, |name| {
                let score = math::linear(row, &weights.values(name).0, None)[0];
                math::activate(score, galerne_core::graph::Activation::Sigmoid)
            });
            add(feed(row, shared), gate);
        }
        out
    };
    values[x.index()].iter().map(one).collect()
}
