//! The rules of the gate: one function per family of ops, each returning the shape of the value. Must not know
//! what comes after validation.

use crate::graph::{AttentionSpec, EmbeddingIndex, FeedForward, Graph, Op, Rows, ValueShape};
use crate::ids::{LayerId, NodeId};
use crate::limits::GraphLimits;
use crate::weights::WeightIndex;

use super::GraphError;
use super::rule::{Range, Rule};

/// Checks what needs no shapes: counts, context and the output's index.
pub(super) fn check_size(graph: &Graph, limits: &GraphLimits) -> Result<(), GraphError> {
    let nodes = graph.nodes.len();
    // Node ids are u32, whatever the limit says.
    let nodes_max = limits.nodes_max.min(u32::MAX as usize);
    if nodes == 0 {
        return Err(GraphError::Empty);
    }
    if nodes > nodes_max {
        return Err(GraphError::NodeCount {
            max: nodes_max,
            got: nodes,
        });
    }
    if graph.context_tokens_max == 0 || graph.context_tokens_max > limits.context_tokens_max {
        return Err(GraphError::Context {
            max: limits.context_tokens_max,
            got: graph.context_tokens_max,
        });
    }
    if graph.output.index() >= nodes {
        return Err(GraphError::OutputMissing {
            nodes,
            got: graph.output,
        });
    }
    Ok(())
}

/// What the gate learns on its way through the nodes.
pub(super) struct Facts {
    pub(super) shapes: Vec<ValueShape>,
    pub(super) layers: Vec<AttentionSpec>,
    pub(super) token_entries: Option<u32>,
}

/// The state of one validation, fed node by node in SSA order.
pub(super) struct Gate<'a> {
    pub(super) weights: &'a WeightIndex,
    pub(super) limits: &'a GraphLimits,
    pub(super) context_tokens_max: u32,
    pub(super) facts: Facts,
    /// Whether each value so far is logits, possibly scaled or capped.
    logits: Vec<bool>,
    /// Elements in one row of all values so far.
    elements: u64,
}

impl<'a> Gate<'a> {
    pub(super) fn new(
        context_tokens_max: u32,
        weights: &'a WeightIndex,
        limits: &'a GraphLimits,
        nodes: usize,
    ) -> Self {
        let facts = Facts {
            shapes: Vec::with_capacity(nodes),
            layers: Vec::new(),
            token_entries: None,
        };
        Self {
            weights,
            limits,
            context_tokens_max,
            facts,
            logits: Vec::with_capacity(nodes),
            elements: 0,
        }
    }

    /// Checks the next node and remembers the shape of its value.
    pub(super) fn push(&mut self, op: &Op) -> Result<(), GraphError> {
        let rule = Rule {
            gate: self,
            node: self.next_node(),
            op,
        };
        rule.check_order()?;
        let shape = rule.infer()?;
        let elements = self.elements.saturating_add(shape.row_elements());
        if elements > self.limits.graph_elements_max {
            let max = self.limits.graph_elements_max;
            return Err(GraphError::GraphElements {
                at: rule.site(),
                max,
                got: elements,
            });
        }
        let token_entries = match op {
            Op::Embedding {
                index: EmbeddingIndex::Tokens,
                weight,
            } => Some(rule.table(weight)?.0),
            _ => None,
        };
        let is_logits = match op {
            Op::Logits { .. } => true,
            // Gemma caps and Cohere scales the logits; neither makes them something else.
            Op::Scale { x, .. } | Op::SoftCap { x, .. } => self.logits[x.index()],
            _ => false,
        };
        if let Op::Attention { spec, .. } = op {
            self.facts.layers.push(*spec);
        }
        // The smallest table bounds the tokens.
        self.facts.token_entries = [self.facts.token_entries, token_entries]
            .into_iter()
            .flatten()
            .min();
        self.elements = elements;
        self.facts.shapes.push(shape);
        self.logits.push(is_logits);
        Ok(())
    }

