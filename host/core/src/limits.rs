//! Every limit of the host, with its default. One owner for each number.

mod allowance;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use allowance::{Allowance, HostLimits};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A tool's call, without what it waits for capabilities.
    pub tool_deadline: Duration,
    /// What one call may wait for capabilities (`http`, `kv`, `secrets`) on top of its own deadline.
    pub wait_max: Duration,
    /// A pipeline's own work on one request, without what it waits.
    pub pipeline_deadline: Duration,
    /// What a pipeline may wait for the model, tools and capabilities in one request.
    pub pipeline_wait_max: Duration,
    /// Functions one tool guest may list.
    pub tools_max: usize,
    /// Descriptions and schemas of all functions a tool guest lists.
    pub tools_bytes_max: usize,
    /// A tool's answer to one call.
    pub tool_answer_bytes_max: usize,
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
            tool_deadline: Duration::from_secs(2),
            wait_max: Duration::from_secs(30),
            pipeline_deadline: Duration::from_secs(5),
            pipeline_wait_max: Duration::from_secs(600),
            tools_max: 64,
            tools_bytes_max: 256 << 10,
            tool_answer_bytes_max: 256 << 10,
            build_deadline: Duration::from_secs(5),
            component_bytes_max: 32 << 20,
        }
    }
}

/// Bounds on what one request's pipeline does with the model. A request beyond one of them ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipelineLimits {
    /// Contexts at once.
    pub contexts_max: usize,
    /// Forks between a context and the one it all began with.
    pub fork_depth_max: u32,
    /// Generations at once.
    pub generations_max: usize,
    /// KV blocks that the generations of a moment may fill, counted as if none shared any.
    pub blocks_max: usize,
    /// Output tokens in all.
    pub tokens_max: u32,
    /// Time the host may work for one request's contexts: making tokens, compiling grammars.
    pub work_max: Duration,
    /// Bytes of one text that is to become tokens; of a conversation, all its messages and functions together.
    pub text_bytes_max: usize,
    /// Bytes emitted, events included.
    pub emitted_bytes_max: usize,
    /// Bytes of one event.
    pub event_bytes_max: usize,
}

impl Default for PipelineLimits {
    fn default() -> Self {
        Self {
            contexts_max: 32,
            fork_depth_max: 16,
            generations_max: 32,
            blocks_max: 512,
            tokens_max: 16_384,
            work_max: Duration::from_secs(2),
            text_bytes_max: 1 << 20,
            emitted_bytes_max: 8 << 20,
            event_bytes_max: 64 << 10,
        }
    }
}

/// Bounds on the grammar of one answer. They bound time too: the work of a compilation or of one token is counted, not
/// timed, so that a busy machine refuses nothing it would take otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrammarLimits {
    /// Bytes of its source.
    pub source_bytes_max: usize,
    /// Brackets open at once in its source.
    pub nesting_max: usize,
    /// Symbols of its rules once compiled.
    pub symbols_max: usize,
    /// Work on its terminals when it is compiled; about 20 ns each.
    pub start_fuel: u64,
    /// Work on its terminals for one token; about 70 ns each.
    pub step_fuel: u64,
    /// Parser items made for one token; about 50 ns each.
    pub step_items_max: usize,
    /// Parser items after one byte: how ambiguous it may be.
    pub items_max: usize,
    /// States of its lexer, made as they are needed; 1 to 2 KB each.
    pub lexer_states_max: usize,
    /// Grammars a sampling guest may compile for one sequence. Each has its share of
    /// [`lexer_states_max`](Self::lexer_states_max).
    pub compiled_max: u32,
    /// Grammars a sampling guest may hold for one sequence at once, forks among them.
    pub held_max: usize,
    /// Tokens a sampling guest may give a grammar in one call.
    pub accepted_tokens_max: usize,
}

impl Default for GrammarLimits {
    fn default() -> Self {
        Self {
            source_bytes_max: 128 << 10,
            nesting_max: 128,
            symbols_max: 500_000,
            start_fuel: 1_000_000,
            step_fuel: 200_000,
            step_items_max: 50_000,
            items_max: 2_000,
            lexer_states_max: 32_768,
            compiled_max: 8,
            held_max: 16,
            accepted_tokens_max: 64,
        }
    }
}

