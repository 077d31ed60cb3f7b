//! Lowered programs compute what their graphs say, and fuse what they should.

mod numeric;

use galerne_core::graph::{EmbeddingIndex, Op};
use galerne_core::validate::ValidGraph;
use galerne_engine::lowering::lower;
use galerne_kernels::program::{Instr, Program};
use proptest::prelude::*;

use numeric::Weights;
use numeric::build::{Build, Family, VOCABULARY, WIDTH, arbitrary, decoder, encoder};
use numeric::program::Interpreter;

const TOKENS: [u32; 7] = [3, 14, 15, 9, 26, 5, 3];

/// Compares output rows; both sides are f64 but sum in different orders.
fn assert_close(expected: &[Vec<f64>], got: &[Vec<f64>], what: &str) {
    assert_eq!(expected.len(), got.len(), "{what}: rows");
    for (r, (expected, got)) in expected.iter().zip(got).enumerate() {
        assert_eq!(expected.len(), got.len(), "{what}: columns");
        for (c, (e, g)) in expected.iter().zip(got).enumerate() {
            let close = (e - g).abs() <= 1e-6 * (1.0 + e.abs()) || (!e.is_finite() && !g.is_finite());
            assert!(close, "{what}: row {r}, column {c}: expected {e}, got {g}");
        }
    }
}

/// The program computes the graph's values, whole and, for decoders, in chunks.
fn check(graph: &ValidGraph, weights: &Weights) -> Program {
    let program = lower(graph).expect("within limits");
    let outputs = [2, 6];
    let expected = numeric::graph::run(graph, weights, &TOKENS, &outputs);
    let whole = Interpreter::new(&program, weights).run(&TOKENS, &outputs);
    assert_close(&expected, &whole, "whole");
    if graph.vocabulary().is_some() {
        let mut chunked = Interpreter::new(&program, weights);
        let mut rows = chunked.run(&TOKENS[..3], &[2]);
        chunked.run(&TOKENS[3..4], &[]);
        rows.extend(chunked.run(&TOKENS[4..], &[2]));
        assert_close(&expected, &rows, "chunked");
    }
    program
}

/// The instructions' names in order, runs of one name counted.
fn outline(program: &Program) -> String {
    let mut names: Vec<(String, usize)> = Vec::new();
    for instr in &program.instrs {
        let debug = format!("{instr:?}");
        let name = debug.split([' ', '{', '(']).next().unwrap_or_default();
        let name = match instr {
            Instr::Linear { accumulate: true, .. } => format!("{name}+"),
            Instr::RopeAppend {
                q_rope: Some(_),
                k_rope: Some(_),
                ..
            } => format!("{name}(qk)"),
            _ => name.to_owned(),
        };
        match names.last_mut() {
            Some((last, count)) if *last == name => *count += 1,
            _ => names.push((name, 1)),
        }
    }
    let text = |(name, count): &(String, usize)| {
        if *count == 1 {
            name.clone()
        } else {
            format!("{name}*{count}")
        }
    };
    names.iter().map(text).collect::<Vec<_>>().join(" ")
}

const LLAMA_LAYER: &str = "Norm Linear RopeAppend(qk) Attention Linear+ Norm Linear ActivateMul Linear+";

#[test]
fn llama_is_fused_whole() {
    let (graph, weights) = decoder(Family::default());
    let program = check(&graph, &weights);
    let expected = format!("Embedding {LLAMA_LAYER} {LLAMA_LAYER} OutputRows Norm Linear");
    assert_eq!(outline(&program), expected);
    let qkv = program
        .weights
        .iter()
        .find(|w| w.parts.len() == 3)
        .expect("fused QKV");
    assert_eq!((qkv.rows, qkv.width), (48, 24));
    assert_eq!(qkv.parts, ["layers.0.q", "layers.0.k", "layers.0.v"]);
    let tables = program.weights.iter().filter(|w| w.parts == ["embed"]).count();
    assert_eq!(
        (tables, program.ropes.len()),
        (1, 1),
        "tied tables and equal ropes are entered once"
    );
    // Two layers need no more memory than one: residual, normed, qkv, attended, gate-up, and three of outputs.
    assert!(program.buffers.len() <= 8, "{:?}", program.buffers);
    assert_eq!(graph.vocabulary(), Some(VOCABULARY));
}