    /// Checks that the output can be served; the vocabulary if it is logits.
    pub(super) fn check_output(&self, graph: &Graph) -> Result<Option<u32>, GraphError> {
        let output = graph.output.index();
        let shape = self.facts.shapes[output];
        let site = || {
            Rule {
                gate: self,
                node: graph.output,
                op: &graph.nodes[output],
            }
            .site()
        };
        if self.logits[output] {
            // A token that was drawn is read by the next step: every one of them must have a row.
            match self.facts.token_entries {
                Some(entries) if shape.width > entries => Err(GraphError::TableEntries {
                    at: site(),
                    needed: u64::from(shape.width),
                    reason: "the embedding of every token that the logits may give",
                    got: u64::from(entries),
                }),
                _ => Ok(Some(shape.width)),
            }
        } else if shape.rows == Rows::Tokens {
            Err(GraphError::OutputKind {
                at: site(),
                got: shape,
            })
        } else {
            Ok(None)
        }
    }

    pub(super) fn into_facts(self) -> Facts {
        self.facts
    }

    fn next_node(&self) -> NodeId {
        // `check_size` bounds the number of nodes by u32::MAX.
        NodeId(u32::try_from(self.facts.shapes.len()).expect("node count is bounded by u32"))
    }
}

impl Rule<'_> {
    /// Checks that every input is an earlier node.
    fn check_order(self) -> Result<(), GraphError> {
        if let Op::Concat { parts } = self.op {
            // Before `inputs` copies them.
            self.parts("parts", parts.len())?;
        }
        match self.op.inputs().into_iter().find(|input| *input >= self.node) {
            Some(got) => Err(GraphError::InputOrder { at: self.site(), got }),
            None => Ok(()),
        }
    }

    /// The shape of the value, if the op fits its inputs, the weights and the limits.
    fn infer(self) -> Result<ValueShape, GraphError> {
        match self.op {
            Op::Embedding { weight, index } => self.embedding(weight, *index),
            Op::Linear { x, weight, bias } => self.linear(*x, weight, bias.as_deref()),
            Op::RmsNorm {
                x,
                weight,
                eps,
                weight_offset,
            } => {
                self.number("weight-offset", *weight_offset, Range::Finite)?;
                self.norm(*x, weight, None, *eps)
            }
            Op::LayerNorm { x, weight, bias, eps } => self.norm(*x, weight, bias.as_deref(), *eps),
            Op::Rope {
                x,
                inv_freq,
                attention_factor,
                pairing: _,
            } => self.rope(*x, inv_freq, *attention_factor),
            Op::Attention { q, k, v, spec } => self.attention([*q, *k, *v], spec),
            Op::Add { a, b } | Op::Mul { a, b } => self.pair(*a, *b),
            Op::Scale { x, factor } => {
                self.number("factor", *factor, Range::Finite)?;
                Ok(self.shape(*x))
            }
            Op::SoftCap { x, cap } => {
                self.number("cap", *cap, Range::Positive)?;
                Ok(self.shape(*x))
            }
            Op::Activate { x, function: _ } | Op::L2Normalise { x } => Ok(self.shape(*x)),
            Op::Slice { x, start, length } => self.slice(*x, *start, *length),
            Op::Concat { parts } => self.concat(parts),
            Op::ReshapeHeads { x, heads } => self.reshape_heads(*x, *heads),
            Op::MixtureOfExperts {
                x,
                router,
                experts,
                top_k,
                shared,
                shared_gate,
                ..
            } => self.mixture(
                *x,
                router,
                experts,
                *top_k,
                shared.as_ref(),
                shared_gate.as_deref(),
            ),
            Op::MeanPool { x } | Op::ClsPool { x } => Ok(ValueShape {
                rows: Rows::Sequences,
                ..self.tokens("x", *x)?
            }),
            Op::OutputRows { x } => Ok(ValueShape {
                rows: Rows::Outputs,
                ..self.tokens("x", *x)?
            }),
            Op::Logits { x, weight } => self.logits(*x, weight),
        }
    }
}

