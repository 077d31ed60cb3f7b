//! The validation gate by example: what it accepts, and one case per way to be refused, with its message.

mod support;

use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, EmbeddingIndex, Op, RopePairing, Rows, ValueShape};
use galerne_core::ids::{LayerId, NodeId};
use galerne_core::limits::GraphLimits;
use galerne_core::validate::{GraphError, validate};

use support::{HEADS, LAYERS, Model, VOCABULARY, WIDTH, llama, mixture};

/// Changes a valid Llama and expects it to be refused with a message that starts like this.
fn refused(change: impl FnOnce(&mut Model), message: &str) -> GraphError {
    refused_model(llama(), change, message)
}

fn refused_model(mut model: Model, change: impl FnOnce(&mut Model), message: &str) -> GraphError {
    change(&mut model);
    let error = model.validate().expect_err("must be refused");
    assert_eq!(error.to_string(), message);
    error
}

fn op<'a>(model: &'a mut Model, name: &str) -> &'a mut Op {
    let position = model.find(name);
    &mut model.graph.nodes[position]
}

#[test]
fn a_llama_passes() {
    let model = llama();
    let valid = model.validate().expect("a valid graph");
    support::check_invariants(&valid, &model.weights, &GraphLimits::default());
    assert_eq!(valid.layers().len(), LAYERS as usize);
    assert_eq!(valid.vocabulary(), Some(VOCABULARY as u32));
    assert_eq!(valid.token_entries(), Some(VOCABULARY as u32));
    assert_eq!(
        valid.shape(NodeId(0)),
        ValueShape {
            rows: Rows::Tokens,
            heads: 1,
            width: WIDTH
        }
    );
    let attention = NodeId(model.find("attention") as u32);
    assert_eq!(
        valid.shape(attention),
        ValueShape {
            rows: Rows::Tokens,
            heads: HEADS,
            width: 16
        }
    );
    assert_eq!(valid.output_shape().rows, Rows::Outputs);
}

#[test]
fn a_mixture_without_attention_passes() {
    let model = mixture();
    let valid = model.validate().expect("a valid graph");
    support::check_invariants(&valid, &model.weights, &GraphLimits::default());
    assert!(valid.layers().is_empty());
}

#[test]
fn an_encoder_passes_and_has_no_vocabulary() {
    let mut model = llama();
    let last = model.find("output-rows");
    model.graph.nodes.truncate(last);
    let pooled = model.push(Op::MeanPool {
        x: NodeId(last as u32 - 1),
    });
    model.graph.output = model.push(Op::L2Normalise { x: pooled });
    let valid = model.validate().expect("a valid graph");
    assert_eq!(valid.vocabulary(), None);
    assert_eq!(valid.token_entries(), Some(VOCABULARY as u32));
    assert_eq!(
        valid.output_shape(),
        ValueShape {
            rows: Rows::Sequences,
            heads: 1,
            width: WIDTH
        }
    );
}

#[test]
fn capped_and_scaled_logits_are_logits() {
    let mut model = llama();
    let x = model.push(Op::Scale {
        x: model.graph.output,
        factor: 0.5,
    });
    model.graph.output = model.push(Op::SoftCap { x, cap: 30.0 });
    assert_eq!(
        model.validate().expect("a valid graph").vocabulary(),
        Some(VOCABULARY as u32)
    );
    model.graph.output = model.push(Op::Activate {
        x: model.graph.output,
        function: Activation::Tanh,
    });
    assert_eq!(model.validate().expect("a valid graph").vocabulary(), None);
}

#[test]
fn slice_and_concat_have_the_stated_shapes() {
    let mut model = llama();
    let x = NodeId(model.find("attention") as u32);
    let left = model.push(Op::Slice {
        x,
        start: 0,
        length: 6,
    });
    let right = model.push(Op::Slice {
        x,
        start: 6,
        length: 10,
    });
    let both = model.push(Op::Concat {
        parts: vec![right, left, left],
    });
    let valid = model.validate().expect("a valid graph");
    assert_eq!(valid.shape(left).width, 6);
    assert_eq!(
        valid.shape(both),
        ValueShape {
            rows: Rows::Tokens,
            heads: HEADS,
            width: 22
        }
    );
}

#[test]
fn an_empty_graph_is_refused() {
    refused(
        |model| model.graph.nodes.clear(),
        "graph: expected at least one node, got none",
    );
}

#[test]
fn too_many_nodes_are_refused() {
    let limits = GraphLimits {
        nodes_max: 10,
        ..GraphLimits::default()
    };
    let error = llama().validate_within(&limits).expect_err("too many nodes");
    assert!(matches!(error, GraphError::NodeCount { max: 10, .. }), "{error}");
}

