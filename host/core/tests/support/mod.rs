//! What the gate's tests and its fuzz target share: a small valid Llama, foreign bytes as a case, and the
//! invariants of an accepted graph, checked apart from the gate's own code.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part of this module"
)]

use std::collections::BTreeMap;

use galerne_core::dtype::DType;
use galerne_core::graph::{
    Activation, AttentionSpec, EmbeddingIndex, FeedForward, Graph, Op, RopePairing, RouterNormalisation, Rows,
};
use galerne_core::ids::{LayerId, NodeId};
use galerne_core::limits::GraphLimits;
use galerne_core::validate::{GraphError, ValidGraph, validate};
use galerne_core::weights::{WeightIndex, WeightInfo};
use serde::{Deserialize, Serialize};

/// A graph and the weights it is checked against.
#[derive(Debug, Clone)]
pub struct Model {
    pub graph: Graph,
    pub weights: WeightIndex,
}

impl Model {
    pub fn validate(&self) -> Result<ValidGraph, GraphError> {
        self.validate_within(&GraphLimits::default())
    }

    pub fn validate_within(&self, limits: &GraphLimits) -> Result<ValidGraph, GraphError> {
        validate(self.graph.clone(), &self.weights, limits)
    }

    pub fn put(&mut self, name: &str, dtype: DType, shape: &[u64]) {
        self.weights.tensors.insert(
            name.to_owned(),
            WeightInfo {
                dtype,
                shape: shape.to_vec(),
            },
        );
    }

    pub fn push(&mut self, op: Op) -> NodeId {
        self.graph.nodes.push(op);
        NodeId(u32::try_from(self.graph.nodes.len() - 1).expect("small graph"))
    }

    /// The position of the first node with this op name.
    pub fn find(&self, name: &str) -> usize {
        self.graph
            .nodes
            .iter()
            .position(|op| op.name() == name)
            .expect("the op is in the graph")
    }
}

pub const WIDTH: u32 = 64;
pub const HEADS: u32 = 4;
pub const KV_HEADS: u32 = 2;
pub const HEAD_WIDTH: u32 = 16;
pub const FFN: u64 = 96;
pub const VOCABULARY: u64 = 320;
pub const LAYERS: u32 = 2;

/// A Llama of two layers with grouped heads, Q4_1 matrices and tied embeddings.
pub fn llama() -> Model {
    let graph = Graph {
        nodes: Vec::new(),
        output: NodeId(0),
        context_tokens_max: 128,
    };
    let mut model = Model {
        graph,
        weights: WeightIndex::default(),
    };
    model.put("embed", DType::Q8_0, &[VOCABULARY, u64::from(WIDTH)]);
    model.put("norm", DType::F32, &[u64::from(WIDTH)]);
    let mut x = model.push(Op::Embedding {
        weight: "embed".into(),
        index: EmbeddingIndex::Tokens,
    });
    for layer in 0..LAYERS {
        x = llama_attention(&mut model, x, layer);
        x = llama_feed_forward(&mut model, x, layer);
    }
    let x = model.push(Op::OutputRows { x });
    let x = norm(&mut model, x, "norm");
    model.graph.output = model.push(Op::Logits {
        x,
        weight: "embed".into(),
    });
    model
}

fn norm(model: &mut Model, x: NodeId, weight: &str) -> NodeId {
    model.push(Op::RmsNorm {
        x,
        weight: weight.into(),
        eps: 1e-5,
        weight_offset: 0.0,
    })
}

fn linear(model: &mut Model, x: NodeId, weight: String, shape: [u64; 2]) -> NodeId {
    model.put(&weight, DType::Q4_1, &shape);
    model.push(Op::Linear {
        x,
        weight,
        bias: None,
    })
}

fn split(model: &mut Model, x: NodeId, heads: u32) -> NodeId {
    model.push(Op::ReshapeHeads { x, heads })
}

fn rope(model: &mut Model, x: NodeId) -> NodeId {
    let inv_freq = (0_u16..8)
        .map(|pair| 10_000_f32.powf(-f32::from(pair) / 8.0))
        .collect();
    model.push(Op::Rope {
        x,
        inv_freq,
        pairing: RopePairing::Half,
        attention_factor: 1.0,
    })
}

