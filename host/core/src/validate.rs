//! The one gate through which a foreign graph passes. Knows shapes and weight descriptions; must not know guests,
//! devices, or the bytes of a weight. After it, engine and devices may rely on every statement of [`crate::graph`].

use std::collections::BTreeMap;

use crate::dtype::DType;
use crate::graph::{AttentionSpec, Graph, Op, ValueShape};
use crate::ids::{LayerId, NodeId};
use crate::limits::GraphLimits;
use crate::weights::WeightIndex;

mod rule;
mod rules;

/// A graph whose order, shapes, numbers and weights have been checked. Only [`validate`] makes one.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidGraph {
    graph: Graph,
    shapes: Vec<ValueShape>,
    layers: Vec<AttentionSpec>,
    token_entries: Option<u32>,
    vocabulary: Option<u32>,
    matrices: BTreeMap<String, (u32, u32)>,
}

impl ValidGraph {
    /// The graph itself.
    #[must_use]
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The shape of a node's value.
    ///
    /// # Panics
    /// If the node is not one of this graph.
    #[must_use]
    pub fn shape(&self, node: NodeId) -> ValueShape {
        self.shapes[node.index()]
    }

    /// The attention layers, indexed by [`LayerId`].
    #[must_use]
    pub fn layers(&self) -> &[AttentionSpec] {
        &self.layers
    }

    /// Entries of the vocabulary if the output is logits (of a language model), `None` for an encoder. Every token
    /// below it has a row in every table indexed by tokens.
    #[must_use]
    pub fn vocabulary(&self) -> Option<u32> {
        self.vocabulary
    }

    /// Entries of the smallest table indexed by tokens, if there is one: the bound on tokens given to an encoder.
    #[must_use]
    pub fn token_entries(&self) -> Option<u32> {
        self.token_entries
    }

    /// Rows and columns of a matrix no value's shape tells: an embedding's table, a mixture's router, experts
    /// and shared gate.
    #[must_use]
    pub fn matrix(&self, weight: &str) -> Option<(u32, u32)> {
        self.matrices.get(weight).copied()
    }

    /// The shape of the result.
    #[must_use]
    pub fn output_shape(&self) -> ValueShape {
        self.shape(self.graph.output)
    }
}

/// Checks a graph against its contract ([`crate::graph`]), the model's weights and the host's limits.
///
/// The result of a language model is a `logits` value, possibly through `scale` and `soft-cap`; that of an encoder
/// a value with rows of outputs or of sequences.
///
/// # Errors
/// The first thing that is wrong, in graph order.
pub fn validate(graph: Graph, weights: &WeightIndex, limits: &GraphLimits) -> Result<ValidGraph, GraphError> {
    rules::check_size(&graph, limits)?;
    let mut gate = rules::Gate::new(graph.context_tokens_max, weights, limits, graph.nodes.len());
    for op in &graph.nodes {
        gate.push(op)?;
    }
    let vocabulary = gate.check_output(&graph)?;
    let matrices = matrices(&graph, weights);
    let rules::Facts {
        shapes,
        layers,
        token_entries,
    } = gate.into_facts();
    Ok(ValidGraph {
        graph,
        shapes,
        layers,
        token_entries,
        vocabulary,
        matrices,
    })
}

/// Shapes of the matrices of embeddings and mixtures; they have passed the gate.
fn matrices(graph: &Graph, weights: &WeightIndex) -> BTreeMap<String, (u32, u32)> {
    let mut names = Vec::new();
    for op in &graph.nodes {
        match op {
            Op::Embedding { weight, .. } => names.push(weight),
            Op::MixtureOfExperts {
                router,
                experts,
                shared,
                shared_gate,
                ..
            } => {
                names.push(router);
                names.extend(shared_gate);
                names.extend(
                    experts
                        .iter()
                        .chain(shared)
                        .flat_map(|e| [&e.gate, &e.up, &e.down]),
                );
            }
            _ => {}
        }
    }
    let shape = |name: &String| match weights.tensors.get(name)?.shape[..] {
        [rows, width] => Some((u32::try_from(rows).ok()?, u32::try_from(width).ok()?)),
        _ => None,
    };
    names
        .into_iter()
        .filter_map(|name| Some((name.clone(), shape(name)?)))
        .collect()
}