#[test]
fn a_context_of_none_or_too_many_tokens_is_refused() {
    let message = "graph: expected context-tokens-max from 1 to 1048576, got 0";
    refused(|model| model.graph.context_tokens_max = 0, message);
    let message = "graph: expected context-tokens-max from 1 to 1048576, got 4294967295";
    refused(|model| model.graph.context_tokens_max = u32::MAX, message);
}

#[test]
fn an_output_that_is_no_node_is_refused() {
    let nodes = llama().graph.nodes.len();
    let message =
        format!("graph: expected an output below {nodes} (the number of nodes), got node 4294967295");
    refused(|model| model.graph.output = NodeId(u32::MAX), &message);
}

#[test]
fn an_output_of_token_rows_is_refused() {
    let message = "embedding \"embed\" (node 0): expected the graph's output to be logits, or to have rows of \
                   outputs or sequences, got [tokens, 1, 64]; is output-rows or a pool missing?";
    refused(|model| model.graph.output = NodeId(0), message);
}

#[test]
fn cycles_and_forward_references_are_refused() {
    for (target, got) in [(1, 1), (9, 9), (u32::MAX, u32::MAX)] {
        let message = format!(
            "rms-norm \"layers.0.norm\" (node 1): expected inputs before node 1, got node {got}: a cyclic or \
             forward reference; order nodes so that each reads only earlier ones"
        );
        let change = |model: &mut Model| {
            if let Op::RmsNorm { x, .. } = op(model, "rms-norm") {
                *x = NodeId(target);
            }
        };
        refused(change, &message);
    }
}

#[test]
fn inputs_of_the_wrong_shape_are_refused() {
    let change = |model: &mut Model| {
        let b = NodeId(model.find("rope") as u32);
        model.push(Op::Add { a: NodeId(0), b });
    };
    refused(
        change,
        "add (node 44): expected b (node 8) of shape [tokens, 1, 64], got [tokens, 4, 16]",
    );
    let change = |model: &mut Model| {
        let x = NodeId(model.find("attention") as u32);
        model.push(Op::Linear {
            x,
            weight: "layers.0.o".into(),
            bias: None,
        });
    };
    let message = "linear \"layers.0.o\" (node 44): expected x (node 10) of shape [rows, 1, width], as \
                   reshape-heads gives, got [tokens, 4, 16]";
    refused(change, message);
}

#[test]
fn attention_inputs_must_fit_its_heads() {
    let change = |model: &mut Model| {
        if let Op::Attention { k, q, .. } = op(model, "attention") {
            std::mem::swap(k, q);
        }
    };
    refused(
        change,
        "attention (node 10): expected q (node 9) of shape [tokens, 4, 16], got [tokens, 2, 16]",
    );
}

#[test]
fn attention_heads_must_be_a_multiple_of_kv_heads() {
    let change = |model: &mut Model| {
        if let Op::Attention { spec, .. } = op(model, "attention") {
            spec.kv_heads = 3;
        }
    };
    refused(
        change,
        "attention (node 10): expected heads to be a multiple of kv-heads (3), got 4",
    );
    let change = |model: &mut Model| {
        if let Op::Attention { spec, .. } = op(model, "attention") {
            spec.kv_heads = 0;
        }
    };
    refused(
        change,
        "attention (node 10): expected kv-heads from 1 to 4294967295, got 0",
    );
}

#[test]
fn an_empty_window_is_refused() {
    let change = |model: &mut Model| {
        if let Op::Attention { spec, .. } = op(model, "attention") {
            spec.sliding_window = Some(0);
        }
    };
    refused(
        change,
        "attention (node 10): expected sliding-window from 1 to 4294967295, got 0",
    );
}

#[test]
fn layers_must_be_numbered_in_order() {
    let change = |model: &mut Model| {
        if let Op::Attention { spec, .. } = op(model, "attention") {
            spec.layer = LayerId(1);
        }
    };
    let message = "attention (node 10): expected layer 0, got 1; number attention layers from 0 in order, \
                   without gaps";
    refused(change, message);
}

#[test]
fn an_overlong_name_is_refused_with_a_short_message() {
    let change = |model: &mut Model| {
        if let Op::RmsNorm { weight, .. } = op(model, "rms-norm") {
            *weight = "n\n".repeat(1 << 20);
        }
    };
    let error = {
        let mut model = llama();
        change(&mut model);
        model.validate().expect_err("a name of 2 MiB")
    };
    assert!(
        matches!(error, GraphError::NameLength { max: 256, .. }),
        "{error}"
    );
    let message = error.to_string();
    assert!(message.len() < 400 && !message.contains('\n'), "{message}");
}

#[test]
fn a_missing_weight_is_named() {
    let message = "linear \"layers.1.down\" (node 39): expected weight in the weight file, got no weight of that \
                   name; does config.json match the weights?";
    let change = |model: &mut Model| {
        model.weights.tensors.remove("layers.1.down");
    };
    refused(change, message);
}

