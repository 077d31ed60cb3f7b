//! Property tests of the gate: graphs grown from a recipe of plausible and broken ops, and a valid Llama with one
//! thing changed. Shapes are predicted here on their own, so that gate and test check each other.

mod support;

use galerne_core::dtype::DType;
use galerne_core::graph::{
    Activation, AttentionSpec, EmbeddingIndex, FeedForward, Graph, Op, RopePairing, RouterNormalisation,
    Rows, ValueShape,
};
use galerne_core::ids::{LayerId, NodeId};
use galerne_core::limits::GraphLimits;
use galerne_core::weights::WeightIndex;
use proptest::prelude::*;

use support::{Model, check_invariants, llama};

/// One step of a recipe: which op, on which earlier value, with what attributes, and whether it is broken on purpose.
#[derive(Debug, Clone, Copy)]
struct Step {
    op: u8,
    input: u16,
    a: u32,
    b: u32,
    broken: Option<u8>,
}

fn step(broken: impl Strategy<Value = Option<u8>>) -> impl Strategy<Value = Step> {
    let number = prop_oneof![4 => 0_u32..80, 1 => any::<u32>()];
    (any::<u8>(), any::<u16>(), number.clone(), number, broken).prop_map(|(op, input, a, b, broken)| Step {
        op,
        input,
        a,
        b,
        broken,
    })
}

/// Grows a graph and predicts the shape of every value.
struct Grower {
    model: Model,
    shapes: Vec<ValueShape>,
    layers: u32,
}

const TABLE_ENTRIES: u64 = 200;
const CONTEXT: u32 = 100;

impl Grower {
    fn new() -> Self {
        let graph = Graph {
            nodes: vec![],
            output: NodeId(0),
            context_tokens_max: CONTEXT,
        };
        let model = Model {
            graph,
            weights: WeightIndex::default(),
        };
        let mut grower = Self {
            model,
            shapes: vec![],
            layers: 0,
        };
        let weight = grower.weight("embedding", DType::F32, &[TABLE_ENTRIES, 64]);
        let op = Op::Embedding {
            weight,
            index: EmbeddingIndex::Tokens,
        };
        grower.push(
            op,
            ValueShape {
                rows: Rows::Tokens,
                heads: 1,
                width: 64,
            },
        );
        grower
    }

    fn push(&mut self, op: Op, shape: ValueShape) -> NodeId {
        self.shapes.push(shape);
        self.model.push(op)
    }

    fn weight(&mut self, kind: &str, dtype: DType, shape: &[u64]) -> String {
        let name = format!(
            "{kind}.{}.{}",
            self.shapes.len(),
            self.model.weights.tensors.len()
        );
        self.model.put(&name, dtype, shape);
        name
    }

    /// A matrix with a dtype that its inner width allows.
    fn matrix(&mut self, choice: u32, out: u64, inner: u64) -> String {
        let dtype = match choice % 4 {
            0 => DType::F32,
            1 => DType::Bf16,
            2 if inner.is_multiple_of(32) => DType::Q4_1,
            3 if inner.is_multiple_of(32) => DType::Q8_0,
            _ => DType::F16,
        };
        self.weight("matrix", dtype, &[out, inner])
    }

    /// The last value at or before `input` that fits, or the first value of all.
    fn pick(&self, input: u16, fits: impl Fn(ValueShape) -> bool) -> (NodeId, ValueShape) {
        let start = usize::from(input) % self.shapes.len();
        let position = (0..=start)
            .rev()
            .find(|position| fits(self.shapes[*position]))
            .unwrap_or(0);
        (
            NodeId(u32::try_from(position).expect("small")),
            self.shapes[position],
        )
    }

    fn grow(&mut self, step: Step) {
        let before = self.shapes.len();
        match step.op % 16 {
            0 => self.grow_embedding(step),
            1 | 2 => self.grow_linear(step),
            3 => self.grow_norm(step),
            4 => self.grow_attention(step),
            5 => self.grow_rope(step),
            6 => self.grow_slice(step),
            7 => self.grow_concat(step),
            8 | 9 => self.grow_reshape(step),
            10 => self.grow_mixture(step),
            11 => self.grow_rows(step),
            _ => self.grow_elementwise(step),
        }
        if let Some(how) = step.broken {
            self.break_node(before, how, step);
        }
    }

