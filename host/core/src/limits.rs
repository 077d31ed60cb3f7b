//! Every limit of the host, with its default. One owner for each number.

use std::time::Duration;

/// Bounds on a graph from a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphLimits {
    /// Nodes in one graph.
    pub nodes_max: usize,
    /// Elements in one row of any value.
    pub row_elements_max: u64,
    /// Elements in one row of every value of a graph together: what a step may need per token.
    pub graph_elements_max: u64,
    /// Bytes of a weight name.
    pub name_bytes_max: usize,
    /// Inputs of one concat, experts of one mixture.
    pub parts_max: usize,
    /// Tokens of one sequence.
    pub context_tokens_max: u32,
    /// Vocabulary entries.
    pub vocabulary_max: u64,
}

impl Default for GraphLimits {
    fn default() -> Self {
        Self {
            nodes_max: 65_536,
            row_elements_max: 1 << 20,
            graph_elements_max: 1 << 27,
            name_bytes_max: 256,
            parts_max: 1_024,
            context_tokens_max: 1 << 20,
            vocabulary_max: 1 << 20,
        }
    }
}

/// Bounds on one guest instance and its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestLimits {
    /// Linear memory of one instance.
    pub memory_bytes_max: usize,
    /// Elements of each table.
    pub table_elements_max: usize,
    /// Live resource handles.
    pub handles_max: usize,
    /// Host memory one call may cause to be allocated by the values it passes.
    pub call_alloc_bytes_max: usize,
    /// Text a filter may hold back in one request, all channels together.
    pub held_bytes_max: usize,
    /// Text a filter may let out in one request, all channels together.
    pub filtered_bytes_max: usize,
    /// A per-token call (`plan`, `choose`, a parser's `push`, a filter's `on-text` and `finish`).
    pub step_deadline: Duration,
    /// A per-request call (`render`, creating a session, a filter's `on-request`).
    pub request_deadline: Duration,
    /// A per-model call (`build`).
    pub build_deadline: Duration,
    /// Bytes of a component file.
    pub component_bytes_max: usize,
}

impl Default for GuestLimits {
    fn default() -> Self {
        Self {
            memory_bytes_max: 64 << 20,
            table_elements_max: 10_000,
            handles_max: 64,
            call_alloc_bytes_max: 16 << 20,
            held_bytes_max: 64 << 10,
            filtered_bytes_max: 8 << 20,
            step_deadline: Duration::from_millis(100),
            request_deadline: Duration::from_millis(500),
            build_deadline: Duration::from_secs(5),
            component_bytes_max: 32 << 20,
        }
    }
}

/// Bounds of the engine's queues and steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Tokens in one step, prefill and decode together.
    pub step_tokens_max: usize,
    /// Sequences running at once.
    pub sequences_max: usize,
    /// Sequences waiting.
    pub queue_max: usize,
    /// Tokens in one KV block.
    pub block_tokens: usize,
    /// KV blocks in the pool.
    pub blocks: usize,
    /// Candidates a guest may ask to see.
    pub candidates_max: usize,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            step_tokens_max: 256,
            sequences_max: 64,
            queue_max: 256,
            block_tokens: 16,
            blocks: 4_096,
            candidates_max: 256,
        }
    }
}