#[test]
fn a_matrix_of_another_width_is_refused() {
    let message = "linear \"layers.0.q\" (node 2): expected weight [out, 64], got [64, 96]; does config.json match \
                   the weights?";
    refused(|model| model.put("layers.0.q", DType::Q4_1, &[64, 96]), message);
    let message = "linear \"layers.0.q\" (node 2): expected weight [out, 64], got [0, 64]; does config.json match \
                   the weights?";
    refused(|model| model.put("layers.0.q", DType::Q4_1, &[0, 64]), message);
    let message = "linear \"layers.0.q\" (node 2): expected weight [out, 64], got [4096]; does config.json match \
                   the weights?";
    refused(|model| model.put("layers.0.q", DType::F32, &[4096]), message);
}

#[test]
fn a_norm_of_another_shape_is_refused() {
    let message = "rms-norm \"norm\" (node 42): expected weight [64], got [1, 64]; does config.json match the \
                   weights?";
    refused(|model| model.put("norm", DType::F32, &[1, 64]), message);
}

#[test]
fn a_bias_of_another_length_is_refused() {
    let change = |model: &mut Model| {
        model.put("bias", DType::F32, &[63]);
        if let Op::Linear { bias, .. } = op(model, "linear") {
            *bias = Some("bias".into());
        }
    };
    refused(
        change,
        "linear \"bias\" (node 2): expected bias [64], got [63]; does config.json match the weights?",
    );
}

#[test]
fn a_quantized_vector_is_refused() {
    let message = "rms-norm \"norm\" (node 42): expected weight in f32, f16 or bf16, got q8_0; keep vectors \
                   unquantized";
    refused(|model| model.put("norm", DType::Q8_0, &[64]), message);
}

#[test]
fn rows_that_are_not_whole_blocks_are_refused() {
    let message = "embedding \"embed\" (node 0): expected weight in q4_0 with rows of whole blocks of 32, got rows \
                   of 65 elements";
    refused(
        |model| model.put("embed", DType::Q4_0, &[VOCABULARY, 65]),
        message,
    );
}

#[test]
fn a_weight_beyond_the_address_space_is_refused() {
    let mut model = llama();
    model.put("embed", DType::F32, &[VOCABULARY, u64::MAX - 7]);
    let error = model.validate().expect_err("too large");
    assert!(matches!(error, GraphError::WeightSize { .. }), "{error}");
    let shape = [1 << 40, 64];
    model = llama();
    model.put("embed", DType::F32, &shape);
    let limits = GraphLimits {
        vocabulary_max: u64::MAX,
        row_elements_max: u64::MAX,
        ..GraphLimits::default()
    };
    let error = model.validate_within(&limits).expect_err("more entries than u32");
    assert!(matches!(error, GraphError::Vocabulary { .. }), "{error}");
}

#[test]
fn numbers_out_of_range_are_refused() {
    let change = |model: &mut Model| {
        if let Op::RmsNorm { eps, .. } = op(model, "rms-norm") {
            *eps = -1.0;
        }
    };
    let message = "rms-norm \"layers.0.norm\" (node 1): expected eps to be finite and not negative, got -1";
    refused(change, message);
    let change = |model: &mut Model| {
        if let Op::Rope { inv_freq, .. } = op(model, "rope") {
            inv_freq[3] = f32::NAN;
        }
    };
    refused(change, "rope (node 8): expected inv-freq to be finite, got NaN");
    let change = |model: &mut Model| {
        if let Op::Attention { spec, .. } = op(model, "attention") {
            spec.soft_cap = Some(0.0);
        }
    };
    refused(
        change,
        "attention (node 10): expected soft-cap to be finite and above 0, got 0",
    );
}

#[test]
fn a_rotation_wider_than_a_head_is_refused() {
    let change = |model: &mut Model| {
        let x = op(model, "rope").inputs()[0];
        *op(model, "rope") = Op::Rope {
            x,
            inv_freq: vec![1.0; 9],
            pairing: RopePairing::Half,
            attention_factor: 1.0,
        };
    };
    refused(
        change,
        "rope (node 8): expected number of inv-freq from 1 to 8, got 9",
    );
}

#[test]
fn a_slice_beyond_its_input_is_refused() {
    let slice = |start, length| {
        move |model: &mut Model| {
            model.push(Op::Slice {
                x: NodeId(0),
                start,
                length,
            });
        }
    };
    refused(
        slice(32, 33),
        "slice (node 44): expected length from 1 to 32, got 33",
    );
    refused(
        slice(u32::MAX, 2),
        "slice (node 44): expected start from 0 to 63, got 4294967295",
    );
    refused(
        slice(1, u32::MAX),
        "slice (node 44): expected length from 1 to 63, got 4294967295",
    );
}

