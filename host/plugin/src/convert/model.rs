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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(op: wit::Op, expected: &Op) {
        assert_eq!(convert_op(0, op).as_ref(), Ok(expected));
    }

    fn name(text: &str) -> String {
        text.to_owned()
    }

    #[test]
    fn embeddings() {
        for (index, expected) in [
            (wit::EmbeddingIndex::Tokens, EmbeddingIndex::Tokens),
            (wit::EmbeddingIndex::Positions(2), EmbeddingIndex::Positions(2)),
            (wit::EmbeddingIndex::Constant(3), EmbeddingIndex::Constant(3)),
        ] {
            let op = wit::Op::Embedding(wit::Embedding {
                weight: name("w"),
                index,
            });
            check(
                op,
                &Op::Embedding {
                    weight: name("w"),
                    index: expected,
                },
            );
        }
    }

    #[test]
    fn linear_maps_and_norms() {
        let op = wit::Linear {
            x: 1,
            weight: name("w"),
            bias: Some(name("b")),
        };
        check(
            wit::Op::Linear(op),
            &Op::Linear {
                x: NodeId(1),
                weight: name("w"),
                bias: Some(name("b")),
            },
        );
        let op = wit::RmsNorm {
            x: 2,
            weight: name("w"),
            eps: 0.5,
            weight_offset: 1.0,
        };
        let expected = Op::RmsNorm {
            x: NodeId(2),
            weight: name("w"),
            eps: 0.5,
            weight_offset: 1.0,
        };
        check(wit::Op::RmsNorm(op), &expected);
        let op = wit::LayerNorm {
            x: 3,
            weight: name("w"),
            bias: None,
            eps: 0.25,
        };
        check(
            wit::Op::LayerNorm(op),
            &Op::LayerNorm {
                x: NodeId(3),
                weight: name("w"),
                bias: None,
                eps: 0.25,
            },
        );
        let op = wit::Logits {
            x: 4,
            weight: name("w"),
        };
        check(
            wit::Op::Logits(op),
            &Op::Logits {
                x: NodeId(4),
                weight: name("w"),
            },
        );
    }

    fn wit_rope(rotated_width: u32) -> wit::Op {
        wit::Op::Rope(wit::Rope {
            x: 1,
            inv_freq: vec![1.0, 0.5],
            rotated_width,
            pairing: wit::RopePairing::Interleaved,
            attention_factor: 2.0,
        })
    }

    #[test]
    fn a_rope_has_one_frequency_per_pair() {
        let pairing = RopePairing::Interleaved;
        check(
            wit_rope(4),
            &Op::Rope {
                x: NodeId(1),
                inv_freq: vec![1.0, 0.5],
                pairing,
                attention_factor: 2.0,
            },
        );
        let error = GraphError::RotatedWidth {
            node: 7,
            expected: 4,
            got: 5,
        };
        assert_eq!(convert_op(7, wit_rope(5)), Err(error));
    }

    #[test]
    fn attention_keeps_every_field() {
        let op = wit::Attention {
            q: 1,
            k: 2,
            v: 3,
            layer: 4,
            heads: 5,
            kv_heads: 6,
            head_width: 7,
            scale: 8.0,
            causal: true,
            sliding_window: Some(9),
            soft_cap: Some(10.0),
        };
        let spec = AttentionSpec {
            layer: LayerId(4),
            heads: 5,
            kv_heads: 6,
            head_width: 7,
            scale: 8.0,
            causal: true,
            sliding_window: Some(9),
            soft_cap: Some(10.0),
        };
        check(
            wit::Op::Attention(op),
            &Op::Attention {
                q: NodeId(1),
                k: NodeId(2),
                v: NodeId(3),
                spec,
            },
        );
    }

    #[test]
    fn a_mixture_keeps_every_field() {
        let names = |n: u32| (format!("g{n}"), format!("u{n}"), format!("d{n}"));
        let foreign = |n| {
            let (gate, up, down) = names(n);
            wit::FeedForward { gate, up, down }
        };
        let own = |n| {
            let (gate, up, down) = names(n);
            FeedForward { gate, up, down }
        };
        for (normalisation, expected) in [
            (
                wit::RouterNormalisation::SoftmaxAll,
                RouterNormalisation::SoftmaxAll,
            ),
            (
                wit::RouterNormalisation::SoftmaxChosen,
                RouterNormalisation::SoftmaxChosen,
            ),
            (
                wit::RouterNormalisation::SigmoidChosen,
                RouterNormalisation::SigmoidChosen,
            ),
        ] {
            let op = wit::MixtureOfExperts {
                x: 1,
                router: name("r"),
                experts: vec![foreign(0), foreign(1)],
                top_k: 2,
                normalisation,
                function: wit::ActivationFunction::Gelu,
                shared: Some(foreign(2)),
                shared_gate: Some(name("s")),
            };
            let expected = Op::MixtureOfExperts {
                x: NodeId(1),
                router: name("r"),
                experts: vec![own(0), own(1)],
                top_k: 2,
                normalisation: expected,
                function: Activation::Gelu,
                shared: Some(own(2)),
                shared_gate: Some(name("s")),
            };
            check(wit::Op::MixtureOfExperts(op), &expected);
        }
    }

    #[test]
    fn activations() {
        for (function, expected) in [
            (wit::ActivationFunction::Silu, Activation::Silu),
            (wit::ActivationFunction::Gelu, Activation::Gelu),
            (wit::ActivationFunction::GeluTanh, Activation::GeluTanh),
            (wit::ActivationFunction::Relu, Activation::Relu),
            (wit::ActivationFunction::Tanh, Activation::Tanh),
            (wit::ActivationFunction::Sigmoid, Activation::Sigmoid),
        ] {
            let op = wit::Op::Activation(wit::Activation { x: 1, function });
            check(
                op,
                &Op::Activate {
                    x: NodeId(1),
                    function: expected,
                },
            );
        }
    }

    #[test]
    fn ops_on_values_alone() {
        let x = NodeId(1);
        let pair = || wit::Pair { a: 1, b: 2 };
        check(wit::Op::Add(pair()), &Op::Add { a: x, b: NodeId(2) });
        check(wit::Op::Mul(pair()), &Op::Mul { a: x, b: NodeId(2) });
        check(
            wit::Op::Scale(wit::Scale { x: 1, factor: 2.0 }),
            &Op::Scale { x, factor: 2.0 },
        );
        check(
            wit::Op::SoftCap(wit::SoftCap { x: 1, cap: 3.0 }),
            &Op::SoftCap { x, cap: 3.0 },
        );
        let slice = wit::Slice {
            x: 1,
            start: 4,
            length: 5,
        };
        check(
            wit::Op::Slice(slice),
            &Op::Slice {
                x,
                start: 4,
                length: 5,
            },
        );
        check(
            wit::Op::Concat(vec![1, 2]),
            &Op::Concat {
                parts: vec![x, NodeId(2)],
            },
        );
        let reshape = wit::ReshapeHeads { x: 1, heads: 6 };
        check(wit::Op::ReshapeHeads(reshape), &Op::ReshapeHeads { x, heads: 6 });
        check(wit::Op::MeanPool(1), &Op::MeanPool { x });
        check(wit::Op::ClsPool(1), &Op::ClsPool { x });
        check(wit::Op::L2Normalise(1), &Op::L2Normalise { x });
        check(wit::Op::OutputRows(1), &Op::OutputRows { x });
    }
}
