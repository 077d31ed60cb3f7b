//! Whether a request can be served at all. Knows nothing of other sequences.

use galerne_core::limits::EngineLimits;
use galerne_core::sampling::PlanError;

use crate::request::{Request, Sampling, SubmitError};

/// What decides whether a request can be served at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Queues, steps and the KV pool.
    pub limits: EngineLimits,
    /// Entries of the model's vocabulary.
    pub vocabulary: u32,
    /// Largest number of tokens of one sequence the model can take.
    pub context_tokens_max: u32,
}

impl Admission {
    /// Prompt and output tokens one sequence can have. The last output token is never computed, so it needs no
    /// place in the pool.
    #[must_use]
    pub fn sequence_tokens_max(&self) -> u32 {
        let pool_tokens = self
            .limits
            .blocks
            .saturating_mul(self.limits.block_tokens)
            .saturating_add(1);
        self.context_tokens_max
            .min(u32::try_from(pool_tokens).unwrap_or(u32::MAX))
    }

    /// Checks everything about a request that does not depend on other sequences.
    ///
    /// # Errors
    /// Every variant of [`SubmitError`] but `QueueFull` and `ShuttingDown`.
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.tokens_max == 0 {
            return Err(SubmitError::NoOutput);
        }
        let max = (self.context_tokens_max as usize).saturating_sub(1);
        if tokens > max {
            return Err(SubmitError::PromptTooLong { tokens, max });
        }
        let blocks_needed = tokens.div_ceil(self.limits.block_tokens);
        if blocks_needed > self.limits.blocks {
            return Err(SubmitError::NeverFits {
                blocks_needed,
                blocks: self.limits.blocks,
            });
        }
        let vocabulary = self.vocabulary;
        if let Some(position) = request.prompt.iter().position(|token| token.0 >= vocabulary) {
            let token = request.prompt[position];
            return Err(SubmitError::UnknownToken {
                token,
                position,
                vocabulary,
            });
        }
        if let Sampling::Plan(plan) = &request.sampling {
            plan.check(vocabulary, self.limits.candidates_max)?;
            if plan.candidates > 0 {
                let got = plan.candidates.to_string();
                let expected = "0 without a sampling guest, who else would choose".into();
                return Err(PlanError {
                    field: "candidates".into(),
                    expected,
                    got,
                }
                .into());
            }
        }
        Ok(())
    }

    /// Output tokens that request, context and pool allow together; at least 1 once checked.
    pub(crate) fn output_tokens_max(&self, request: &Request) -> usize {
        let room = (self.sequence_tokens_max() as usize).saturating_sub(request.prompt.len());
        room.min(request.tokens_max as usize)
    }
}