#[test]
fn heads_must_divide_a_row() {
    let change = |model: &mut Model| {
        model.push(Op::ReshapeHeads {
            x: NodeId(0),
            heads: 7,
        });
    };
    refused(
        change,
        "reshape-heads (node 44): expected heads to divide the 64 elements of a row, got 7",
    );
}

#[test]
fn a_concat_of_nothing_or_of_too_much_is_refused() {
    let concat = |parts| {
        move |model: &mut Model| {
            model.push(Op::Concat { parts });
        }
    };
    refused(
        concat(vec![]),
        "concat (node 44): expected from 1 to 1024 parts, got 0",
    );
    refused(
        concat(vec![NodeId(0); 1025]),
        "concat (node 44): expected from 1 to 1024 parts, got 1025",
    );
}

#[test]
fn rows_beyond_the_limit_are_refused() {
    let mut model = llama();
    model.push(Op::Concat {
        parts: vec![NodeId(0); 5],
    });
    let limits = GraphLimits {
        row_elements_max: 319,
        ..GraphLimits::default()
    };
    let error = model.validate_within(&limits).expect_err("a row of 320");
    assert!(
        matches!(
            error,
            GraphError::RowElements {
                max: 319,
                got: 320,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn all_rows_together_beyond_the_limit_are_refused() {
    let limits = GraphLimits {
        graph_elements_max: 1_000,
        ..GraphLimits::default()
    };
    let error = llama()
        .validate_within(&limits)
        .expect_err("more than 1,000 elements");
    assert!(
        matches!(error, GraphError::GraphElements { max: 1_000, .. }),
        "{error}"
    );
}

#[test]
fn a_vocabulary_beyond_the_limit_is_refused() {
    let limits = GraphLimits {
        vocabulary_max: VOCABULARY - 1,
        ..GraphLimits::default()
    };
    let error = llama().validate_within(&limits).expect_err("320 entries");
    assert_eq!(
        error.to_string(),
        "embedding \"embed\" (node 0): expected at most 319 entries, got 320"
    );
}

#[test]
fn logits_may_not_give_a_token_without_an_embedding() {
    let change = |model: &mut Model| {
        model.put("head", DType::F32, &[VOCABULARY + 1, 64]);
        if let Op::Logits { weight, .. } = op(model, "logits") {
            *weight = "head".into();
        }
    };
    let message = "logits \"head\" (node 43): expected a table of at least 321 entries (the embedding of every token \
                   that the logits may give), got 320; does config.json match the weights?";
    refused(change, message);
}

#[test]
fn positions_beyond_their_table_are_refused() {
    let table = |entries| {
        move |model: &mut Model| {
            model.put("positions", DType::F32, &[entries, 64]);
            model.push(Op::Embedding {
                weight: "positions".into(),
                index: EmbeddingIndex::Positions(2),
            });
        }
    };
    let message = "embedding \"positions\" (node 44): expected a table of at least 130 entries (offset plus \
                   context-tokens-max), got 129; does config.json match the weights?";
    refused(table(129), message);
    let mut model = llama();
    table(130)(&mut model);
    model.validate().expect("130 entries are enough");
}

#[test]
fn logits_and_pools_need_their_rows() {
    let change = |model: &mut Model| {
        model.push(Op::Logits {
            x: NodeId(0),
            weight: "embed".into(),
        });
    };
    let message =
        "logits \"embed\" (node 44): expected x (node 0) of shape [outputs, 1, width], got [tokens, 1, 64]";
    refused(change, message);
    let change = |model: &mut Model| {
        let x = NodeId(model.find("output-rows") as u32);
        model.push(Op::ClsPool { x });
    };
    let message =
        "cls-pool (node 44): expected x (node 41) of shape [tokens, heads, width], got [outputs, 1, 64]";
    refused(change, message);
}

#[test]
fn the_limits_themselves_cannot_overflow_the_gate() {
    let limits = GraphLimits {
        nodes_max: usize::MAX,
        row_elements_max: u64::MAX,
        graph_elements_max: u64::MAX,
        name_bytes_max: usize::MAX,
        parts_max: usize::MAX,
        context_tokens_max: u32::MAX,
        vocabulary_max: u64::MAX,
    };
    let mut model = llama();
    model.put("wide", DType::F32, &[u64::from(u32::MAX), 64]);
    let x = model.push(Op::Linear {
        x: NodeId(0),
        weight: "wide".into(),
        bias: None,
    });
    model.push(Op::Concat { parts: vec![x, x] });
    let error = validate(model.graph, &model.weights, &limits).expect_err("a row beyond u32");
    assert!(matches!(error, GraphError::RowElements { .. }), "{error}");
}
