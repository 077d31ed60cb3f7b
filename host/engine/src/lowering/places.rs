//! Where values lie, and whether a value may be overwritten. Knows nothing of ops.

use galerne_core::graph::Rows;
use galerne_core::ids::NodeId;
use galerne_kernels::program::{BufferId, BufferSpec, View};

/// The place of a node that has none yet.
pub(super) const NOWHERE: View = View {
    buffer: BufferId(u32::MAX),
    start: 0,
    width: 0,
};

/// Views of values in buffers, and how often each value will still be read.
pub(super) struct Places {
    views: Vec<View>,
    /// Reads not yet emitted.
    reads: Vec<u32>,
    pub(super) buffers: Vec<BufferSpec>,
    /// Nodes that lie in each buffer and may still be read.
    tenants: Vec<Vec<NodeId>>,
}

impl Places {
    pub(super) fn new(reads: Vec<u32>) -> Self {
        Self {
            views: vec![NOWHERE; reads.len()],
            reads,
            buffers: Vec::new(),
            tenants: Vec::new(),
        }
    }

    /// Whether a node is read by anything not yet emitted.
    pub(super) fn is_read(&self, node: NodeId) -> bool {
        self.reads[node.index()] > 0
    }

    /// Whether a node has a place.
    pub(super) fn is_placed(&self, node: NodeId) -> bool {
        self.views[node.index()] != NOWHERE
    }

    /// Where a node's value lies.
    pub(super) fn view(&self, node: NodeId) -> View {
        let view = self.views[node.index()];
        assert!(view != NOWHERE, "node {node} is read before it is computed");
        view
    }

    /// Counts one read of a node as emitted; where its value lies.
    pub(super) fn read(&mut self, node: NodeId) -> View {
        self.forget_read(node);
        self.view(node)
    }

    /// Counts one read of a node that has no place of its own because its reader computes it.
    pub(super) fn forget_read(&mut self, node: NodeId) {
        self.reads[node.index()] -= 1;
    }

    /// Says where a node's value lies.
    pub(super) fn place(&mut self, node: NodeId, view: View) {
        self.views[node.index()] = view;
        self.tenants[view.buffer.index()].push(node);
    }

    /// A new buffer.
    pub(super) fn fresh(&mut self, rows: Rows, width: u32) -> View {
        // A graph has at most u32::MAX nodes and each makes at most a few buffers of its own.
        let buffer = BufferId(u32::try_from(self.buffers.len()).expect("fewer than 2^32 buffers"));
        self.buffers.push(BufferSpec { rows, width });
        self.tenants.push(Vec::new());
        View {
            buffer,
            start: 0,
            width,
        }
    }

    /// Whether no value that lies there, wholly or in part, is still to be read.
    pub(super) fn is_dead(&mut self, view: View) -> bool {
        let (reads, views) = (&self.reads, &self.views);
        let tenants = &mut self.tenants[view.buffer.index()];
        // Dead nodes never come back: forgetting them keeps long residual streams cheap.
        tenants.retain(|node| reads[node.index()] > 0);
        tenants.iter().all(|node| !overlap(views[node.index()], view))
    }
}

/// Whether two views share an element.
pub(super) fn overlap(a: View, b: View) -> bool {
    a.buffer == b.buffer && a.start < b.start + b.width && b.start < a.start + a.width
}

/// Whether an elementwise op may write over `out` while it also reads `other`.
pub(super) fn elementwise_safe(out: View, other: View) -> bool {
    out == other || !overlap(out, other)
}
