//! Graphs from the bindings of `galerne:model` to core. Checks only what core's types cannot express.

use galerne_core::graph::{
    Activation, AttentionSpec, EmbeddingIndex, FeedForward, Graph, Op, RopePairing, RouterNormalisation,
};
use galerne_core::ids::{LayerId, NodeId};

use crate::bindings::model::exports::galerne::model::architecture as wit;

/// A graph that core's types cannot hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GraphError {
    /// The frequencies and the width they rotate disagree.
    #[error(
        "rope at node {node}: expected rotated-width {expected}, twice the length of inv-freq, got {got}"
    )]
    RotatedWidth {
        /// The op's position.
        node: usize,
        /// Twice the number of frequencies.
        expected: usize,
        /// What the guest said.
        got: u32,
    },
}

/// From the guest: foreign data, to be validated.
pub(crate) fn graph(graph: wit::Graph) -> Result<Graph, GraphError> {
    let nodes = graph
        .nodes
        .into_iter()
        .enumerate()
        .map(|(node, op)| convert_op(node, op))
        .collect::<Result<_, _>>()?;
    Ok(Graph {
        nodes,
        output: NodeId(graph.output),
        context_tokens_max: graph.context_tokens_max,
    })
}

fn convert_op(node: usize, op: wit::Op) -> Result<Op, GraphError> {
    Ok(match op {
        wit::Op::Embedding(op) => Op::Embedding {
            weight: op.weight,
            index: embedding_index(op.index),
        },
        wit::Op::Linear(op) => Op::Linear {
            x: NodeId(op.x),
            weight: op.weight,
            bias: op.bias,
        },
        wit::Op::RmsNorm(op) => Op::RmsNorm {
            x: NodeId(op.x),
            weight: op.weight,
            eps: op.eps,
            weight_offset: op.weight_offset,
        },
        wit::Op::LayerNorm(op) => Op::LayerNorm {
            x: NodeId(op.x),
            weight: op.weight,
            bias: op.bias,
            eps: op.eps,
        },
        wit::Op::Rope(op) => rope(node, op)?,
        wit::Op::Attention(op) => attention(&op),
        wit::Op::Add(pair) => Op::Add {
            a: NodeId(pair.a),
            b: NodeId(pair.b),
        },
        wit::Op::Mul(pair) => Op::Mul {
            a: NodeId(pair.a),
            b: NodeId(pair.b),
        },
        wit::Op::Scale(op) => Op::Scale {
            x: NodeId(op.x),
            factor: op.factor,
        },
        wit::Op::Activation(op) => Op::Activate {
            x: NodeId(op.x),
            function: activation(op.function),
        },
        wit::Op::SoftCap(op) => Op::SoftCap {
            x: NodeId(op.x),
            cap: op.cap,
        },
        wit::Op::Slice(op) => Op::Slice {
            x: NodeId(op.x),
            start: op.start,
            length: op.length,
        },
        wit::Op::Concat(parts) => Op::Concat {
            parts: parts.into_iter().map(NodeId).collect(),
        },
        wit::Op::ReshapeHeads(op) => Op::ReshapeHeads {
            x: NodeId(op.x),
            heads: op.heads,
        },
        wit::Op::MixtureOfExperts(op) => mixture_of_experts(op),
        wit::Op::MeanPool(x) => Op::MeanPool { x: NodeId(x) },
        wit::Op::ClsPool(x) => Op::ClsPool { x: NodeId(x) },
        wit::Op::L2Normalise(x) => Op::L2Normalise { x: NodeId(x) },
        wit::Op::OutputRows(x) => Op::OutputRows { x: NodeId(x) },
        wit::Op::Logits(op) => Op::Logits {
            x: NodeId(op.x),
            weight: op.weight,
        },
    })
}

fn embedding_index(index: wit::EmbeddingIndex) -> EmbeddingIndex {
    match index {
        wit::EmbeddingIndex::Tokens => EmbeddingIndex::Tokens,
        wit::EmbeddingIndex::Positions(offset) => EmbeddingIndex::Positions(offset),
        wit::EmbeddingIndex::Constant(row) => EmbeddingIndex::Constant(row),
    }
}

/// Core derives the rotated width from the frequencies; the contract states it, so the two must agree.
fn rope(node: usize, op: wit::Rope) -> Result<Op, GraphError> {
    let expected = op.inv_freq.len() * 2;
    if usize::try_from(op.rotated_width) != Ok(expected) {
        return Err(GraphError::RotatedWidth {
            node,
            expected,
            got: op.rotated_width,
        });
    }
    Ok(Op::Rope {
        x: NodeId(op.x),
        inv_freq: op.inv_freq,
        pairing: match op.pairing {
            wit::RopePairing::Half => RopePairing::Half,
            wit::RopePairing::Interleaved => RopePairing::Interleaved,
        },
        attention_factor: op.attention_factor,
    })
}

fn attention(op: &wit::Attention) -> Op {
    Op::Attention {
        q: NodeId(op.q),
        k: NodeId(op.k),
        v: NodeId(op.v),
        spec: AttentionSpec {
            layer: LayerId(op.layer),
            heads: op.heads,
            kv_heads: op.kv_heads,
            head_width: op.head_width,
            scale: op.scale,
            causal: op.causal,
            sliding_window: op.sliding_window,
            soft_cap: op.soft_cap,
        },
    }
}

fn mixture_of_experts(op: wit::MixtureOfExperts) -> Op {
    Op::MixtureOfExperts {
        x: NodeId(op.x),
        router: op.router,
        experts: op.experts.into_iter().map(feed_forward).collect(),
        top_k: op.top_k,
        normalisation: match op.normalisation {
            wit::RouterNormalisation::SoftmaxAll => RouterNormalisation::SoftmaxAll,
            wit::RouterNormalisation::SoftmaxChosen => RouterNormalisation::SoftmaxChosen,
            wit::RouterNormalisation::SigmoidChosen => RouterNormalisation::SigmoidChosen,
        },
        function: activation(op.function),
        shared: op.shared.map(feed_forward),
        shared_gate: op.shared_gate,
    }
}

fn feed_forward(names: wit::FeedForward) -> FeedForward {
    FeedForward {
        gate: names.gate,
        up: names.up,
        down: names.down,
    }
}

fn activation(function: wit::ActivationFunction) -> Activation {
    match function {
        wit::ActivationFunction::Silu => Activation::Silu,
        wit::ActivationFunction::Gelu => Activation::Gelu,
        wit::ActivationFunction::GeluTanh => Activation::GeluTanh,
        wit::ActivationFunction::Relu => Activation::Relu,
        wit::ActivationFunction::Tanh => Activation::Tanh,
        wit::ActivationFunction::Sigmoid => Activation::Sigmoid,
    }
}
