//! The validation gate's finer rules: rows, numbers and mixtures, each with what is refused and how.

mod support;

use galerne_core::dtype::DType;
use galerne_core::graph::{EmbeddingIndex, Op, RopePairing};
use galerne_core::ids::NodeId;
use galerne_core::limits::GraphLimits;
use galerne_core::validate::GraphError;

use support::{Model, VOCABULARY, llama, mixture};

fn refused(mut model: Model, change: impl FnOnce(&mut Model)) -> GraphError {
    change(&mut model);
    model.validate().expect_err("must be refused")
}

/// The error of a Llama with one more node.
fn refused_node(op: Op) -> GraphError {
    refused(llama(), |model| {
        model.push(op);
    })
}

fn output_rows() -> NodeId {
    NodeId(u32::try_from(llama().find("output-rows")).expect("small graph"))
}

fn in_mixture(change: impl FnOnce(&mut Op)) -> GraphError {
    refused(mixture(), |model| change(&mut model.graph.nodes[1]))
}

#[test]
fn values_of_different_rows_do_not_mix() {
    let concat = refused_node(Op::Concat {
        parts: vec![NodeId(0), output_rows()],
    });
    let expected =
        "concat (node 44): expected a part (node 41) of shape [tokens, 1, width], got [outputs, 1, 64]";
    assert_eq!(concat.to_string(), expected);
    let add = refused_node(Op::Add {
        a: output_rows(),
        b: NodeId(0),
    });
    let expected = "add (node 44): expected b (node 0) of shape [outputs, 1, 64], got [tokens, 1, 64]";
    assert_eq!(add.to_string(), expected);
}

#[test]
fn positions_exist_only_on_token_rows() {
    let op = Op::Rope {
        x: output_rows(),
        inv_freq: vec![1.0],
        pairing: RopePairing::Interleaved,
        attention_factor: 1.0,
    };
    let expected =
        "rope (node 44): expected x (node 41) of shape [tokens, heads, width], got [outputs, 1, 64]";
    assert_eq!(refused_node(op).to_string(), expected);
}

#[test]
fn output_rows_and_pools_take_token_rows() {
    let x = output_rows();
    for op in [Op::OutputRows { x }, Op::MeanPool { x }, Op::ClsPool { x }] {
        let error = refused_node(op);
        assert!(
            matches!(error, GraphError::InputShape { field: "x", .. }),
            "{error}"
        );
    }
}

#[test]
fn logits_take_one_head() {
    let mut model = llama();
    let x = model.push(Op::ReshapeHeads {
        x: output_rows(),
        heads: 2,
    });
    model.push(Op::Logits {
        x,
        weight: "embed".into(),
    });
    let error = model.validate().expect_err("two heads");
    assert!(
        matches!(error, GraphError::InputShape { field: "x", .. }),
        "{error}"
    );
}

#[test]
fn a_constant_row_must_be_in_the_table() {
    let embedding = |row| Op::Embedding {
        weight: "embed".into(),
        index: EmbeddingIndex::Constant(row),
    };
    let entries = u32::try_from(VOCABULARY).expect("small");
    let error = refused_node(embedding(entries));
    assert!(
        matches!(
            error,
            GraphError::TableEntries {
                needed: 321,
                got: 320,
                ..
            }
        ),
        "{error}"
    );
    let error = refused_node(embedding(u32::MAX));
    assert!(matches!(error, GraphError::TableEntries { .. }), "{error}");
    let mut model = llama();
    model.push(embedding(entries - 1));
    model.validate().expect("the last row");
}

#[test]
fn a_table_is_a_matrix_that_is_not_empty() {
    for shape in [&[320, 0][..], &[0, 64], &[320], &[], &[320, 64, 1]] {
        let error = refused(llama(), |model| model.put("embed", DType::F32, shape));
        let GraphError::WeightShape { at, .. } = &error else {
            panic!("{shape:?}: {error}")
        };
        assert_eq!(at.node, NodeId(0), "{shape:?}: {error}");
    }
}