    fn grow_embedding(&mut self, step: Step) {
        let width = 1 + u64::from(step.a % 70);
        let index = match step.b % 3 {
            0 => EmbeddingIndex::Tokens,
            1 => EmbeddingIndex::Positions(step.b % (TABLE_ENTRIES as u32 - CONTEXT)),
            _ => EmbeddingIndex::Constant(step.b % TABLE_ENTRIES as u32),
        };
        let weight = self.matrix(step.a, TABLE_ENTRIES, width);
        let shape = ValueShape {
            rows: Rows::Tokens,
            heads: 1,
            width: width as u32,
        };
        self.push(Op::Embedding { weight, index }, shape);
    }

    fn grow_linear(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |shape| shape.heads == 1);
        let out = 1 + u64::from(step.a % 130);
        let weight = self.matrix(step.b, out, u64::from(shape.width));
        let bias = step
            .b
            .is_multiple_of(2)
            .then(|| self.weight("bias", DType::F32, &[out]));
        self.push(
            Op::Linear { x, weight, bias },
            ValueShape {
                width: out as u32,
                ..shape
            },
        );
    }

    fn grow_norm(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |_| true);
        let weight = self.weight("norm", DType::Bf16, &[u64::from(shape.width)]);
        let op = if step.a.is_multiple_of(2) {
            Op::RmsNorm {
                x,
                weight,
                eps: 1e-6,
                weight_offset: 1.0,
            }
        } else {
            Op::LayerNorm {
                x,
                weight: weight.clone(),
                bias: Some(weight),
                eps: 0.0,
            }
        };
        self.push(op, shape);
    }

    fn grow_attention(&mut self, step: Step) {
        let (k, shape) = self.pick(step.input, |shape| shape.rows == Rows::Tokens);
        // The same value may serve as query if there is one query head per key head.
        let spec = AttentionSpec {
            layer: LayerId(self.layers),
            heads: shape.heads,
            kv_heads: shape.heads,
            head_width: shape.width,
            scale: 0.125,
            causal: step.a.is_multiple_of(2),
            sliding_window: (step.b > 0).then_some(step.b),
            soft_cap: step.a.is_multiple_of(3).then_some(50.0),
        };
        self.layers += 1;
        self.push(Op::Attention { q: k, k, v: k, spec }, shape);
    }

    fn grow_rope(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |shape| shape.rows == Rows::Tokens && shape.width >= 2);
        let pairs = 1 + step.a % (shape.width / 2);
        let inv_freq = (0..pairs).map(|pair| 1.0 / (1.0 + pair as f32)).collect();
        self.push(
            Op::Rope {
                x,
                inv_freq,
                pairing: RopePairing::Interleaved,
                attention_factor: 1.0,
            },
            shape,
        );
    }

    fn grow_slice(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |_| true);
        let start = step.a % shape.width;
        let length = 1 + step.b % (shape.width - start);
        self.push(
            Op::Slice { x, start, length },
            ValueShape {
                width: length,
                ..shape
            },
        );
    }

    fn grow_concat(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |shape| shape.row_elements() < 4_096);
        let parts = vec![x; 1 + step.a as usize % 3];
        let width = shape.width * parts.len() as u32;
        self.push(Op::Concat { parts }, ValueShape { width, ..shape });
    }

    fn grow_reshape(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |_| true);
        let elements = shape.heads * shape.width;
        let heads = (1..=1 + step.a % 16)
            .rev()
            .find(|heads| elements.is_multiple_of(*heads))
            .unwrap_or(1);
        self.push(
            Op::ReshapeHeads { x, heads },
            ValueShape {
                heads,
                width: elements / heads,
                ..shape
            },
        );
    }

    fn grow_mixture(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |shape| shape.heads == 1);
        let width = u64::from(shape.width);
        let inner = 1 + u64::from(step.a % 40);
        let expert = FeedForward {
            gate: self.matrix(step.b, inner, width),
            up: self.matrix(step.b, inner, width),
            down: self.matrix(step.b, width, inner),
        };
        let count = 1 + step.b % 4;
        let router = self.matrix(0, u64::from(count), width);
        let shared_gate = self.matrix(0, 1, width);
        let op = Op::MixtureOfExperts {
            x,
            router,
            experts: vec![expert.clone(); count as usize],
            top_k: 1 + step.a % count,
            normalisation: RouterNormalisation::SigmoidChosen,
            function: Activation::Gelu,
            shared: Some(expert),
            shared_gate: step.a.is_multiple_of(2).then_some(shared_gate),
        };
        self.push(op, shape);
    }

    fn grow_rows(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |shape| shape.rows == Rows::Tokens);
        match step.a % 4 {
            0 => self.push(
                Op::MeanPool { x },
                ValueShape {
                    rows: Rows::Sequences,
                    ..shape
                },
            ),
            1 => self.push(
                Op::ClsPool { x },
                ValueShape {
                    rows: Rows::Sequences,
                    ..shape
                },
            ),
            _ => self.push(
                Op::OutputRows { x },
                ValueShape {
                    rows: Rows::Outputs,
                    ..shape
                },
            ),
        };
    }

    fn grow_elementwise(&mut self, step: Step) {
        let (x, shape) = self.pick(step.input, |_| true);
        let (b, _) = self.pick(step.input, |other| other == shape);
        let op = match step.a % 6 {
            0 => Op::Add { a: x, b },
            1 => Op::Mul { a: x, b },
            2 => Op::Scale { x, factor: -2.5 },
            3 => Op::Activate {
                x,
                function: Activation::Tanh,
            },
            4 => Op::SoftCap { x, cap: 3.0 },
            _ => Op::L2Normalise { x },
        };
        self.push(op, shape);
    }

    /// Breaks the node just grown. What it does not break stays plausible: the gate has to say which it is.
    fn break_node(&mut self, position: usize, how: u8, step: Step) {
        let target = NodeId(position as u32 + step.a % 3);
        if how == 0 {
            let names: Vec<String> = self.model.weights.tensors.keys().cloned().collect();
            if let Some(name) = names.get(step.a as usize % names.len().max(1)) {
                self.model.weights.tensors.remove(name);
            }
            return;
        }
        if how == 1 {
            let count = self.model.weights.tensors.len();
            if let Some(info) = self
                .model
                .weights
                .tensors
                .values_mut()
                .nth(step.a as usize % count.max(1))
            {
                info.shape = vec![u64::from(step.b), u64::from(step.a).wrapping_mul(u64::MAX / 3)];
            }
            return;
        }
        match &mut self.model.graph.nodes[position] {
            Op::Embedding { index, .. } => *index = EmbeddingIndex::Positions(u32::MAX - step.a),
            Op::Attention { spec, q, .. } => match how {
                2 => spec.kv_heads = step.a,
                3 => spec.layer = LayerId(step.b),
                4 => spec.heads = spec.heads.wrapping_mul(step.a),
                _ => *q = target,
            },
            Op::Slice { start, length, .. } => (*start, *length) = (step.b, u32::MAX - step.a),
            Op::Concat { parts } => parts.resize(step.a as usize % 2_000, target),
            Op::ReshapeHeads { heads, .. } => *heads = step.b,
            Op::MixtureOfExperts { top_k, .. } => *top_k = step.b,
            Op::Rope { inv_freq, .. } => inv_freq.push(f32::from_bits(step.b.wrapping_mul(0x0100_0193))),
            Op::Scale { factor, .. } => *factor = f32::INFINITY,
            Op::SoftCap { cap, .. } => *cap = -1.0,
            Op::RmsNorm { x, .. }
            | Op::LayerNorm { x, .. }
            | Op::Linear { x, .. }
            | Op::Activate { x, .. }
            | Op::MeanPool { x }
            | Op::ClsPool { x }
            | Op::L2Normalise { x }
            | Op::OutputRows { x }
            | Op::Logits { x, .. } => *x = target,
            Op::Add { b, .. } | Op::Mul { b, .. } => *b = target,
        }
    }

    /// Ends the graph with something that can be served.
    fn finish(mut self) -> Self {
        let (x, shape) = self.pick(u16::MAX, |shape| shape.rows == Rows::Tokens && shape.heads == 1);
        let x = self.push(
            Op::OutputRows { x },
            ValueShape {
                rows: Rows::Outputs,
                ..shape
            },
        );
        let weight = self.matrix(0, TABLE_ENTRIES, u64::from(shape.width));
        let width = TABLE_ENTRIES as u32;
        let logits = ValueShape {
            rows: Rows::Outputs,
            heads: 1,
            width,
        };
        self.model.graph.output = self.push(Op::Logits { x, weight }, logits);
        self
    }
}

