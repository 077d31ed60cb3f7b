//! What a caller asks of the engine and what it hears back. Knows nothing of scheduling, devices or HTTP.

use std::time::Duration;

use galerne_core::grammar::{GrammarError, GrammarSession};
use galerne_core::guest::{GuestError, SamplerSession};
use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::sampling::TokenLogprobs;
use galerne_core::sampling::{PlanError, SamplingPlan};
use galerne_kernels::device::DeviceError;

/// One sequence to be completed.
pub struct Request {
    /// Whose it is; part of every cache key.
    pub tenant: TenantId,
    /// The tenant's secret, the first link of every prefix key.
    pub salt: TenantSalt,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Most output tokens. What the context window or the whole KV pool still holds may be less.
    pub tokens_max: u32,
    /// Tokens that end the output (end of sequence, end of turn). The one that came is still sent and counted.
    pub stop_tokens: Vec<TokenId>,
    /// Whether `stop_tokens` do not end the output.
    pub ignore_eos: bool,
    /// What decides each token.
    pub sampling: Sampling,
    /// What the whole output must match, if anything. Where nothing can follow it ends the output, also under
    /// `ignore_eos`.
    pub grammar: Option<Box<dyn GrammarSession>>,
    /// Decides every draw together with the position in the output: equal requests give equal outputs.
    pub seed: u64,
    /// If set, each token comes with its log-probability and those of so many most likely tokens.
    pub logprobs: Option<u32>,
    /// Whether KV blocks of equal prefixes of this tenant are used and left for others.
    pub use_prefix_cache: bool,
}

/// What decides each token of a sequence.
pub enum Sampling {
    /// One plan for the whole output. `candidates` must be 0 (there is nobody to choose); `valid_steps` is ignored.
    Plan(SamplingPlan),
    /// A guest that is asked for plans while the forward pass runs.
    Guest(Box<dyn SamplerSession>),
}

/// What a sequence's owner hears. `Finished` or `Failed` is always the last event and comes exactly once,
/// also after a cancellation.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The next output token; the stop token too.
    Token {
        /// The token.
        token: TokenId,
        /// If the request asked for them. Where a guest chose among candidates they are the candidates' own
        /// (temperature-scaled, penalised) log-probabilities.
        logprobs: Option<TokenLogprobs>,
    },
    /// The output is complete.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// The output cannot be completed.
    Failed(SequenceError),
}

/// Why an output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// `tokens_max`, the context window or the KV pool is full.
    Length,
    /// The caller cancelled.
    Cancelled,
}

/// What a sequence took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, found in the prefix cache when the sequence was first admitted.
    pub cached_tokens: u32,
    /// Output tokens, the stop token included.
    pub completion_tokens: u32,
    /// Tokens computed because a plan proposed them.
    pub proposed_tokens: u32,
    /// Of these, drawn: they are output tokens too.
    pub accepted_tokens: u32,
    /// From submission to first admission.
    pub queue: Duration,
    /// From submission to the first output token, if there was one.
    pub first_token: Option<Duration>,
    /// From submission to the end.
    pub total: Duration,
    /// Times the sequence gave up its blocks and was computed again.
    pub preemptions: u32,
    /// Steps its output sat out because a guest was late.
    pub sat_out_steps: u32,
}

/// Why one sequence failed. Others go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SequenceError {
    /// The sampling guest failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The sampling guest's plan cannot be executed.
    #[error("sampling guest: {0}")]
    Plan(#[from] PlanError),
    /// The sampling guest chose a candidate that was not shown.
    #[error("sampling guest: choice must be below {candidates}, got {choice}")]
    Choice {
        /// How many candidates it was shown.
        candidates: usize,
        /// The index it returned.
        choice: usize,
    },
    /// The output cannot be kept to its grammar.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    /// The device failed while this sequence was in its step.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The engine stopped before the output was complete.
    #[error("the engine stopped before the output was complete; send the request again")]
    EngineStopped,
}

/// Where a sequence's events go. Dropped after the last one.
pub trait EventSink: Send {
    /// Takes an event. Called on the engine's thread between steps: must not block.
    fn send(&self, event: Event);
}

impl<F: Fn(Event) + Send> EventSink for F {
    fn send(&self, event: Event) {
        self(event);
    }
}

/// Why a request was refused. Nothing was queued, no event will come.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// As many sequences wait as may.
    #[error("submit: {waiting} sequences are waiting; try again in {retry_after_ms} ms")]
    QueueFull {
        /// Sequences waiting.
        waiting: usize,
        /// An estimate of when there is room.
        retry_after_ms: u64,
    },
    /// There is nothing to continue.
    #[error("submit: expected at least one prompt token, got none")]
    EmptyPrompt,
    /// The prompt leaves no room in the context window.
    #[error("submit: prompt has {tokens} tokens, expected at most {max}; shorten it")]
    PromptTooLong {
        /// Its length.
        tokens: usize,
        /// The longest that leaves room for one output token.
        max: usize,
    },
    /// The prompt is larger than the whole KV pool.
    #[error(
        "submit: prompt needs {blocks_needed} KV blocks, the pool has {blocks}; shorten it or give the KV cache more memory (--kv-memory)"
    )]
    NeverFits {
        /// Blocks the prompt needs.
        blocks_needed: usize,
        /// Blocks there are.
        blocks: usize,
    },
    /// A prompt token is outside the vocabulary.
    #[error(
        "submit: token {token} at prompt position {position} is not in the vocabulary of {vocabulary} tokens"
    )]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Where it stands.
        position: usize,
        /// Entries of the vocabulary.
        vocabulary: u32,
    },
    /// No output is allowed.
    #[error("submit: tokens_max must be at least 1, got 0")]
    NoOutput,
    /// The sampling plan cannot be executed.
    #[error("submit: {0}")]
    Plan(#[from] PlanError),
    /// The engine takes no more requests.
    #[error("submit: the engine is shutting down")]
    ShuttingDown,
}
