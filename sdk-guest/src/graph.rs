//! Builds a graph in the words of a model's paper.
//!
//! ```
//! # use galerne_sdk::graph::GraphBuilder;
//! let m = GraphBuilder::new(2048);
//! let h = m.embedding("embed.weight");
//! let x = h.rms_norm("norm.weight", 1e-5);
//! let h = h + (x.linear("gate.weight").silu() * x.linear("up.weight")).linear("down.weight");
//! let graph = m.finish(h.output_rows().logits("embed.weight"));
//! assert_eq!(graph.nodes.len(), 10);
//! ```
//!
//! The builder does not check shapes: the host does, in one place, with errors that name the node.

use std::cell::RefCell;
use std::ops::{Add, Mul};

use crate::model::bindings::exports::galerne::model::architecture as wit;
use crate::model::{ActivationFunction, EmbeddingIndex, Graph, MixtureOfExperts, RopePairing};

/// Collects nodes in SSA order.
#[derive(Debug)]
pub struct GraphBuilder {
    nodes: RefCell<Vec<wit::Op>>,
    context_tokens_max: u32,
}

/// A node's value, `[rows, heads, width]`. Copying it copies the reference, not the computation.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    builder: &'a GraphBuilder,
    id: u32,
}

/// A rotation of queries and keys; see the contract's `rope`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// One inverse frequency per rotated pair: the first `2 * inv_freq.len()` elements of each head rotate, the rest pass.
    pub inv_freq: Vec<f32>,
    /// How rotated elements are paired.
    pub pairing: RopePairing,
    /// Multiplies sine and cosine.
    pub attention_factor: f32,
}

/// An attention layer; see the contract's `attention`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// From 0, in order, without gaps.
    pub layer: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_width: u32,
    /// Factor on `q · k`.
    pub scale: f32,
    /// Whether a token sees only itself and earlier tokens.
    pub causal: bool,
    /// Most last positions a token sees.
    pub sliding_window: Option<u32>,
    /// Bound of the scores.
    pub soft_cap: Option<f32>,
}

impl GraphBuilder {
    /// An empty graph of a model whose sequences have at most so many tokens.
    #[must_use]
    pub fn new(context_tokens_max: u32) -> Self {
        Self {
            nodes: RefCell::new(Vec::new()),
            context_tokens_max,
        }
    }

    fn node(&self, op: wit::Op) -> Tensor<'_> {
        let mut nodes = self.nodes.borrow_mut();
        // The host's limit on nodes is far below u32::MAX; a graph that large is refused there.
        let id = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        nodes.push(op);
        Tensor { builder: self, id }
    }

    /// Rows of a table `[entries, width]` by token id.
    pub fn embedding(&self, weight: &str) -> Tensor<'_> {
        self.embedding_by(weight, EmbeddingIndex::Tokens)
    }

    /// Rows of a table by something else than the token id.
    pub fn embedding_by(&self, weight: &str, index: EmbeddingIndex) -> Tensor<'_> {
        self.node(wit::Op::Embedding(wit::Embedding {
            weight: weight.to_owned(),
            index,
        }))
    }

    /// Attention of `q` over the layer's keys and values.
    pub fn attention<'a>(
        &'a self,
        q: Tensor<'a>,
        k: Tensor<'a>,
        v: Tensor<'a>,
        spec: Attention,
    ) -> Tensor<'a> {
        self.node(wit::Op::Attention(wit::Attention {
            q: q.id,
            k: k.id,
            v: v.id,
            layer: spec.layer,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_width: spec.head_width,
            scale: spec.scale,
            causal: spec.causal,
            sliding_window: spec.sliding_window,
            soft_cap: spec.soft_cap,
        }))
    }

    /// Joins values along their width.
    pub fn concat<'a>(&'a self, parts: &[Tensor<'a>]) -> Tensor<'a> {
        self.node(wit::Op::Concat(parts.iter().map(|part| part.id).collect()))
    }

    /// The graph whose result is `output`.
    #[must_use]
    pub fn finish(&self, output: Tensor<'_>) -> Graph {
        Graph {
            nodes: self.nodes.borrow().clone(),
            output: output.id,
            context_tokens_max: self.context_tokens_max,
        }
    }
}

impl<'a> Tensor<'a> {
    fn then(self, op: wit::Op) -> Self {
        self.builder.node(op)
    }

    /// `x Wᵀ`, weight `[out, in]`.
    #[must_use]
    pub fn linear(self, weight: &str) -> Self {
        self.linear_with_bias(weight, None)
    }

