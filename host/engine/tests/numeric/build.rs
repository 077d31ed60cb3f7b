//! Graphs to lower: models in small, and arbitrary ones. Weights are made up along the way.

use galerne_core::graph::{
    Activation, AttentionSpec, EmbeddingIndex, FeedForward, Graph, Op, RopePairing, RouterNormalisation,
};
use galerne_core::ids::{LayerId, NodeId};
use galerne_core::limits::GraphLimits;
use galerne_core::validate::{ValidGraph, validate};

use super::Weights;

pub const VOCABULARY: u32 = 29;
pub const WIDTH: u32 = 24;
const HEADS: u32 = 4;
const KV_HEADS: u32 = 2;
const HEAD: u32 = 6;
const FFN: u32 = 40;

/// A graph under construction.
#[derive(Default)]
pub struct Build {
    pub nodes: Vec<Op>,
    pub weights: Weights,
    layers: u32,
}

impl Build {
    pub fn push(&mut self, op: Op) -> NodeId {
        self.nodes.push(op);
        NodeId(u32::try_from(self.nodes.len() - 1).expect("small"))
    }

    pub fn finish(self, output: NodeId) -> (ValidGraph, Weights) {
        use galerne_core::weights::WeightSource as _;
        let graph = Graph {
            nodes: self.nodes,
            output,
            context_tokens_max: 64,
        };
        let valid = validate(graph, self.weights.index(), &GraphLimits::default()).expect("a valid graph");
        (valid, self.weights)
    }

    pub fn embedding(&mut self, name: &str, entries: u32, index: EmbeddingIndex) -> NodeId {
        self.weights.add(name, &[entries, WIDTH]);
        self.push(Op::Embedding {
            weight: name.to_owned(),
            index,
        })
    }

    pub fn linear(&mut self, x: NodeId, name: &str, out: u32, inner: u32, bias: bool) -> NodeId {
        self.weights.add(name, &[out, inner]);
        let bias = bias.then(|| format!("{name}.bias"));
        if let Some(name) = &bias {
            self.weights.add(name, &[out]);
        }
        self.push(Op::Linear {
            x,
            weight: name.to_owned(),
            bias,
        })
    }

    pub fn rms(&mut self, x: NodeId, name: &str, width: u32, weight_offset: f32) -> NodeId {
        self.weights.add(name, &[width]);
        self.push(Op::RmsNorm {
            x,
            weight: name.to_owned(),
            eps: 1e-5,
            weight_offset,
        })
    }

    pub fn layer_norm(&mut self, x: NodeId, name: &str, width: u32) -> NodeId {
        let bias = format!("{name}.bias");
        self.weights.add(name, &[width]);
        self.weights.add(&bias, &[width]);
        self.push(Op::LayerNorm {
            x,
            weight: name.to_owned(),
            bias: Some(bias),
            eps: 1e-5,
        })
    }

    pub fn heads(&mut self, x: NodeId, heads: u32) -> NodeId {
        self.push(Op::ReshapeHeads { x, heads })
    }

    pub fn rope(&mut self, x: NodeId, pairs: u32) -> NodeId {
        let inv_freq = (0..pairs)
            .map(|i| 100_f32.powf(-(i as f32) / pairs as f32))
            .collect();
        self.push(Op::Rope {
            x,
            inv_freq,
            pairing: RopePairing::Half,
            attention_factor: 1.0,
        })
    }

    pub fn add(&mut self, a: NodeId, b: NodeId) -> NodeId {
        self.push(Op::Add { a, b })
    }

    pub fn gated(&mut self, gate: NodeId, up: NodeId, function: Activation) -> NodeId {
        let a = self.push(Op::Activate { x: gate, function });
        self.push(Op::Mul { a, b: up })
    }

    pub fn attention(&mut self, [q, k, v]: [NodeId; 3], kv_heads: u32, causal: bool) -> NodeId {
        let layer = LayerId(self.layers);
        self.layers += 1;
        let spec = AttentionSpec {
            layer,
            heads: HEADS,
            kv_heads,
            head_width: HEAD,
            scale: 0.4,
            causal,
            sliding_window: (layer.0 % 2 == 1).then_some(3),
            soft_cap: (layer.0 % 2 == 1).then_some(2.0),
        };
        self.push(Op::Attention { q, k, v, spec })
    }

    pub fn logits(&mut self, x: NodeId, weight: &str) -> NodeId {
        self.push(Op::Logits {
            x,
            weight: weight.to_owned(),
        })
    }

    pub fn experts(&mut self, x: NodeId, name: &str, shared: bool) -> NodeId {
        let names = |e: &str| FeedForward {
            gate: format!("{name}.{e}.gate"),
            up: format!("{name}.{e}.up"),
            down: format!("{name}.{e}.down"),
        };
        let experts: Vec<_> = ["0", "1", "2"].map(names).to_vec();
        let shared = shared.then(|| names("shared"));
        for expert in experts.iter().chain(&shared) {
            self.weights.add(&expert.gate, &[FFN, WIDTH]);
            self.weights.add(&expert.up, &[FFN, WIDTH]);
            self.weights.add(&expert.down, &[WIDTH, FFN]);
        }
        let (router, gate) = (format!("{name}.router"), format!("{name}.shared_gate"));
        self.weights.add(&router, &[3, WIDTH]);
        self.weights.add(&gate, &[1, WIDTH]);
        self.push(Op::MixtureOfExperts {
            x,
            router,
            experts,
            top_k: 2,
            normalisation: RouterNormalisation::SoftmaxChosen,
            function: Activation::Silu,
            shared_gate: shared.is_some().then_some(gate),
            shared,
        })
    }
}

