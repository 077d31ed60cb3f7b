//! Draws tokens from rows of logits as a sampling plan says. Knows nothing of sequences or guests.
//!
//! Logits that are not a number count as minus infinity: a broken row gives a poor token, never a panic.

use galerne_core::ids::TokenId;
use galerne_core::sampling::{Candidate, TokenLogprobs};

use super::isa::Isa;
use super::sampler_ladder::{Edge, Scale};
use super::sampler_mask::Packed;
use super::sampler_passes::{Clean, First, Largest, clean};
use super::sampler_prefix::Prefix;
use super::simd::dispatch;
use crate::device::{SampleOutcome, SampleRequest};

/// Draws tokens; keeps its room between calls.
#[derive(Debug)]
pub(crate) struct Sampler {
    isa: Isa,
    penalised: Vec<f32>,
    packed: Packed,
    prefix: Prefix,
    kept: Vec<TokenId>,
}

/// What is known of a row of logits on the way to a token.
#[derive(Clone, Copy)]
struct Row<'a> {
    /// After bias and penalties.
    logits: &'a [f32],
    scale: Scale,
}

impl Row<'_> {
    fn new(isa: Isa, logits: &[f32], temperature: f32) -> Row<'_> {
        Row {
            logits,
            scale: Scale {
                largest: largest(isa, logits).clamp(f32::MIN, f32::MAX),
                factor: (1.0 / temperature).min(f32::MAX),
            },
        }
    }

    /// The logarithm of a token's weight.
    fn log_weight(self, token: TokenId) -> f32 {
        (clean(self.logits[token.index()]) - self.scale.largest) * self.scale.factor
    }
}

impl Sampler {
    /// For rows of any length.
    pub(crate) fn new(isa: Isa) -> Self {
        Self {
            isa,
            penalised: Vec::new(),
            packed: Packed::default(),
            prefix: Prefix::new(isa),
            kept: Vec::new(),
        }
    }

    /// Serves one request from its row of raw logits.
    pub(crate) fn sample(&mut self, raw: &[f32], request: &SampleRequest<'_>) -> SampleOutcome {
        // Taken out, so that the row can be read while the rest of the sampler works.
        let mut room = std::mem::take(&mut self.penalised);
        let logits = if is_raw(request) {
            raw
        } else {
            penalise(self.isa, &mut room, raw, request);
            &room
        };
        let mut outcome = match request.mask {
            None => self.pick(logits, request),
            Some(mask) => self.pick_allowed(logits, mask, request),
        };
        self.penalised = room;
        if let SampleOutcome::Token { token, logprobs } = &mut outcome {
            *logprobs = request.logprobs.map(|top| self.logprobs(raw, *token, top));
        }
        outcome
    }

    /// Picks among the tokens of a mask.
    fn pick_allowed(&mut self, logits: &[f32], mask: &[u32], request: &SampleRequest<'_>) -> SampleOutcome {
        let mut packed = std::mem::take(&mut self.packed);
        packed.fill(logits, mask);
        let mut outcome = self.pick(packed.logits(), request);
        match &mut outcome {
            SampleOutcome::Token { token, .. } => *token = packed.token(mask, *token),
            SampleOutcome::Candidates(candidates) => {
                for candidate in candidates {
                    candidate.token = packed.token(mask, candidate.token);
                }
            }
        }
        self.packed = packed;
        outcome
    }

    /// The token or the candidates, without log-probabilities under the raw logits.
    fn pick(&mut self, logits: &[f32], request: &SampleRequest<'_>) -> SampleOutcome {
        let plan = request.plan;
        if plan.temperature > 0.0 {
            let row = Row::new(self.isa, logits, plan.temperature);
            if plan.candidates > 0 {
                return self.candidates(row, request);
            }
            return drawn(self.draw(row, request));
        }
        let token = argmax(self.isa, logits);
        if plan.candidates > 0 {
            // The limit of ever lower temperatures: all probability on one token.
            return SampleOutcome::Candidates(vec![Candidate { token, logprob: 0.0 }]);
        }
        drawn(token)
    }

    fn draw(&mut self, row: Row<'_>, request: &SampleRequest<'_>) -> TokenId {
        let plan = request.plan;
        if (1..row.logits.len()).contains(&(plan.top_k as usize)) {
            return self.draw_listed(row, request);
        }
        if plan.top_p >= 1.0 && plan.min_p <= 0.0 {
            self.prefix.weigh(row.logits, row.scale);
            return self.prefix.draw_by_id(request.uniform);
        }
        let floor = (plan.min_p > 0.0).then(|| min_p_floor(row, request));
        let whole = self.prefix.weigh(row.logits, row.scale);
        let mut mass = self.prefix.prepare(row.logits, floor);
        if plan.top_p < 1.0 {
            let target = f64::from(plan.top_p) * whole;
            // Nothing to look for where min-p has cut before.
            if target < mass {
                mass = mass.min(self.prefix.find(row.logits, target, Edge::Reaches).mass);
            }
        }
        let target = f64::from(request.uniform) * mass;
        self.prefix.find(row.logits, target, Edge::Passes).token
    }

