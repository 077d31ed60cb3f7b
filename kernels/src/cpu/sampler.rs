//! Draws tokens from rows of logits as a sampling plan says. Knows nothing of sequences or guests.
//!
//! Logits that are not a number count as minus infinity: a broken row gives a poor token, never a panic.

use galerne_core::ids::TokenId;
use galerne_core::sampling::Candidate;

use super::isa::Isa;
use super::simd::{Kernel, Simd, dispatch, exp};
use super::weights::LANES;
use crate::device::{SampleOutcome, SampleRequest};
use galerne_core::sampling::TokenLogprobs;

/// Draws tokens; keeps its room between calls.
#[derive(Debug)]
pub(crate) struct Sampler {
    isa: Isa,
    logits: Vec<f32>,
    weights: Vec<f32>,
    pairs: Vec<(f32, u32)>,
}

/// A row after bias, penalties and temperature.
struct Scaled {
    largest: f32,
    /// Sum of `e^(logit - largest)`.
    total: f32,
}

impl Sampler {
    /// For rows of up to `vocabulary` logits.
    pub(crate) fn new(isa: Isa) -> Self {
        Self {
            isa,
            logits: Vec::new(),
            weights: Vec::new(),
            pairs: Vec::new(),
        }
    }

    /// Serves one request from its row of raw logits.
    pub(crate) fn sample(&mut self, raw: &[f32], request: &SampleRequest<'_>) -> SampleOutcome {
        let plan = request.plan;
        if plan.temperature == 0.0 {
            let token = if is_raw(request) {
                argmax(self.isa, raw)
            } else {
                self.penalise(raw, request);
                argmax(self.isa, &self.logits)
            };
            if plan.candidates > 0 {
                // The limit of ever lower temperatures: all probability on one token.
                return SampleOutcome::Candidates(vec![Candidate { token, logprob: 0.0 }]);
            }
            return self.token(raw, token, request.logprobs);
        }
        self.penalise(raw, request);
        let scaled = self.scale(plan.temperature);
        let filtered = plan.top_k > 0 || plan.top_p < 1.0 || plan.min_p > 0.0;
        if !filtered && plan.candidates == 0 {
            let token = draw_unfiltered(&self.weights, request.uniform);
            return self.token(raw, token, request.logprobs);
        }
        self.filter(request, &scaled);
        if plan.candidates > 0 {
            self.pairs.truncate(plan.candidates as usize);
            let normaliser = scaled.largest + scaled.total.ln();
            let candidate = |&(logit, id): &(f32, u32)| Candidate {
                token: TokenId(id),
                logprob: logit - normaliser,
            };
            return SampleOutcome::Candidates(self.pairs.iter().map(candidate).collect());
        }
        let token = self.draw_filtered(request.uniform, scaled.largest);
        self.token(raw, token, request.logprobs)
    }

    fn token(&mut self, raw: &[f32], token: TokenId, logprobs: Option<u32>) -> SampleOutcome {
        SampleOutcome::Token {
            token,
            logprobs: logprobs.map(|top| self.logprobs(raw, token, top)),
        }
    }