fn grown(steps: &[Step]) -> Grower {
    let mut grower = Grower::new();
    steps.iter().for_each(|step| grower.grow(*step));
    grower.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plausible_graphs_are_accepted_with_the_predicted_shapes(
        steps in prop::collection::vec(step(Just(None)), 0..40)
    ) {
        let Grower { model, shapes, layers } = grown(&steps);
        let valid = model.validate().map_err(|error| TestCaseError::fail(error.to_string()))?;
        check_invariants(&valid, &model.weights, &GraphLimits::default());
        for (position, shape) in shapes.iter().enumerate() {
            prop_assert_eq!(valid.shape(NodeId(position as u32)), *shape);
        }
        prop_assert_eq!(valid.layers().len(), layers as usize);
        prop_assert_eq!(valid.vocabulary(), Some(TABLE_ENTRIES as u32));
    }

    #[test]
    fn broken_graphs_never_panic_and_keep_the_invariants(
        steps in prop::collection::vec(step(prop::option::weighted(0.2, 0_u8..6)), 0..40),
        output in prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
    ) {
        let mut model = grown(&steps).model;
        if let Some(output) = output {
            model.graph.output = NodeId(output % (model.graph.nodes.len() as u32 + 1));
        }
        match model.validate() {
            Ok(valid) => check_invariants(&valid, &model.weights, &GraphLimits::default()),
            Err(error) => prop_assert!(error.to_string().len() < 4_096),
        }
    }

    #[test]
    fn a_weight_of_another_shape_is_refused(choice in any::<prop::sample::Index>(), grow in 1_u64..100, dim in 0_usize..2) {
        let mut model = llama();
        let position = choice.index(model.weights.tensors.len());
        let (name, info) = model.weights.tensors.iter_mut().nth(position).expect("in range");
        let name = name.clone();
        let dim = dim.min(info.shape.len() - 1);
        info.shape[dim] += grow;
        // A larger tied table is a larger vocabulary, which is consistent; every other change is not.
        prop_assert_eq!(model.validate().is_ok(), name == "embed" && dim == 0);
    }

    #[test]
    fn an_input_moved_to_another_shape_or_forward_is_refused(
        node in any::<prop::sample::Index>(), target in 0_u32..60
    ) {
        let mut model = llama();
        let valid = model.validate().expect("a valid graph");
        let position = node.index(model.graph.nodes.len());
        let Some(old) = move_first_input(&mut model.graph.nodes[position], NodeId(target)) else {
            return Ok(());
        };
        let in_order = (target as usize) < position;
        if !in_order {
            prop_assert!(model.validate().is_err());
        } else if valid.shape(NodeId(target)) == valid.shape(old) {
            // Another model, but one with the same shapes: provably still valid.
            prop_assert!(model.validate().is_ok());
        } else if let Ok(changed) = model.validate() {
            check_invariants(&changed, &model.weights, &GraphLimits::default());
            // The op itself may take either shape (`reshape-heads` does); what it gives must be as before.
            let nodes = (0..model.graph.nodes.len() as u32).map(NodeId);
            prop_assert!(nodes.into_iter().all(|node| changed.shape(node) == valid.shape(node)));
        }
    }

    #[test]
    fn a_node_left_out_is_refused_or_harmless(node in any::<prop::sample::Index>()) {
        let mut model = llama();
        let position = node.index(model.graph.nodes.len());
        model.graph.nodes.remove(position);
        // Inputs and output still count the node: everything behind it is shifted by one.
        prop_assert!(model.validate().is_err(), "without node {}", position);
    }

    #[test]
    fn a_changed_attention_layer_is_refused(field in 0_u8..5, value in any::<u32>()) {
        let mut model = llama();
        let position = model.find("attention");
        let Op::Attention { spec, .. } = &mut model.graph.nodes[position] else { unreachable!() };
        let old = *spec;
        match field {
            0 => spec.heads = value,
            1 => spec.kv_heads = value,
            2 => spec.head_width = value,
            3 => spec.layer = LayerId(value),
            _ => spec.scale = f32::from_bits(value),
        }
        let same = old == *spec;
        let finite_scale = field == 4 && spec.scale.is_finite();
        prop_assert_eq!(model.validate().is_ok(), same || finite_scale);
    }
}

/// Points the first input of an op elsewhere; the input it had.
fn move_first_input(op: &mut Op, target: NodeId) -> Option<NodeId> {
    let slot = match op {
        Op::RmsNorm { x, .. }
        | Op::Linear { x, .. }
        | Op::Rope { x, .. }
        | Op::ReshapeHeads { x, .. }
        | Op::Activate { x, .. }
        | Op::OutputRows { x }
        | Op::Logits { x, .. } => x,
        Op::Add { a, .. } | Op::Mul { a, .. } => a,
        Op::Attention { q, .. } => q,
        _ => return None,
    };
    Some(std::mem::replace(slot, target))
}
