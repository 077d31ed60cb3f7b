//! Which nodes are computed at all, who reads them, and which could be fused into which. Decides nothing that
//! depends on where values lie.

use std::collections::HashMap;

use galerne_core::graph::Op;
use galerne_core::ids::NodeId;
use galerne_core::validate::ValidGraph;

use super::op;

/// The facts the emitter works from, indexed by node.
pub(super) struct Selection {
    /// Reads not yet emitted; 0 for nodes the output does not depend on.
    pub(super) reads: Vec<u32>,
    /// Computed by their only reader, not where they stand: activations of a product, linears added to
    /// something, ropes of an attention.
    pub(super) deferred: Vec<bool>,
    /// Linears computed as one, by each member.
    pub(super) groups: HashMap<NodeId, Vec<NodeId>>,
    /// The norm that may be computed together with an add.
    pub(super) norms: HashMap<NodeId, NodeId>,
}

impl Selection {
    pub(super) fn new(graph: &ValidGraph) -> Self {
        let readers = readers(graph);
        let reads = reads(graph, &readers);
        let groups = groups(graph, &reads);
        let mut selection = Self {
            deferred: vec![false; reads.len()],
            reads,
            groups,
            norms: HashMap::new(),
        };
        for node in nodes(graph) {
            if selection.reads[node.index()] > 0 {
                selection.select(graph, &readers, node);
            }
        }
        selection
    }

    /// What `node` may take in.
    fn select(&mut self, graph: &ValidGraph, readers: &[Vec<NodeId>], node: NodeId) {
        match op(graph, node) {
            Op::Mul { a, b } => {
                let activation = |n: &NodeId| matches!(op(graph, *n), Op::Activate { .. });
                self.defer_one([*a, *b], activation);
            }
            Op::Add { a, b } => {
                let groups = &self.groups;
                let linear =
                    |n: &NodeId| matches!(op(graph, *n), Op::Linear { .. }) && !groups.contains_key(n);
                // The later one: the other operand is then there when it is computed.
                let last_first = if a < b { [*b, *a] } else { [*a, *b] };
                let absorbed = last_first
                    .into_iter()
                    .find(|n| linear(n) && self.reads[n.index()] == 1);
                if let Some(linear) = absorbed {
                    self.deferred[linear.index()] = true;
                } else if let Some(norm) = readers[node.index()].iter().find(|n| is_row_norm(graph, **n)) {
                    self.norms.insert(node, *norm);
                }
            }
            Op::Attention { q, k, .. } => {
                for input in [*q, *k] {
                    if matches!(op(graph, input), Op::Rope { .. }) && self.reads[input.index()] == 1 {
                        self.deferred[input.index()] = true;
                    }
                }
            }
            _ => {}
        }
    }

    fn defer_one(&mut self, inputs: [NodeId; 2], wanted: impl Fn(&NodeId) -> bool) {
        if let Some(input) = inputs
            .into_iter()
            .find(|n| wanted(n) && self.reads[n.index()] == 1)
        {
            self.deferred[input.index()] = true;
        }
    }
}

fn nodes(graph: &ValidGraph) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
    (0..u32::try_from(graph.graph().nodes.len()).unwrap_or(u32::MAX)).map(NodeId)
}

/// A norm over whole rows.
fn is_row_norm(graph: &ValidGraph, node: NodeId) -> bool {
    let norm = matches!(op(graph, node), Op::RmsNorm { .. } | Op::LayerNorm { .. });
    norm && graph.shape(node).heads == 1
}

/// The nodes that read each node, in graph order; only those the output depends on.
fn readers(graph: &ValidGraph) -> Vec<Vec<NodeId>> {
    let mut readers = vec![Vec::new(); graph.graph().nodes.len()];
    for node in nodes(graph).rev() {
        if node == graph.graph().output || !readers[node.index()].is_empty() {
            for input in op(graph, node).inputs() {
                readers[input.index()].push(node);
            }
        }
    }
    readers
        .iter_mut()
        .for_each(|list: &mut Vec<NodeId>| list.reverse());
    readers
}

/// Reads per node; the output is read once more, by the caller, after everything else.
fn reads(graph: &ValidGraph, readers: &[Vec<NodeId>]) -> Vec<u32> {
    let mut reads: Vec<u32> = readers
        .iter()
        .map(|list| u32::try_from(list.len()).unwrap_or(u32::MAX))
        .collect();
    reads[graph.graph().output.index()] += 1;
    reads
}

/// Linears over one input, all with or all without bias. A weight that is named elsewhere too stays alone: joined
/// it would be held twice.
fn groups(graph: &ValidGraph, reads: &[u32]) -> HashMap<NodeId, Vec<NodeId>> {
    let mut names: HashMap<&str, u32> = HashMap::new();
    let live: Vec<_> = nodes(graph).filter(|node| reads[node.index()] > 0).collect();
    for node in &live {
        if let Op::Linear { weight, .. } | Op::Logits { weight, .. } | Op::Embedding { weight, .. } =
            op(graph, *node)
        {
            *names.entry(weight).or_default() += 1;
        }
    }
    let mut families: HashMap<(NodeId, bool), Vec<NodeId>> = HashMap::new();
    for node in live {
        if let Op::Linear { x, weight, bias } = op(graph, node)
            && names[weight.as_str()] == 1
        {
            families.entry((*x, bias.is_some())).or_default().push(node);
        }
    }
    let mut groups = HashMap::new();
    for members in families.into_values().filter(|members| members.len() > 1) {
        for member in &members {
            groups.insert(*member, members.clone());
        }
    }
    groups
}