#[test]
fn biases_are_fused_with_their_weights() {
    let (graph, weights) = decoder(Family {
        qkv_bias: true,
        ..Family::default()
    });
    let program = check(&graph, &weights);
    let expected = format!("Embedding {LLAMA_LAYER} {LLAMA_LAYER} OutputRows Norm Linear");
    assert_eq!(outline(&program), expected);
    assert!(
        program
            .weights
            .iter()
            .any(|w| w.parts.len() == 3 && (w.rows, w.width) == (1, 48))
    );
}

#[test]
fn head_norms_work_in_place_on_the_fused_projection() {
    let (graph, weights) = decoder(Family {
        head_norms: true,
        ..Family::default()
    });
    let program = check(&graph, &weights);
    let layer = "Norm Linear Norm*2 RopeAppend(qk) Attention Linear+ Norm Linear ActivateMul Linear+";
    assert_eq!(
        outline(&program),
        format!("Embedding {layer} {layer} OutputRows Norm Linear")
    );
    for instr in &program.instrs {
        if let Instr::Norm { x, norm, out } = instr
            && norm.width == 6
        {
            assert_eq!(x, out);
        }
    }
}

#[test]
fn gemma_adds_and_norms_in_one() {
    let (graph, weights) = decoder(Family {
        gemma: true,
        ..Family::default()
    });
    let program = check(&graph, &weights);
    let layer = "Linear RopeAppend(qk) Attention Linear Norm AddNorm Linear ActivateMul Linear Norm";
    let expected = format!("Embedding Scale Norm {layer} AddNorm {layer} Add OutputRows Norm Linear SoftCap");
    assert_eq!(outline(&program), expected);
}

#[test]
fn parallel_blocks_share_one_projection() {
    let (graph, weights) = decoder(Family {
        parallel: true,
        ..Family::default()
    });
    let program = check(&graph, &weights);
    assert!(
        program.weights.iter().any(|w| w.parts.len() == 5),
        "{:?}",
        program.weights
    );
}

#[test]
fn experts_are_one_instruction() {
    let (graph, weights) = decoder(Family {
        experts: true,
        ..Family::default()
    });
    let program = check(&graph, &weights);
    assert_eq!(outline(&program).matches("Mixture").count(), 2);
}

#[test]
fn an_encoder_takes_in_its_residuals() {
    let (graph, weights) = encoder();
    let program = check(&graph, &weights);
    let layer = "Linear RopeAppend Attention Linear+ Norm Linear Activate Linear+ Norm";
    let expected = format!("Embedding*3 Add AddNorm {layer} {layer} MeanPool L2Normalise");
    assert_eq!(outline(&program), expected);
}

#[test]
fn overlapping_slices_are_not_added_in_place() {
    let mut b = Build::default();
    let x = b.embedding("embed", VOCABULARY, EmbeddingIndex::Tokens);
    let mut slice = |start| b.push(Op::Slice { x, start, length: 20 });
    let (left, right) = (slice(0), slice(4));
    let sum = b.add(left, right);
    let x = b.linear(sum, "out", WIDTH, 20, false);
    let x = b.push(Op::OutputRows { x });
    let logits = b.logits(x, "embed");
    let (graph, weights) = b.finish(logits);
    check(&graph, &weights);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn any_graph_computes_the_same_lowered(choices in proptest::collection::vec(any::<[u16; 4]>(), 1..28)) {
        let (graph, weights) = arbitrary(&choices);
        check(&graph, &weights);
    }
}
