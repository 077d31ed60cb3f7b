//! Lowering: a validated graph becomes a program for a device. Knows nothing of a device's kernels or of weights'
//! bytes.
//!
//! What it fuses: linears over one input (QKV, gate-up) into one weight; a linear whose result is added to a
//! residual into an accumulating linear; residual add and norm; rope and KV append; activation and product.
//! Everything else takes the generic path, one instruction per node. `select` decides what may be
//! fused, `emit` walks the graph and writes instructions over buffers of their own, `places` says when a value
//! may be overwritten, `reuse` lets buffers whose lives do not meet be one.

mod emit;
mod places;
mod reuse;
mod select;
mod tables;

use galerne_core::graph::Op;
use galerne_core::ids::NodeId;
use galerne_core::validate::ValidGraph;
use galerne_kernels::program::{AttentionLayer, Program};

/// Why a valid graph has no program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// A fused row would be wider than a view can say.
    #[error("lower {op} (node {node}): expected a row of at most {max} elements, got {got}", max = u32::MAX)]
    TooWide {
        /// The op's name in the contract.
        op: &'static str,
        /// Its position in the graph.
        node: NodeId,
        /// Elements in the row.
        got: u64,
    },
    /// The gate that made the graph valid did not keep the shape of a matrix: a host bug.
    #[error(
        "lower: expected the shape of weight \"{weight}\" in the validated graph, got none; this is a bug in galerne"
    )]
    UnknownMatrix {
        /// The weight's name.
        weight: String,
    },
}

/// Lowers a graph.
///
/// # Errors
/// See [`LowerError`]; a graph within the default limits never meets one.
pub fn lower(graph: &ValidGraph) -> Result<Program, LowerError> {
    let selection = select::Selection::new(graph);
    let mut program = emit::Emitter::new(graph, selection).run()?;
    reuse::reuse_buffers(&mut program);
    Ok(program)
}

/// A program without instructions, with what the graph says directly.
fn empty_program(graph: &ValidGraph) -> Program {
    let layers = graph.layers().iter().map(|layer| AttentionLayer {
        heads: layer.heads,
        kv_heads: layer.kv_heads,
        head_width: layer.head_width,
        scale: layer.scale,
        causal: layer.causal,
        sliding_window: layer.sliding_window,
        soft_cap: layer.soft_cap,
    });
    Program {
        instrs: Vec::new(),
        buffers: Vec::new(),
        weights: Vec::new(),
        ropes: Vec::new(),
        layers: layers.collect(),
        // Replaced when all nodes have places.
        output: places::NOWHERE,
        context_tokens_max: graph.graph().context_tokens_max,
    }
}

/// The op of a node.
fn op(graph: &ValidGraph, node: NodeId) -> &Op {
    &graph.graph().nodes[node.index()]
}