/// The node an error is about, and the weight if it is about one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its position in the graph.
    pub node: NodeId,
    /// The op's name in the contract.
    pub op: &'static str,
    /// The weight in question, else the op's main weight if it has one. Shortened to 64 characters.
    pub weight: Option<Box<str>>,
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.weight {
            // Debug, because the name is foreign: it must not break a line of a log.
            Some(weight) => write!(f, "{} {weight:?} (node {})", self.op, self.node),
            None => write!(f, "{} (node {})", self.op, self.node),
        }
    }
}

/// Why a graph is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GraphError {
    /// A graph without nodes has no result.
    #[error("graph: expected at least one node, got none")]
    Empty,
    /// Too many nodes.
    #[error("graph: expected at most {max} nodes, got {got}")]
    NodeCount {
        /// The host's limit.
        max: usize,
        /// Nodes of the graph.
        got: usize,
    },
    /// No tokens, or more than the host serves.
    #[error("graph: expected context-tokens-max from 1 to {max}, got {got}")]
    Context {
        /// The host's limit.
        max: u32,
        /// What the graph says.
        got: u32,
    },
    /// The output is not a node.
    #[error("graph: expected an output below {nodes} (the number of nodes), got node {got}")]
    OutputMissing {
        /// Nodes of the graph.
        nodes: usize,
        /// What the graph says.
        got: NodeId,
    },
    /// The output is not something that can be served.
    #[error(
        "{at}: expected the graph's output to be logits, or to have rows of outputs or sequences, got {got}; \
         is output-rows or a pool missing?"
    )]
    OutputKind {
        /// The output node.
        at: Box<Site>,
        /// Its shape.
        got: ValueShape,
    },
    /// A node reads itself or a later node: a cycle or a forward reference.
    #[error(
        "{at}: expected inputs before node {}, got node {got}: a cyclic or forward reference; \
         order nodes so that each reads only earlier ones",
        at.node
    )]
    InputOrder {
        /// The reading node.
        at: Box<Site>,
        /// The node it reads.
        got: NodeId,
    },
    /// An input has the wrong rows, heads or width.
    #[error("{at}: expected {field} (node {input}) of shape {expected}, got {got}")]
    InputShape {
        /// The reading node.
        at: Box<Site>,
        /// Which of its inputs.
        field: &'static str,
        /// The node it reads.
        input: NodeId,
        /// What the op takes.
        expected: String,
        /// What that node has.
        got: ValueShape,
    },
    /// A weight's name is too long.
    #[error("{at}: expected {field} to be a name of at most {max} bytes, got {got}")]
    NameLength {
        /// The node.
        at: Box<Site>,
        /// Which of its weights.
        field: &'static str,
        /// The host's limit.
        max: usize,
        /// Bytes of the name.
        got: usize,
    },
    /// The weight file has no such weight.
    #[error(
        "{at}: expected {field} in the weight file, got no weight of that name; does config.json match the weights?"
    )]
    WeightMissing {
        /// The node; its `weight` is the name.
        at: Box<Site>,
        /// Which of its weights.
        field: &'static str,
    },
    /// The weight has another shape.
    #[error("{at}: expected {field} {expected}, got {got:?}; does config.json match the weights?")]
    WeightShape {
        /// The node; its `weight` is the name.
        at: Box<Site>,
        /// Which of its weights.
        field: &'static str,
        /// What the op takes.
        expected: String,
        /// The shape in the weight file.
        got: Vec<u64>,
    },
    /// A vector is quantized.
    #[error("{at}: expected {field} in f32, f16 or bf16, got {got}; keep vectors unquantized")]
    WeightDType {
        /// The node; its `weight` is the name.
        at: Box<Site>,
        /// Which of its weights.
        field: &'static str,
        /// The dtype in the weight file.
        got: DType,
    },
    /// A quantized weight's rows are not whole blocks.
    #[error(
        "{at}: expected {field} in {dtype} with rows of whole blocks of {block}, got rows of {got} elements"
    )]
    WeightBlocks {
        /// The node; its `weight` is the name.
        at: Box<Site>,
        /// Which of its weights.
        field: &'static str,
        /// The dtype in the weight file.
        dtype: DType,
        /// Elements of one block.
        block: usize,
        /// Elements of one row.
        got: u64,
    },
    /// A weight's bytes cannot be counted.
    #[error("{at}: expected {field} of a size this host can address, got {got:?}")]
    WeightSize {
        /// The node; its `weight` is the name.
        at: Box<Site>,
        /// Which of its weights.
        field: &'static str,
        /// The shape in the weight file.
        got: Vec<u64>,
    },
    /// A real number is not finite or out of its range.
    #[error("{at}: expected {field} {expected}, got {got}")]
    Number {
        /// The node.
        at: Box<Site>,
        /// The attribute.
        field: &'static str,
        /// Its range.
        expected: &'static str,
        /// What came.
        got: f32,
    },
    /// A whole number is out of its range or does not fit the input.
    #[error("{at}: expected {field} {expected}, got {got}")]
    Attribute {
        /// The node.
        at: Box<Site>,
        /// The attribute.
        field: &'static str,
        /// Its range.
        expected: String,
        /// What came.
        got: u64,
    },
    /// Attention layers are not numbered from 0 in graph order.
    #[error(
        "{at}: expected layer {expected}, got {got}; number attention layers from 0 in order, without gaps"
    )]
    Layer {
        /// The attention node.
        at: Box<Site>,
        /// The next free number.
        expected: LayerId,
        /// What came.
        got: LayerId,
    },
    /// A shared gate without a shared expert.
    #[error("{at}: expected a shared expert with shared-gate, got only the gate")]
    SharedGate {
        /// The node; its `weight` is the gate.
        at: Box<Site>,
    },
    /// A row is too long.
    #[error("{at}: expected rows of at most {max} elements, got {got}")]
    RowElements {
        /// The node.
        at: Box<Site>,
        /// The host's limit.
        max: u64,
        /// Elements of one row.
        got: u64,
    },
    /// All rows together are too long.
    #[error(
        "{at}: expected at most {max} elements in one row of every value together, got {got} up to this node"
    )]
    GraphElements {
        /// The node at which the limit was passed.
        at: Box<Site>,
        /// The host's limit.
        max: u64,
        /// Elements up to this node.
        got: u64,
    },
    /// Too many or no inputs of a concat, or experts of a mixture.
    #[error("{at}: expected from 1 to {max} {field}, got {got}")]
    Parts {
        /// The node.
        at: Box<Site>,
        /// `parts` or `experts`.
        field: &'static str,
        /// The host's limit.
        max: usize,
        /// What came.
        got: usize,
    },
    /// A table has too many entries for the host.
    #[error("{at}: expected at most {max} entries, got {got}")]
    Vocabulary {
        /// The node; its `weight` is the table.
        at: Box<Site>,
        /// The host's limit.
        max: u64,
        /// Entries of the table.
        got: u64,
    },
    /// An embedding may read beyond its table.
    #[error(
        "{at}: expected a table of at least {needed} entries ({reason}), got {got}; does config.json match the weights?"
    )]
    TableEntries {
        /// The embedding, or the logits whose tokens do not all have a row.
        at: Box<Site>,
        /// Entries needed.
        needed: u64,
        /// Why so many are needed.
        reason: &'static str,
        /// Entries of the table.
        got: u64,
    },
}