fn llama_attention(model: &mut Model, x: NodeId, layer: u32) -> NodeId {
    let width = u64::from(WIDTH);
    let kv_width = u64::from(KV_HEADS * HEAD_WIDTH);
    let name = |part: &str| format!("layers.{layer}.{part}");
    model.put(&name("norm"), DType::F32, &[width]);
    let h = norm(model, x, &name("norm"));
    let q = linear(model, h, name("q"), [width, width]);
    let k = linear(model, h, name("k"), [kv_width, width]);
    let v = linear(model, h, name("v"), [kv_width, width]);
    let q = split(model, q, HEADS);
    let k = split(model, k, KV_HEADS);
    let v = split(model, v, KV_HEADS);
    let q = rope(model, q);
    let k = rope(model, k);
    let spec = AttentionSpec {
        layer: LayerId(layer),
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_width: HEAD_WIDTH,
        scale: 0.25,
        causal: true,
        sliding_window: None,
        soft_cap: None,
    };
    let attended = model.push(Op::Attention { q, k, v, spec });
    let joined = split(model, attended, 1);
    let o = linear(model, joined, name("o"), [width, width]);
    model.push(Op::Add { a: x, b: o })
}

fn llama_feed_forward(model: &mut Model, x: NodeId, layer: u32) -> NodeId {
    let width = u64::from(WIDTH);
    let name = |part: &str| format!("layers.{layer}.{part}");
    model.put(&name("ffn_norm"), DType::Bf16, &[width]);
    let h = norm(model, x, &name("ffn_norm"));
    let gate = linear(model, h, name("gate"), [FFN, width]);
    let up = linear(model, h, name("up"), [FFN, width]);
    let gate = model.push(Op::Activate {
        x: gate,
        function: Activation::Silu,
    });
    let product = model.push(Op::Mul { a: gate, b: up });
    let down = linear(model, product, name("down"), [width, FFN]);
    model.push(Op::Add { a: x, b: down })
}

/// One embedding, one mixture of two experts with a shared one, logits.
pub fn mixture() -> Model {
    let graph = Graph {
        nodes: Vec::new(),
        output: NodeId(0),
        context_tokens_max: 128,
    };
    let mut model = Model {
        graph,
        weights: WeightIndex::default(),
    };
    let expert = |model: &mut Model, name: &str| {
        let part = |part: &str| format!("{name}.{part}");
        model.put(&part("gate"), DType::Q8_0, &[FFN, 64]);
        model.put(&part("up"), DType::Q8_0, &[FFN, 64]);
        model.put(&part("down"), DType::Q8_0, &[64, FFN]);
        FeedForward {
            gate: part("gate"),
            up: part("up"),
            down: part("down"),
        }
    };
    model.put("embed", DType::F16, &[VOCABULARY, 64]);
    model.put("router", DType::F32, &[2, 64]);
    model.put("shared_gate", DType::F32, &[1, 64]);
    let experts = vec![expert(&mut model, "experts.0"), expert(&mut model, "experts.1")];
    let shared = Some(expert(&mut model, "shared"));
    let x = model.push(Op::Embedding {
        weight: "embed".into(),
        index: EmbeddingIndex::Tokens,
    });
    let x = model.push(Op::MixtureOfExperts {
        x,
        router: "router".into(),
        experts,
        top_k: 1,
        normalisation: RouterNormalisation::SoftmaxChosen,
        function: Activation::Silu,
        shared,
        shared_gate: Some("shared_gate".into()),
    });
    let x = model.push(Op::OutputRows { x });
    model.graph.output = model.push(Op::Logits {
        x,
        weight: "embed".into(),
    });
    model
}

/// A model as foreign JSON: what the fuzz target reads.
#[derive(Debug, Serialize, Deserialize)]
pub struct Case {
    graph: Graph,
    weights: BTreeMap<String, (DType, Vec<u64>)>,
}

impl From<&Model> for Case {
    fn from(model: &Model) -> Self {
        let weights = model.weights.tensors.iter();
        let weights = weights.map(|(name, info)| (name.clone(), (info.dtype, info.shape.clone())));
        Self {
            graph: model.graph.clone(),
            weights: weights.collect(),
        }
    }
}