/// Bounds on the process that compiles one component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompileLimits {
    /// From its start to its last byte.
    pub wall: Duration,
    /// CPU time of all its threads together; whole seconds count.
    pub cpu: Duration,
    /// Private memory it may write.
    pub memory_bytes_max: u64,
    /// Bytes of compiled code.
    pub artifact_bytes_max: usize,
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(60),
            cpu: Duration::from_secs(120),
            memory_bytes_max: 4 << 30,
            artifact_bytes_max: 256 << 20,
        }
    }
}

/// Bounds on a cell, the process that runs a tenant's guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellLimits {
    /// Private memory it may write, all its guests together.
    pub memory_bytes_max: u64,
    /// Bytes of one message to or from it, besides compiled code.
    pub message_bytes_max: usize,
    /// How long past a call's own deadline it may be silent before it is ended.
    pub slack: Duration,
    /// Wait before it is started again after its first failure; doubles with every further one.
    pub restart_min: Duration,
    /// The longest such wait.
    pub restart_max: Duration,
}

impl Default for CellLimits {
    fn default() -> Self {
        Self {
            memory_bytes_max: 8 << 30,
            message_bytes_max: 32 << 20,
            // One that stands back on a busy machine is slow to notice that a call's time is over.
            slack: Duration::from_secs(5),
            restart_min: Duration::from_millis(50),
            restart_max: Duration::from_secs(10),
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
    /// Guesses of a plan that one sequence computes in one step; with 0 none is ever computed.
    pub guesses_max: usize,
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
            guesses_max: 16,
        }
    }
}

/// Bounds on what guests do outside themselves, through capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityLimits {
    /// One line of a guest's log; what is longer is cut.
    pub log_line_bytes_max: usize,
    /// Log lines of one request; a request beyond it ends.
    pub log_request_bytes_max: usize,
    /// Log lines of one deployment in a second; what is more is dropped and counted.
    pub log_lines_per_second_max: u32,
    /// Newest log lines kept in memory for one deployment.
    pub log_lines_kept_max: usize,
    /// HTTP calls of one request.
    pub http_calls_max: u32,
    /// Body and headers of one HTTP request.
    pub http_request_bytes_max: usize,
    /// Body of one HTTP response.
    pub http_response_bytes_max: usize,
    /// One HTTP call from the look-up of its name to the last byte of its answer, redirects included.
    pub http_time_max: Duration,
    /// Redirects of one HTTP call.
    pub http_redirects_max: u32,
    /// A tenant's key-value store.
    pub kv: KvLimits,
    /// A secret's value.
    pub secret_bytes_max: usize,
}

impl Default for CapabilityLimits {
    fn default() -> Self {
        Self {
            log_line_bytes_max: 4 << 10,
            log_request_bytes_max: 256 << 10,
            log_lines_per_second_max: 100,
            log_lines_kept_max: 1_000,
            http_calls_max: 16,
            http_request_bytes_max: 1 << 20,
            http_response_bytes_max: 4 << 20,
            http_time_max: Duration::from_secs(10),
            http_redirects_max: 4,
            kv: KvLimits::default(),
            secret_bytes_max: 64 << 10,
        }
    }
}

/// Bounds on a tenant's key-value store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvLimits {
    /// Bytes of one key.
    pub key_bytes_max: usize,
    /// Bytes of one value.
    pub value_bytes_max: usize,
    /// Keys of one tenant.
    pub keys_max: u64,
    /// Keys and values of one tenant.
    pub tenant_bytes_max: u64,
    /// Keys one `list` gives.
    pub listed_max: usize,
}

impl Default for KvLimits {
    fn default() -> Self {
        Self {
            key_bytes_max: 512,
            value_bytes_max: 256 << 10,
            keys_max: 100_000,
            tenant_bytes_max: 64 << 20,
            listed_max: 1_000,
        }
    }
}