#[test]
fn factors_must_be_finite() {
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let x = NodeId(0);
    for factor in bad {
        let error = refused_node(Op::Scale { x, factor });
        assert!(
            matches!(error, GraphError::Number { field: "factor", .. }),
            "{error}"
        );
        let op = Op::RmsNorm {
            x,
            weight: "norm".into(),
            eps: 0.0,
            weight_offset: factor,
        };
        let error = refused_node(op);
        assert!(
            matches!(
                error,
                GraphError::Number {
                    field: "weight-offset",
                    ..
                }
            ),
            "{error}"
        );
        let op = Op::LayerNorm {
            x,
            weight: "norm".into(),
            bias: None,
            eps: factor,
        };
        let error = refused_node(op);
        assert!(
            matches!(error, GraphError::Number { field: "eps", .. }),
            "{error}"
        );
        let error = refused(llama(), |model| {
            let position = model.find("attention");
            if let Op::Attention { spec, .. } = &mut model.graph.nodes[position] {
                spec.scale = factor;
            }
        });
        assert!(
            matches!(error, GraphError::Number { field: "scale", .. }),
            "{error}"
        );
    }
}

#[test]
fn caps_and_rotation_factors_must_be_above_0() {
    let x = NodeId(0);
    for value in [f32::NAN, f32::INFINITY, -1.0, 0.0] {
        let error = refused_node(Op::SoftCap { x, cap: value });
        assert!(
            matches!(error, GraphError::Number { field: "cap", .. }),
            "{error}"
        );
        let pairing = RopePairing::Half;
        let error = refused_node(Op::Rope {
            x,
            inv_freq: vec![1.0],
            pairing,
            attention_factor: value,
        });
        assert!(
            matches!(
                error,
                GraphError::Number {
                    field: "attention-factor",
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn a_rotation_of_nothing_is_refused() {
    let op = Op::Rope {
        x: NodeId(0),
        inv_freq: vec![],
        pairing: RopePairing::Half,
        attention_factor: 1.0,
    };
    let expected = "rope (node 44): expected number of inv-freq from 1 to 32, got 0";
    assert_eq!(refused_node(op).to_string(), expected);
}

#[test]
fn a_mixture_chooses_from_1_to_all_experts() {
    for wrong in [0, 3] {
        let error = in_mixture(|op| {
            if let Op::MixtureOfExperts { top_k, .. } = op {
                *top_k = wrong;
            }
        });
        let expected =
            format!("mixture-of-experts \"router\" (node 1): expected top-k from 1 to 2, got {wrong}");
        assert_eq!(error.to_string(), expected);
    }
    let error = in_mixture(|op| {
        if let Op::MixtureOfExperts { experts, .. } = op {
            experts.clear();
        }
    });
    let expected = "mixture-of-experts \"router\" (node 1): expected from 1 to 1024 experts, got 0";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_shared_gate_needs_a_shared_expert() {
    let error = in_mixture(|op| {
        if let Op::MixtureOfExperts { shared, .. } = op {
            *shared = None;
        }
    });
    let expected = "mixture-of-experts \"shared_gate\" (node 1): expected a shared expert with shared-gate, got only \
                    the gate";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn every_matrix_of_a_mixture_must_fit() {
    let cases: [(&str, [u64; 2], &str); 6] = [
        ("experts.1.gate", [96, 32], "gate [out, 64], got [96, 32]"),
        ("experts.1.up", [128, 64], "up [96, 64], got [128, 64]"),
        ("experts.1.down", [64, 128], "down [64, 96], got [64, 128]"),
        ("shared.down", [32, 96], "down [64, 96], got [32, 96]"),
        ("router", [3, 64], "router [2, 64], got [3, 64]"),
        ("shared_gate", [2, 64], "shared-gate [1, 64], got [2, 64]"),
    ];
    for (name, shape, words) in cases {
        let error = refused(mixture(), |model| model.put(name, DType::F32, &shape));
        let expected = format!(
            "mixture-of-experts {name:?} (node 1): expected {words}; does config.json match the weights?"
        );
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn the_inner_width_of_an_expert_is_a_row_too() {
    let mut model = mixture();
    for name in ["gate", "up"] {
        model.put(&format!("experts.0.{name}"), DType::F32, &[512, 64]);
    }
    model.put("experts.0.down", DType::F32, &[64, 512]);
    model.validate().expect("experts may differ in their inner width");
    let limits = GraphLimits {
        row_elements_max: 511,
        ..GraphLimits::default()
    };
    let error = model.validate_within(&limits).expect_err("a row of 512");
    assert!(
        matches!(
            error,
            GraphError::RowElements {
                max: 511,
                got: 512,
                ..
            }
        ),
        "{error}"
    );
}