    /// `x Wᵀ + b`, weight `[out, in]`, bias `[out]`.
    #[must_use]
    pub fn linear_with_bias(self, weight: &str, bias: Option<&str>) -> Self {
        self.then(wit::Op::Linear(wit::Linear {
            x: self.id,
            weight: weight.to_owned(),
            bias: bias.map(str::to_owned),
        }))
    }

    /// Root-mean-square norm over the width.
    #[must_use]
    pub fn rms_norm(self, weight: &str, eps: f32) -> Self {
        self.rms_norm_with_offset(weight, eps, 0.0)
    }

    /// Root-mean-square norm with an offset on its weights (Gemma's is 1).
    #[must_use]
    pub fn rms_norm_with_offset(self, weight: &str, eps: f32, weight_offset: f32) -> Self {
        self.then(wit::Op::RmsNorm(wit::RmsNorm {
            x: self.id,
            weight: weight.to_owned(),
            eps,
            weight_offset,
        }))
    }

    /// Layer norm over the width.
    #[must_use]
    pub fn layer_norm(self, weight: &str, bias: Option<&str>, eps: f32) -> Self {
        self.then(wit::Op::LayerNorm(wit::LayerNorm {
            x: self.id,
            weight: weight.to_owned(),
            bias: bias.map(str::to_owned),
            eps,
        }))
    }

    /// Splits rows into heads.
    #[must_use]
    pub fn heads(self, heads: u32) -> Self {
        self.then(wit::Op::ReshapeHeads(wit::ReshapeHeads { x: self.id, heads }))
    }

    /// Joins heads to plain rows.
    #[must_use]
    pub fn join_heads(self) -> Self {
        self.heads(1)
    }

    /// Rotates each head by its token's position.
    #[must_use]
    pub fn rope(self, rope: &Rope) -> Self {
        self.then(wit::Op::Rope(wit::Rope {
            x: self.id,
            inv_freq: rope.inv_freq.clone(),
            rotated_width: u32::try_from(2 * rope.inv_freq.len()).unwrap_or(u32::MAX),
            pairing: rope.pairing,
            attention_factor: rope.attention_factor,
        }))
    }

    /// Every element times a constant.
    #[must_use]
    pub fn scale(self, factor: f32) -> Self {
        self.then(wit::Op::Scale(wit::Scale { x: self.id, factor }))
    }

    /// An elementwise function.
    #[must_use]
    pub fn activate(self, function: ActivationFunction) -> Self {
        self.then(wit::Op::Activation(wit::Activation { x: self.id, function }))
    }

    /// `x · sigmoid(x)`.
    #[must_use]
    pub fn silu(self) -> Self {
        self.activate(ActivationFunction::Silu)
    }

    /// `cap · tanh(x / cap)`.
    #[must_use]
    pub fn soft_cap(self, cap: f32) -> Self {
        self.then(wit::Op::SoftCap(wit::SoftCap { x: self.id, cap }))
    }

    /// Elements `start .. start + length` of each head.
    #[must_use]
    pub fn slice(self, start: u32, length: u32) -> Self {
        self.then(wit::Op::Slice(wit::Slice {
            x: self.id,
            start,
            length,
        }))
    }

    /// A mixture of experts; the `x` of the description is overwritten with this value.
    #[must_use]
    pub fn mixture_of_experts(self, mixture: MixtureOfExperts) -> Self {
        self.then(wit::Op::MixtureOfExperts(MixtureOfExperts {
            x: self.id,
            ..mixture
        }))
    }

    /// Mean of each sequence's rows.
    #[must_use]
    pub fn mean_pool(self) -> Self {
        self.then(wit::Op::MeanPool(self.id))
    }

    /// First row of each sequence.
    #[must_use]
    pub fn cls_pool(self) -> Self {
        self.then(wit::Op::ClsPool(self.id))
    }

    /// Scales each row to length 1.
    #[must_use]
    pub fn l2_normalise(self) -> Self {
        self.then(wit::Op::L2Normalise(self.id))
    }

    /// Keeps the rows whose output is wanted.
    #[must_use]
    pub fn output_rows(self) -> Self {
        self.then(wit::Op::OutputRows(self.id))
    }

    /// The distribution over the vocabulary, weight `[vocabulary, width]`.
    #[must_use]
    pub fn logits(self, weight: &str) -> Self {
        self.then(wit::Op::Logits(wit::Logits {
            x: self.id,
            weight: weight.to_owned(),
        }))
    }
}

impl Add for Tensor<'_> {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.then(wit::Op::Add(wit::Pair {
            a: self.id,
            b: other.id,
        }))
    }
}

impl Mul for Tensor<'_> {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        self.then(wit::Op::Mul(wit::Pair {
            a: self.id,
            b: other.id,
        }))
    }
}
