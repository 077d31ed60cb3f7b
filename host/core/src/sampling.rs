//! What decides the next token: a plan the device executes, and the candidates a guest may choose from.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::ids::TokenId;

/// How the next token of one sequence is drawn. Executed by the host on the logits, in this order: bias,
/// repetition, frequency and presence penalties, temperature, then top-k, top-p and min-p; or a forced token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingPlan {
    /// 0 takes the most likely token; above 0 logits are divided by it.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all (Holtzman et al. 2019).
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the best; 0 keeps all (Nguyen et al. 2024).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt and output; 1 is off (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted if the token is in the output.
    pub presence_penalty: f32,
    /// Added to these tokens' logits, before anything else.
    pub bias: Vec<(TokenId, f32)>,
    /// If not empty these tokens come next, in order, whatever the logits say.
    pub forced: Vec<TokenId>,
    /// What the guest believes comes next, in order, beginning with the token that this plan draws first: entry `i` is its
    /// guess for the output position [`PlanStep::position`](crate::guest::PlanStep::position)` + i`. Guesses never change what
    /// is drawn, only how many tokens a step draws: the engine computes them in the same step, draws at each by this plan
    /// as if the step before had ended there, and keeps the draws up to the first that was not guessed, or the one behind
    /// the last guess.
    ///
    /// With that token a plan that proposes ends, whatever `valid_steps` above that says, and the next is asked for at
    /// once: an answer within the engine's grace, which is some hundred microseconds, is in time for the next step, so that
    /// guesses may depend on the token just drawn. A later one, like the first, comes while a step draws one token; if that
    /// is the first guess, the others are used in the next step. All these draws are this plan's, so `valid_steps` is 0 or
    /// more than the number of guesses. Who has nothing to propose leaves this empty and sets `valid_steps` to 1.
    ///
    /// Ignored where the plan forces tokens, asks for candidates or has penalties; under a grammar no guess is computed.
    pub proposed: Vec<TokenId>,
    /// Tokens this plan draws before the guest is asked again; 0 means until the end.
    pub valid_steps: u32,
    /// If above 0 the host draws nothing and shows the guest so many of the most likely tokens after the
    /// filters above; the guest chooses.
    pub candidates: u32,
}

impl Default for SamplingPlan {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            bias: Vec::new(),
            forced: Vec::new(),
            proposed: Vec::new(),
            valid_steps: 0,
            candidates: 0,
        }
    }
}

/// A plan that cannot be executed, with the field that is wrong.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[error("sampling plan: {field} must be {expected}, got {got}")]
pub struct PlanError {
    /// The field of [`SamplingPlan`].
    pub field: Cow<'static, str>,
    /// What would be accepted.
    pub expected: Cow<'static, str>,
    /// What came.
    pub got: String,
}

impl SamplingPlan {
    /// Whether earlier tokens change the logits.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// What is proposed; nothing where `proposed` is ignored.
    #[must_use]
    pub fn guesses(&self) -> &[TokenId] {
        let is_plain = self.forced.is_empty() && self.candidates == 0 && !self.has_penalties();
        if is_plain { &self.proposed } else { &[] }
    }

    /// Checks every number against its range, for a vocabulary of `vocabulary` tokens.
    ///
    /// # Errors
    /// The first field out of range.
    pub fn check(&self, vocabulary: u32, candidates_max: usize) -> Result<(), PlanError> {
        let range = |field: &'static str, value: f32, low: f32, high: f32, expected: &'static str| {
            if value.is_finite() && (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(PlanError {
                    field: field.into(),
                    expected: expected.into(),
                    got: value.to_string(),
                })
            }
        };
        range("temperature", self.temperature, 0.0, 100.0, "from 0 to 100")?;
        range("top_p", self.top_p, 0.0, 1.0, "from 0 to 1")?;
        range("min_p", self.min_p, 0.0, 1.0, "from 0 to 1")?;
        range(
            "repetition_penalty",
            self.repetition_penalty,
            0.01,
            100.0,
            "from 0.01 to 100",
        )?;
        range(
            "frequency_penalty",
            self.frequency_penalty,
            -100.0,
            100.0,
            "from -100 to 100",
        )?;
        range(
            "presence_penalty",
            self.presence_penalty,
            -100.0,
            100.0,
            "from -100 to 100",
        )?;
        for (token, bias) in &self.bias {
            range("bias", *bias, -1e9, 1e9, "finite")?;
            check_token("bias", *token, vocabulary)?;
        }
        if self.bias.len() > vocabulary as usize {
            return Err(PlanError {
                field: "bias".into(),
                expected: "at most one entry per token".into(),
                got: self.bias.len().to_string(),
            });
        }
        check_tokens("forced", &self.forced, vocabulary)?;
        check_tokens("proposed", &self.proposed, vocabulary)?;
        if self.candidates as usize > candidates_max {
            return Err(PlanError {
                field: "candidates".into(),
                expected: "within the host's limit".into(),
                got: self.candidates.to_string(),
            });
        }
        Ok(())
    }
}

fn check_tokens(field: &'static str, tokens: &[TokenId], vocabulary: u32) -> Result<(), PlanError> {
    if tokens.len() > 4_096 {
        return Err(PlanError {
            field: field.into(),
            expected: "at most 4096 tokens".into(),
            got: tokens.len().to_string(),
        });
    }
    tokens
        .iter()
        .try_for_each(|token| check_token(field, *token, vocabulary))
}

fn check_token(field: &'static str, token: TokenId, vocabulary: u32) -> Result<(), PlanError> {
    if token.0 < vocabulary {
        Ok(())
    } else {
        Err(PlanError {
            field: field.into(),
            expected: "tokens of the vocabulary".into(),
            got: token.to_string(),
        })
    }
}

/// A token and its log-probability under the whole (temperature-scaled, penalised) distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// Log-probabilities under the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the drawn token.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<Candidate>,
}