/// What distinguishes the decoder families.
#[derive(Debug, Clone, Copy, Default)]
pub struct Family {
    /// Qwen 2: biases on q, k and v.
    pub qkv_bias: bool,
    /// Qwen 3: norms of each head between linear and rope.
    pub head_norms: bool,
    /// Gemma 2: norms after attention and feed-forward, offsets of 1, soft caps, scaled embedding.
    pub gemma: bool,
    /// Mixtral: experts instead of one feed-forward.
    pub experts: bool,
    /// Phi: one input norm, attention and feed-forward in parallel, partial rotation.
    pub parallel: bool,
}

/// A decoder of two layers.
pub fn decoder(family: Family) -> (ValidGraph, Weights) {
    let mut b = Build::default();
    let offset = if family.gemma { 1.0 } else { 0.0 };
    let mut x = b.embedding("embed", VOCABULARY, EmbeddingIndex::Tokens);
    if family.gemma {
        x = b.push(Op::Scale { x, factor: 4.0 });
    }
    for layer in 0..2 {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let h = b.rms(x, &name("input_norm"), WIDTH, offset);
        let mut attended = attention_part(&mut b, h, family, &name);
        if family.gemma {
            attended = b.rms(attended, &name("post_attention_norm"), WIDTH, offset);
        }
        if family.parallel {
            let fed = feed_forward(&mut b, h, family, &name);
            let both = b.add(attended, fed);
            x = b.add(x, both);
            continue;
        }
        x = b.add(x, attended);
        let h = b.rms(x, &name("ffn_norm"), WIDTH, offset);
        let mut fed = feed_forward(&mut b, h, family, &name);
        if family.gemma {
            fed = b.rms(fed, &name("post_ffn_norm"), WIDTH, offset);
        }
        x = b.add(x, fed);
    }
    let x = b.push(Op::OutputRows { x });
    let x = b.rms(x, "norm", WIDTH, offset);
    let mut logits = b.logits(x, "embed");
    if family.gemma {
        logits = b.push(Op::SoftCap { x: logits, cap: 3.0 });
    }
    b.finish(logits)
}

fn attention_part(b: &mut Build, h: NodeId, family: Family, name: &dyn Fn(&str) -> String) -> NodeId {
    let mut heads = |part: &str, heads: u32| {
        let x = b.linear(h, &name(part), heads * HEAD, WIDTH, family.qkv_bias);
        b.heads(x, heads)
    };
    let (mut q, mut k, v) = (heads("q", HEADS), heads("k", KV_HEADS), heads("v", KV_HEADS));
    if family.head_norms {
        q = b.rms(q, &name("q_norm"), HEAD, 0.0);
        k = b.rms(k, &name("k_norm"), HEAD, 0.0);
    }
    let pairs = if family.parallel { 2 } else { HEAD / 2 };
    let (q, k) = (b.rope(q, pairs), b.rope(k, pairs));
    let attended = b.attention([q, k, v], KV_HEADS, true);
    let joined = b.heads(attended, 1);
    b.linear(joined, &name("o"), WIDTH, HEADS * HEAD, false)
}

fn feed_forward(b: &mut Build, h: NodeId, family: Family, name: &dyn Fn(&str) -> String) -> NodeId {
    if family.experts {
        return b.experts(h, &name("moe"), true);
    }
    let gate = b.linear(h, &name("gate"), FFN, WIDTH, false);
    let up = b.linear(h, &name("up"), FFN, WIDTH, false);
    let function = if family.gemma {
        Activation::GeluTanh
    } else {
        Activation::Silu
    };
    let inner = b.gated(gate, up, function);
    b.linear(inner, &name("down"), WIDTH, FFN, false)
}

/// A BERT-like encoder: learned positions, norms after the adds, mean pooling.
pub fn encoder() -> (ValidGraph, Weights) {
    let mut b = Build::default();
    let words = b.embedding("words", VOCABULARY, EmbeddingIndex::Tokens);
    let positions = b.embedding("positions", 66, EmbeddingIndex::Positions(2));
    let types = b.embedding("types", 2, EmbeddingIndex::Constant(0));
    let sum = b.add(words, positions);
    let sum = b.add(sum, types);
    let mut x = b.layer_norm(sum, "embed_norm", WIDTH);
    for layer in 0..2 {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let mut heads = |part: &str| {
            let linear = b.linear(x, &name(part), WIDTH, WIDTH, true);
            b.heads(linear, HEADS)
        };
        let qkv = [heads("q"), heads("k"), heads("v")];
        let attended = b.attention(qkv, HEADS, false);
        let joined = b.heads(attended, 1);
        let out = b.linear(joined, &name("o"), WIDTH, WIDTH, true);
        let sum = b.add(out, x);
        x = b.layer_norm(sum, &name("norm1"), WIDTH);
        let inner = b.linear(x, &name("in"), FFN, WIDTH, true);
        let inner = b.push(Op::Activate {
            x: inner,
            function: Activation::Gelu,
        });
        let out = b.linear(inner, &name("out"), WIDTH, FFN, true);
        let sum = b.add(out, x);
        x = b.layer_norm(sum, &name("norm2"), WIDTH);
    }
    let pooled = b.push(Op::MeanPool { x });
    let output = b.push(Op::L2Normalise { x: pooled });
    b.finish(output)
}