/// Reads foreign bytes as a case and puts it through the gate. `None` if the bytes are no case at all.
///
/// # Panics
/// If the gate accepts a graph that breaks an invariant.
pub fn run_case(bytes: &[u8]) -> Option<Result<ValidGraph, GraphError>> {
    let case: Case = serde_json::from_slice(bytes).ok()?;
    let tensors = case.weights.into_iter();
    let tensors = tensors.map(|(name, (dtype, shape))| (name, WeightInfo { dtype, shape }));
    let weights = WeightIndex {
        tensors: tensors.collect(),
    };
    let limits = GraphLimits::default();
    let result = validate(case.graph, &weights, &limits);
    match &result {
        Ok(valid) => check_invariants(valid, &weights, &limits),
        Err(error) => assert!(error.to_string().len() < 4_096, "a message must stay short"),
    }
    Some(result)
}

/// What engine and devices rely on.
///
/// # Panics
/// If one does not hold.
pub fn check_invariants(valid: &ValidGraph, weights: &WeightIndex, limits: &GraphLimits) {
    let graph = valid.graph();
    assert!(!graph.nodes.is_empty() && graph.nodes.len() <= limits.nodes_max);
    assert!(graph.context_tokens_max >= 1 && graph.context_tokens_max <= limits.context_tokens_max);
    let mut layers = Vec::new();
    for (position, op) in graph.nodes.iter().enumerate() {
        let shape = valid.shape(NodeId(u32::try_from(position).expect("bounded")));
        assert!(
            shape.heads >= 1 && shape.width >= 1,
            "node {position}: empty rows"
        );
        assert!(
            shape.row_elements() <= limits.row_elements_max,
            "node {position}: row too long"
        );
        assert!(
            op.inputs().iter().all(|input| input.index() < position),
            "node {position}: not SSA"
        );
        check_op(valid, op, weights);
        if let Op::Attention { spec, .. } = op {
            layers.push(*spec);
        }
    }
    assert_eq!(layers, valid.layers());
    for (number, spec) in layers.iter().enumerate() {
        assert_eq!(spec.layer.index(), number, "layers have gaps");
    }
    let output = valid.output_shape();
    assert_ne!(output.rows, Rows::Tokens);
    if let Some(vocabulary) = valid.vocabulary() {
        assert_eq!(
            (output.rows, output.heads, output.width),
            (Rows::Outputs, 1, vocabulary)
        );
        assert!(u64::from(vocabulary) <= limits.vocabulary_max);
        assert!(valid.token_entries().is_none_or(|entries| vocabulary <= entries));
    }
    assert_eq!(
        validate(graph.clone(), weights, limits).as_ref(),
        Ok(valid),
        "the gate is not deterministic"
    );
}

fn check_op(valid: &ValidGraph, op: &Op, weights: &WeightIndex) {
    let shape_of = |name: &String| &weights.tensors.get(name).expect("the weight exists").shape;
    match op {
        Op::Embedding { weight, index } => {
            let entries = shape_of(weight)[0];
            let last = match index {
                EmbeddingIndex::Tokens => {
                    u64::from(valid.token_entries().expect("there is a token table")) - 1
                }
                EmbeddingIndex::Positions(offset) => {
                    u64::from(*offset) + u64::from(valid.graph().context_tokens_max) - 1
                }
                EmbeddingIndex::Constant(row) => u64::from(*row),
            };
            assert!(last < entries, "an embedding reads beyond its table");
        }
        Op::Linear { x, weight, .. } | Op::Logits { x, weight } => {
            assert_eq!(shape_of(weight)[1..], [valid.shape(*x).row_elements()]);
        }
        Op::RmsNorm { x, weight, .. } | Op::LayerNorm { x, weight, .. } => {
            assert_eq!(shape_of(weight)[..], [u64::from(valid.shape(*x).width)]);
        }
        Op::Rope { x, inv_freq, .. } => assert!(2 * inv_freq.len() <= valid.shape(*x).width as usize),
        Op::Attention { q, k, v, spec } => {
            assert_eq!(spec.heads % spec.kv_heads, 0);
            assert_eq!(valid.shape(*k), valid.shape(*v));
            assert_eq!(valid.shape(*q).width, valid.shape(*k).width);
        }
        Op::Add { a, b } | Op::Mul { a, b } => assert_eq!(valid.shape(*a), valid.shape(*b)),
        Op::Slice { x, start, length } => assert!(start + length <= valid.shape(*x).width),
        Op::MixtureOfExperts { experts, top_k, .. } => assert!(*top_k as usize <= experts.len()),
        _ => {}
    }
}