/// One function per family of ops: what it takes, and the shape of its value.
impl Rule<'_> {
    fn embedding(self, weight: &str, index: EmbeddingIndex) -> Result<ValueShape, GraphError> {
        let (entries, width) = self.table(weight)?;
        let (needed, reason) = match index {
            EmbeddingIndex::Tokens => (1, "one per token"),
            EmbeddingIndex::Positions(offset) => (
                u64::from(offset) + u64::from(self.gate.context_tokens_max),
                "offset plus context-tokens-max",
            ),
            EmbeddingIndex::Constant(row) => (u64::from(row) + 1, "the row it always takes"),
        };
        if u64::from(entries) < needed {
            let at = self.site_of(weight);
            return Err(GraphError::TableEntries {
                at,
                needed,
                reason,
                got: u64::from(entries),
            });
        }
        self.value(Rows::Tokens, 1, width)
    }

    fn linear(self, x: NodeId, weight: &str, bias: Option<&str>) -> Result<ValueShape, GraphError> {
        let input = self.single_head("x", x)?;
        let out = self.matrix("weight", weight, None, u64::from(input.width))?;
        let shape = self.value(input.rows, 1, out)?;
        if let Some(bias) = bias {
            self.vector("bias", bias, out)?;
        }
        Ok(shape)
    }

    fn norm(self, x: NodeId, weight: &str, bias: Option<&str>, eps: f32) -> Result<ValueShape, GraphError> {
        self.number("eps", eps, Range::NotNegative)?;
        let shape = self.shape(x);
        self.vector("weight", weight, u64::from(shape.width))?;
        if let Some(bias) = bias {
            self.vector("bias", bias, u64::from(shape.width))?;
        }
        Ok(shape)
    }

    fn rope(self, x: NodeId, inv_freq: &[f32], attention_factor: f32) -> Result<ValueShape, GraphError> {
        let shape = self.tokens("x", x)?;
        // Pairs, so that the rotated width is even by construction and cannot overflow.
        let pairs = inv_freq.len() as u64;
        let pairs_max = u64::from(shape.width / 2);
        self.attribute("number of inv-freq", pairs, 1, pairs_max)?;
        self.number("attention-factor", attention_factor, Range::Positive)?;
        inv_freq
            .iter()
            .try_for_each(|frequency| self.number("inv-freq", *frequency, Range::Finite))?;
        Ok(shape)
    }

    fn attention(self, [q, k, v]: [NodeId; 3], spec: &AttentionSpec) -> Result<ValueShape, GraphError> {
        let layers = self.gate.facts.layers.len();
        let expected = LayerId(u32::try_from(layers).expect("layer count is bounded by the node count"));
        if spec.layer != expected {
            return Err(GraphError::Layer {
                at: self.site(),
                expected,
                got: spec.layer,
            });
        }
        for (field, got) in [
            ("heads", spec.heads),
            ("kv-heads", spec.kv_heads),
            ("head-width", spec.head_width),
        ] {
            self.attribute(field, u64::from(got), 1, u64::from(u32::MAX))?;
        }
        if !spec.heads.is_multiple_of(spec.kv_heads) {
            return Err(GraphError::Attribute {
                at: self.site(),
                field: "heads",
                expected: format!("to be a multiple of kv-heads ({})", spec.kv_heads),
                got: u64::from(spec.heads),
            });
        }
        self.number("scale", spec.scale, Range::Finite)?;
        if let Some(cap) = spec.soft_cap {
            self.number("soft-cap", cap, Range::Positive)?;
        }
        if let Some(window) = spec.sliding_window {
            self.attribute("sliding-window", u64::from(window), 1, u64::from(u32::MAX))?;
        }
        let shape = |heads| ValueShape {
            rows: Rows::Tokens,
            heads,
            width: spec.head_width,
        };
        self.exactly("q", q, shape(spec.heads))?;
        self.exactly("k", k, shape(spec.kv_heads))?;
        self.exactly("v", v, shape(spec.kv_heads))?;
        Ok(shape(spec.heads))
    }

    fn pair(self, a: NodeId, b: NodeId) -> Result<ValueShape, GraphError> {
        let shape = self.shape(a);
        self.exactly("b", b, shape)?;
        Ok(shape)
    }

    fn slice(self, x: NodeId, start: u32, length: u32) -> Result<ValueShape, GraphError> {
        let shape = self.shape(x);
        self.attribute("start", u64::from(start), 0, u64::from(shape.width) - 1)?;
        self.attribute("length", u64::from(length), 1, u64::from(shape.width - start))?;
        Ok(ValueShape {
            width: length,
            ..shape
        })
    }

    fn concat(self, parts: &[NodeId]) -> Result<ValueShape, GraphError> {
        let Some(first) = parts.first() else {
            let max = self.gate.limits.parts_max;
            return Err(GraphError::Parts {
                at: self.site(),
                field: "parts",
                max,
                got: 0,
            });
        };
        let first = self.shape(*first);
        let mut width = 0_u64;
        for part in parts {
            let shape = self.shape(*part);
            if (shape.rows, shape.heads) != (first.rows, first.heads) {
                let expected = format!("[{}, {}, width]", first.rows, first.heads);
                return Err(self.input_shape("a part", *part, expected));
            }
            // At most `parts_max` u32 values, and the sum is checked each time.
            width = width.saturating_add(u64::from(shape.width));
            self.value(first.rows, first.heads, width)?;
        }
        self.value(first.rows, first.heads, width)
    }

    fn reshape_heads(self, x: NodeId, heads: u32) -> Result<ValueShape, GraphError> {
        let shape = self.shape(x);
        let elements = shape.row_elements();
        if heads == 0 || !elements.is_multiple_of(u64::from(heads)) {
            return Err(GraphError::Attribute {
                at: self.site(),
                field: "heads",
                expected: format!("to divide the {elements} elements of a row"),
                got: u64::from(heads),
            });
        }
        self.value(shape.rows, heads, elements / u64::from(heads))
    }

    fn mixture(
        self,
        x: NodeId,
        router: &str,
        experts: &[FeedForward],
        top_k: u32,
        shared: Option<&FeedForward>,
        shared_gate: Option<&str>,
    ) -> Result<ValueShape, GraphError> {
        let shape = self.single_head("x", x)?;
        let width = u64::from(shape.width);
        self.parts("experts", experts.len())?;
        let count = experts.len() as u64;
        self.attribute("top-k", u64::from(top_k), 1, count)?;
        self.matrix("router", router, Some(count), width)?;
        for expert in experts.iter().chain(shared) {
            self.feed_forward(expert, shape)?;
        }
        match (shared, shared_gate) {
            (None, Some(gate)) => {
                return Err(GraphError::SharedGate {
                    at: self.site_of(gate),
                });
            }
            (_, Some(gate)) => {
                self.matrix("shared-gate", gate, Some(1), width)?;
            }
            (_, None) => {}
        }
        Ok(shape)
    }

    fn feed_forward(self, expert: &FeedForward, shape: ValueShape) -> Result<(), GraphError> {
        let width = u64::from(shape.width);
        let inner = self.matrix("gate", &expert.gate, None, width)?;
        self.value(shape.rows, 1, inner)?;
        self.matrix("up", &expert.up, Some(inner), width)?;
        self.matrix("down", &expert.down, Some(width), inner)?;
        Ok(())
    }

    fn logits(self, x: NodeId, weight: &str) -> Result<ValueShape, GraphError> {
        let shape = self.single_head("x", x)?;
        if shape.rows != Rows::Outputs {
            return Err(self.input_shape("x", x, "[outputs, 1, width]".to_owned()));
        }
        let vocabulary = self.matrix("weight", weight, None, u64::from(shape.width))?;
        self.vocabulary(weight, vocabulary)?;
        self.value(Rows::Outputs, 1, vocabulary)
    }
}