    /// Copies the row and applies bias and penalties.
    fn penalise(&mut self, raw: &[f32], request: &SampleRequest<'_>) {
        let plan = request.plan;
        self.logits.clear();
        self.logits.extend(raw.iter().map(|&v| {
            if v.is_nan() {
                f32::NEG_INFINITY
            } else {
                v.min(f32::MAX)
            }
        }));
        for (token, bias) in &plan.bias {
            if let Some(logit) = self.logits.get_mut(token.index()) {
                *logit += bias;
            }
        }
        for count in request.seen {
            let Some(logit) = self.logits.get_mut(count.token.index()) else {
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

    /// Divides by the temperature and raises to the exponential.
    fn scale(&mut self, temperature: f32) -> Scaled {
        let factor = 1.0 / temperature;
        let largest = argmax_value(self.isa, &self.logits) * factor;
        let largest = if largest.is_finite() {
            largest
        } else {
            largest.signum() * f32::MAX
        };
        self.weights.clear();
        self.weights.resize(self.logits.len(), 0.0);
        let (logits, weights) = (self.logits.as_mut_slice(), self.weights.as_mut_slice());
        // SAFETY: the instruction set is the device's; both slices are the kernel's alone.
        let total = unsafe {
            dispatch(
                self.isa,
                Exponentials {
                    logits,
                    weights,
                    factor,
                    largest,
                },
            )
        };
        Scaled {
            largest,
            total: total.max(f32::MIN_POSITIVE),
        }
    }

    /// Leaves the tokens that pass the filters in `pairs`, most likely first, at least one.
    fn filter(&mut self, request: &SampleRequest<'_>, scaled: &Scaled) {
        let plan = request.plan;
        let count_max = match plan.top_k {
            0 => usize::MAX,
            k => k as usize,
        };
        let floor = scaled.largest + plan.min_p.ln();
        // Tokens far below the best rarely matter: collect ever more of them until what is collected is sure
        // to hold the answer.
        for depth in [6.0, 14.0, f32::INFINITY] {
            let mass = self.collect(scaled.largest - depth);
            let enough = if plan.top_k > 0 {
                self.pairs.len() >= count_max
            } else if plan.top_p < 1.0 {
                mass >= f64::from(plan.top_p) * f64::from(scaled.total) * 1.000_01
            } else if plan.min_p > 0.0 {
                floor >= scaled.largest - depth
            } else {
                self.pairs.len() >= plan.candidates as usize
            };
            if enough {
                break;
            }
        }
        let wanted = match plan.candidates {
            0 => usize::MAX,
            n => n as usize,
        };
        if plan.top_k > 0 {
            sort_largest(&mut self.pairs, count_max);
            self.pairs.truncate(count_max);
        }
        let kept = self.cut(f64::from(plan.top_p), floor, wanted, scaled, plan.top_k > 0);
        self.pairs.truncate(kept.max(1));
    }

    /// Collects tokens with logits from `floor` on; returns their weight.
    fn collect(&mut self, floor: f32) -> f64 {
        self.pairs.clear();
        let mut mass = 0.0;
        for (id, (&logit, &weight)) in self.logits.iter().zip(&self.weights).enumerate() {
            if logit >= floor {
                self.pairs.push((logit, id as u32));
                mass += f64::from(weight);
            }
        }
        if self.pairs.is_empty() {
            self.pairs.push((f32::NEG_INFINITY, 0));
        }
        mass
    }

    /// How many of the pairs pass top-p and min-p; sorts as many of them as it looks at.
    fn cut(&mut self, top_p: f64, floor: f32, wanted: usize, scaled: &Scaled, is_sorted: bool) -> usize {
        let weights = &self.weights;
        let weight = |id: u32| f64::from(weights[id as usize]);
        let total = if is_sorted {
            self.pairs.iter().map(|&(_, id)| weight(id)).sum()
        } else {
            f64::from(scaled.total)
        };
        let (mut seen, mut sorted, mut chunk) = (0.0, if is_sorted { self.pairs.len() } else { 0 }, 64);
        for i in 0..self.pairs.len() {
            if i == sorted {
                sort_largest(&mut self.pairs[i..], chunk);
                sorted = (i + chunk).min(self.pairs.len());
                chunk *= 4;
            }
            let (logit, id) = self.pairs[i];
            if i > 0 && (i >= wanted || logit < floor || (top_p < 1.0 && seen >= top_p * total)) {
                return i;
            }
            seen += weight(id);
        }
        self.pairs.len()
    }

    fn draw_filtered(&self, uniform: f32, largest: f32) -> TokenId {
        let weight = |logit: f32| f64::from((logit - largest).exp());
        let total: f64 = self.pairs.iter().map(|&(logit, _)| weight(logit)).sum();
        let mut left = f64::from(uniform) * total;
        for &(logit, id) in &self.pairs {
            left -= weight(logit);
            if left < 0.0 {
                return TokenId(id);
            }
        }
        TokenId(self.pairs[self.pairs.len() - 1].1)
    }

    fn logprobs(&mut self, raw: &[f32], token: TokenId, top: u32) -> TokenLogprobs {
        self.logits.clear();
        self.logits.extend(raw.iter().map(|&v| {
            if v.is_nan() {
                f32::NEG_INFINITY
            } else {
                v.min(f32::MAX)
            }
        }));
        let scaled = self.scale(1.0);
        let normaliser = scaled.largest + scaled.total.ln();
        let logprob = self.logits[token.index()] - normaliser;
        let top = (top as usize).min(raw.len());
        for depth in [12.0, f32::INFINITY] {
            self.collect(scaled.largest - depth);
            if self.pairs.len() >= top {
                break;
            }
        }
        sort_largest(&mut self.pairs, top);
        let candidate = |&(logit, id): &(f32, u32)| Candidate {
            token: TokenId(id),
            logprob: logit - normaliser,
        };
        TokenLogprobs {
            logprob,
            top: self.pairs.iter().take(top).map(candidate).collect(),
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

/// Moves the `count` largest pairs to the front, largest first, equal ones by id.
fn sort_largest(pairs: &mut [(f32, u32)], count: usize) {
    let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if count > 0 && count < pairs.len() {
        pairs.select_nth_unstable_by(count - 1, order);
    }
    let count = count.min(pairs.len());
    pairs[..count].sort_unstable_by(order);
}

fn draw_unfiltered(weights: &[f32], uniform: f32) -> TokenId {
    const CHUNK: usize = 512;
    let sums: Vec<f64> = weights
        .chunks(CHUNK)
        .map(|chunk| f64::from(chunk.iter().sum::<f32>()))
        .collect();
    let mut left = f64::from(uniform) * sums.iter().sum::<f64>();
    let mut last = 0;
    for (c, sum) in sums.iter().enumerate() {
        if left >= *sum && c + 1 < sums.len() {
            left -= sum;
            continue;
        }
        for (i, &weight) in weights[c * CHUNK..].iter().enumerate() {
            if weight > 0.0 {
                last = c * CHUNK + i;
                left -= f64::from(weight);
                if left < 0.0 {
                    return TokenId(last as u32);
                }
            }
        }
    }
    TokenId(last as u32)
}

fn argmax(isa: Isa, logits: &[f32]) -> TokenId {
    let largest = argmax_value(isa, logits);
    TokenId(logits.iter().position(|&v| v == largest).unwrap_or(0) as u32)
}

fn argmax_value(isa: Isa, logits: &[f32]) -> f32 {
    // SAFETY: the instruction set is the device's; the slice is valid.
    unsafe { dispatch(isa, Largest(logits)) }
}

/// The largest number, ignoring what is not a number.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let (groups, rest) = self.0.as_chunks::<LANES>();
        // SAFETY: each group has 16 elements; the caller answers for the instruction set.
        let best = unsafe {
            let mut best = S::splat(f32::NEG_INFINITY);
            for group in groups {
                // In this order the second operand wins over NaN.
                best = S::max(S::load(group.as_ptr()), best);
            }
            S::max_lane(best)
        };
        rest.iter().copied().fold(best, f32::max)
    }
}

/// Scales logits in place and writes `e^(logit - largest)`; returns the sum.
struct Exponentials<'a> {
    logits: &'a mut [f32],
    weights: &'a mut [f32],
    factor: f32,
    largest: f32,
}

impl Kernel for Exponentials<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let (logits, logits_rest) = self.logits.as_chunks_mut::<LANES>();
        let (weights, weights_rest) = self.weights.as_chunks_mut::<LANES>();
        // SAFETY: each group has 16 elements; the caller answers for the instruction set.
        let mut total = unsafe {
            let mut total = S::splat(0.0);
            for (logits, weights) in logits.iter_mut().zip(weights) {
                let scaled = S::mul(S::load(logits.as_ptr()), S::splat(self.factor));
                S::store(logits.as_mut_ptr(), scaled);
                let weight = exp::<S>(S::sub(scaled, S::splat(self.largest)));
                S::store(weights.as_mut_ptr(), weight);
                total = S::add(total, weight);
            }
            S::sum(total)
        };
        for (logit, weight) in logits_rest.iter_mut().zip(weights_rest) {
            *logit *= self.factor;
            *weight = (*logit - self.largest).exp();
            total += *weight;
        }
        total
    }
}