    /// Draws among a few tokens.
    fn draw_listed(&mut self, row: Row<'_>, request: &SampleRequest<'_>) -> TokenId {
        self.keep(row, request);
        let weight = |token: &TokenId| f64::from(self.prefix.weight(*token));
        let mut left = f64::from(request.uniform) * self.kept.iter().map(weight).sum::<f64>();
        for token in &self.kept {
            left -= weight(token);
            if left < 0.0 {
                return *token;
            }
        }
        self.kept.last().copied().unwrap_or(TokenId(0))
    }

    fn candidates(&mut self, row: Row<'_>, request: &SampleRequest<'_>) -> SampleOutcome {
        let log_total = self.keep(row, request).ln() as f32;
        self.kept.truncate(request.plan.candidates as usize);
        let candidate = |&token: &TokenId| Candidate {
            token,
            logprob: row.log_weight(token) - log_total,
        };
        SampleOutcome::Candidates(self.kept.iter().map(candidate).collect())
    }

    /// Leaves the tokens that pass the filters in `kept`, most likely first, at least one and no more than the
    /// plan can use. Returns the weight of the whole row.
    fn keep(&mut self, row: Row<'_>, request: &SampleRequest<'_>) -> f64 {
        let plan = request.plan;
        let whole = self.prefix.weigh(row.logits, row.scale);
        let count = if plan.top_k > 0 {
            plan.top_k
        } else {
            plan.candidates
        };
        self.kept.clear();
        self.kept.extend(self.prefix.top(row.logits, count as usize));
        let weight = |token: &TokenId| f64::from(self.prefix.weight(*token));
        let mut mass_max = f64::INFINITY;
        if plan.top_p < 1.0 {
            let mass = if plan.top_k > 0 {
                self.kept.iter().map(weight).sum()
            } else {
                whole
            };
            mass_max = f64::from(plan.top_p) * mass;
        }
        let floor = if plan.min_p > 0.0 {
            min_p_floor(row, request)
        } else {
            f32::NEG_INFINITY
        };
        let mut seen = 0.0;
        let mut passes = |token: &TokenId| {
            let is_kept = seen < mass_max && clean(row.logits[token.index()]) >= floor;
            seen += weight(token);
            is_kept
        };
        let kept = self.kept.iter().take_while(|token| passes(token)).count();
        self.kept.truncate(kept.max(1));
        whole
    }

    fn logprobs(&mut self, raw: &[f32], token: TokenId, top: u32) -> TokenLogprobs {
        let row = Row::new(self.isa, raw, 1.0);
        let log_total = self.prefix.weigh(raw, row.scale).ln() as f32;
        let candidate = |token| Candidate {
            token,
            logprob: row.log_weight(token) - log_total,
        };
        TokenLogprobs {
            logprob: candidate(token).logprob,
            top: self.prefix.top(raw, top as usize).map(candidate).collect(),
        }
    }
}

fn drawn(token: TokenId) -> SampleOutcome {
    SampleOutcome::Token {
        token,
        logprobs: None,
    }
}

/// The logit from which tokens pass min-p.
fn min_p_floor(row: Row<'_>, request: &SampleRequest<'_>) -> f32 {
    row.scale.largest + request.plan.min_p.ln() / row.scale.factor
}

/// Copies the row and applies bias and penalties.
fn penalise(isa: Isa, logits: &mut Vec<f32>, raw: &[f32], request: &SampleRequest<'_>) {
    let plan = request.plan;
    logits.resize(raw.len(), 0.0);
    let pass = Clean {
        from: raw,
        to: logits,
    };
    // SAFETY: the instruction set is the device's; both slices have the same length.
    unsafe { dispatch(isa, pass) };
    for (token, bias) in &plan.bias {
        if let Some(logit) = logits.get_mut(token.index()) {
            *logit += bias;
        }
    }
    for count in request.seen {
        let Some(logit) = logits.get_mut(count.token.index()) else {
            continue;
        };
        if *logit > 0.0 {
            *logit /= plan.repetition_penalty;
        } else {
            *logit *= plan.repetition_penalty;
        }
        *logit -= plan.frequency_penalty * count.output as f32;
        if count.output > 0 {
            *logit -= plan.presence_penalty;
        }
    }
}

/// Whether the plan leaves the logits as they are before the temperature.
fn is_raw(request: &SampleRequest<'_>) -> bool {
    let plan = request.plan;
    let penalties =
        plan.repetition_penalty != 1.0 || plan.frequency_penalty != 0.0 || plan.presence_penalty != 0.0;
    plan.bias.is_empty() && (!penalties || request.seen.is_empty())
}

fn argmax(isa: Isa, logits: &[f32]) -> TokenId {
    let first = First {
        values: logits,
        floor: largest(isa, logits),
    };
    // SAFETY: the instruction set is the device's; the slice is valid.
    let found = unsafe { dispatch(isa, first) };
    TokenId(found.unwrap_or(0) as u32)
}

fn largest(isa: Isa, logits: &[f32]) -> f32 {
    // SAFETY: the instruction set is the device's; the slice is valid.
    unsafe { dispatch(isa, Largest(logits)) }
}