/// A value of an arbitrary graph.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Value {
    node: NodeId,
    heads: u32,
    width: u32,
}

/// An arbitrary graph of token rows, each op decided by a few of `choices`.
pub fn arbitrary(choices: &[[u16; 4]]) -> (ValidGraph, Weights) {
    let mut b = Build::default();
    let node = b.embedding("embed", VOCABULARY, EmbeddingIndex::Tokens);
    let mut values = vec![Value {
        node,
        heads: 1,
        width: WIDTH,
    }];
    for (step, choice) in choices.iter().enumerate() {
        let value = arbitrary_op(&mut b, &values, step, *choice);
        values.push(value);
    }
    let last = values[values.len() - 1];
    let flat = b.heads(last.node, 1);
    let x = b.linear(flat, "last", WIDTH, last.heads * last.width, false);
    let x = b.push(Op::OutputRows { x });
    let logits = b.logits(x, "embed");
    b.finish(logits)
}

fn arbitrary_op(b: &mut Build, values: &[Value], step: usize, [kind, one, two, three]: [u16; 4]) -> Value {
    // Recent values are likelier, so that chains as in models come up, old ones remain possible.
    let pick = |n: u16| values[values.len() - 1 - (n as usize % values.len()).min(n as usize % 5)];
    let name = format!("w{step}");
    let x = pick(one);
    let alike = |x: Value, n: u16| {
        let fits = |v: &&Value| (v.heads, v.width) == (x.heads, x.width);
        let found: Vec<_> = values.iter().rev().filter(fits).collect();
        *found[n as usize % found.len()]
    };
    let flat = |b: &mut Build, v: Value| if v.heads == 1 { v.node } else { b.heads(v.node, 1) };
    let function = [Activation::Silu, Activation::Relu, Activation::Tanh][three as usize % 3];
    let same = |node| Value { node, ..x };
    match kind % 14 {
        0 | 1 => {
            let inner = flat(b, x);
            let width = [WIDTH, WIDTH, 12][two as usize % 3];
            let node = b.linear(inner, &name, width, x.heads * x.width, three % 4 == 0);
            Value {
                node,
                heads: 1,
                width,
            }
        }
        2 | 3 => same(b.add(x.node, alike(x, two).node)),
        4 => same(b.push(Op::Mul {
            a: x.node,
            b: alike(x, two).node,
        })),
        5 => same(b.gated(x.node, alike(x, two).node, function)),
        6 => same(b.push(Op::Activate { x: x.node, function })),
        7 => same(b.rms(x.node, &name, x.width, 1.0)),
        8 if x.width >= 2 => {
            let start = u32::from(two) % x.width;
            let length = 1 + u32::from(three) % (x.width - start);
            let node = b.push(Op::Slice {
                x: x.node,
                start,
                length,
            });
            Value {
                node,
                heads: x.heads,
                width: length,
            }
        }
        9 => {
            let other = alike(x, two);
            let node = b.push(Op::Concat {
                parts: vec![x.node, other.node],
            });
            if x.width > 30 {
                same(x.node)
            } else {
                Value {
                    node,
                    heads: x.heads,
                    width: 2 * x.width,
                }
            }
        }
        10 if (x.heads * x.width).is_multiple_of(4) => Value {
            node: b.heads(x.node, 4),
            heads: 4,
            width: x.heads * x.width / 4,
        },
        11 if x.width >= 2 => same(b.rope(x.node, 1 + u32::from(two) % (x.width / 2))),
        12 | 13 => {
            let mut head = |n: u16, heads: u32| {
                let v = pick(n);
                let fits = v.heads * v.width == heads * HEAD && !n.is_multiple_of(3);
                let x = flat(b, v);
                let inner = v.heads * v.width;
                let x = if fits {
                    x
                } else {
                    b.linear(x, &format!("{name}.{n}.{heads}"), heads * HEAD, inner, false)
                };
                b.heads(x, heads)
            };
            let (q, k, v) = (head(one, HEADS), head(two, HEADS), head(three, HEADS));
            let q = if one % 4 > 0 { b.rope(q, 3) } else { q };
            let k = if two % 4 > 0 { b.rope(k, 3) } else { k };
            Value {
                node: b.attention([q, k, v], HEADS, true),
                heads: HEADS,
                width: HEAD,
            }
        }
        _ => same(b.push(Op::SoftCap { x: x.node, cap: 2.0 })),
    }
}
