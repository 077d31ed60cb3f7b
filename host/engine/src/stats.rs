//! Numbers the engine publishes and the errors of its self-check. Knows no metric format.

/// A snapshot taken between steps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences that hold a place in the batch.
    pub running: usize,
    /// Sequences that wait for one, preempted ones included.
    pub waiting: usize,
    /// KV blocks in the pool.
    pub blocks_total: usize,
    /// KV blocks no sequence holds, `blocks_cached` included.
    pub blocks_free: usize,
    /// Free KV blocks that the prefix index still knows.
    pub blocks_cached: usize,
    /// KV blocks held by sequences.
    pub blocks_used: usize,
    /// Steps run.
    pub steps: u64,
    /// Of these, submitted before the tokens of the step before were known.
    pub steps_ahead: u64,
    /// Times a sequence gave up its blocks to be computed again.
    pub preemptions: u64,
    /// Prompt tokens computed, recomputation after a preemption included.
    pub tokens_prefilled: u64,
    /// Output tokens.
    pub tokens_decoded: u64,
    /// Tokens computed because a plan proposed them.
    pub tokens_proposed: u64,
    /// Of these, drawn.
    pub tokens_accepted: u64,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hit_tokens: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_query_tokens: u64,
    /// Times a sequence sat out a step because its guest was late.
    pub sat_out_steps: u64,
    /// Sequences that ended, for whatever reason.
    pub sequences_ended: u64,
    /// What the self-check last found wrong, if ever.
    pub integrity: Option<IntegrityError>,
}

/// A broken invariant: a host bug.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("engine integrity: {what}: expected {expected}, got {got}; this is a bug in galerne")]
pub struct IntegrityError {
    /// The invariant.
    pub what: &'static str,
    /// What holds in a sound engine.
    pub expected: String,
    /// What was found.
    pub got: String,
}

impl IntegrityError {
    /// `Ok` if the two are equal.
    pub(crate) fn check<T: PartialEq + std::fmt::Debug>(
        what: &'static str,
        expected: &T,
        got: &T,
    ) -> Result<(), Self> {
        if expected == got {
            Ok(())
        } else {
            Err(Self {
                what,
                expected: format!("{expected:?}"),
                got: format!("{got:?}"),
            })
        }
    }
}
