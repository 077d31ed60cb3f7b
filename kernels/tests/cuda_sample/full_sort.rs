//! What the sampler should do, by a full sort in f64. Knows no kernel.

use galerne_core::sampling::{Candidate, SamplingPlan};
use galerne_kernels::device::{SampleOutcome, SampleRequest};

/// A logit as it counts.
fn clean(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        // The two zeros are equal.
        logit.min(f32::MAX) + 0.0
    }
}

/// What a request sees of its row: allowed tokens with their logits after bias and penalties, most likely first.
fn ordered(row: &[f32], request: &SampleRequest<'_>) -> Vec<(u32, f32)> {
    let plan = request.plan;
    let mut logits: Vec<f32> = row.iter().map(|&logit| clean(logit)).collect();
    for (token, bias) in &plan.bias {
        logits[token.index()] += bias;
    }
    for count in request.seen {
        let logit = &mut logits[count.token.index()];
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
    let is_allowed = |token: u32| {
        request
            .mask
            .is_none_or(|mask| mask[token as usize / 32] >> (token % 32) & 1 == 1)
    };
    let mut tokens: Vec<(u32, f32)> = (0..row.len() as u32)
        .filter(|token| is_allowed(*token))
        .map(|token| (token, clean(logits[token as usize])))
        .collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    tokens
}

/// The tokens a plan leaves, in the order of drawing, with weights relative to the best one.
fn kept(ordered: &[(u32, f32)], plan: &SamplingPlan) -> Vec<(u32, f64)> {
    let best = f64::from(ordered[0].1);
    let weight = |logit: f32| ((f64::from(logit) - best) / f64::from(plan.temperature)).exp();
    let mut tokens: Vec<(u32, f64)> = ordered
        .iter()
        .map(|(token, logit)| (*token, weight(*logit)))
        .collect();
    let is_top_k = (1..tokens.len()).contains(&(plan.top_k as usize));
    if is_top_k {
        tokens.truncate(plan.top_k as usize);
    }
    let whole: f64 = tokens.iter().map(|(_, weight)| weight).sum();
    if plan.top_p < 1.0 {
        let mut sum = 0.0;
        let end = tokens.iter().position(|(_, weight)| {
            sum += weight;
            sum >= f64::from(plan.top_p) * whole
        });
        tokens.truncate(end.map_or(tokens.len(), |end| end + 1));
    }
    let first = tokens[0];
    tokens.retain(|(_, weight)| *weight >= f64::from(plan.min_p));
    if tokens.is_empty() {
        tokens.push(first);
    }
    if !is_top_k && plan.top_p >= 1.0 && plan.min_p <= 0.0 {
        tokens.sort_by_key(|(token, _)| *token);
    }
    tokens
}

/// Plans that end one token earlier or later where a sum or a weight is as near to the limit as f32 exponents are exact.
fn neighbours(plan: &SamplingPlan) -> [SamplingPlan; 3] {
    let moved = |by: f32| SamplingPlan {
        top_p: if plan.top_p < 1.0 {
            (plan.top_p * by).min(1.0 - 1e-7)
        } else {
            1.0
        },
        min_p: plan.min_p * by,
        ..plan.clone()
    };
    [plan.clone(), moved(1.0 - 1e-5), moved(1.0 + 1e-5)]
}

/// Whether the token's part of the cumulative distribution touches the uniform number. Weights `e^x` are off by `x 2^-24`, x up to 27.
fn fits(kept: &[(u32, f64)], uniform: f32, token: u32) -> bool {
    const SLACK: f64 = 1e-5;
    let whole: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut end = 0.0;
    kept.iter().any(|(kept, weight)| {
        let start = end;
        end += weight / whole;
        let uniform = f64::from(uniform);
        *kept == token && start - SLACK <= uniform && uniform <= end + SLACK
    })
}

fn near(expected: f64, got: f32) -> bool {
    (expected - f64::from(got)).abs() <= 1e-5 * (1.0 + expected.abs())
}

/// The first of `ordered`, with log-probabilities among them all.
fn lists(ordered: &[(u32, f32)], temperature: f32, got: &[Candidate]) -> Result<(), String> {
    let best = f64::from(ordered[0].1);
    let scaled = |logit: f32| (f64::from(logit) - best) / f64::from(temperature);
    let total: f64 = ordered.iter().map(|(_, logit)| scaled(*logit).exp()).sum();
    for (i, (candidate, (token, logit))) in got.iter().zip(ordered).enumerate() {
        let expected = scaled(*logit) - total.ln();
        if candidate.token.0 != *token || !near(expected, candidate.logprob) {
            return Err(format!(
                "entry {i}: expected token {token} at {expected}, got {candidate:?}"
            ));
        }
    }
    Ok(())
}

/// Compares an outcome with the full sort. Rows have a number.
pub(crate) fn check(row: &[f32], request: &SampleRequest<'_>, outcome: &SampleOutcome) -> Result<(), String> {
    let ordered = ordered(row, request);
    let plan = request.plan;
    let (token, logprobs) = match outcome {
        SampleOutcome::Candidates(got) if plan.temperature == 0.0 => {
            let is_right = matches!(got[..], [only] if only.token.0 == ordered[0].0 && only.logprob == 0.0);
            return if is_right {
                Ok(())
            } else {
                Err(format!("expected {:?} alone, got {got:?}", ordered[0]))
            };
        }
        SampleOutcome::Candidates(got) => {
            let counts =
                neighbours(plan).map(|plan| kept(&ordered, &plan).len().min(plan.candidates as usize));
            if !counts.contains(&got.len()) {
                return Err(format!(
                    "expected one of {counts:?} candidates, got {}",
                    got.len()
                ));
            }
            return lists(&ordered, plan.temperature, got);
        }
        SampleOutcome::Token { token, logprobs } => (token.0, logprobs),
    };
    let is_right = if plan.temperature > 0.0 {
        neighbours(plan)
            .iter()
            .any(|plan| fits(&kept(&ordered, plan), request.uniform, token))
    } else {
        token == ordered[0].0
    };
    if !is_right {
        return Err(format!("token {token} does not fit {request:?}"));
    }
    let (Some(wanted), Some(got)) = (request.logprobs, logprobs) else {
        return if request.logprobs.is_some() == logprobs.is_some() {
            Ok(())
        } else {
            Err("log-probabilities are there although unasked, or missing".to_owned())
        };
    };
    let raw_plan = SamplingPlan::default();
    let raw = self::ordered(row, &crate::request(request.row, &raw_plan, 0.0));
    if got.top.len() != (wanted as usize).min(row.len()) {
        return Err(format!("{} best tokens of {wanted}", got.top.len()));
    }
    lists(&raw, 1.0, &got.top)?;
    let total: f64 = raw.iter().map(|(_, logit)| f64::from(*logit).exp()).sum();
    let expected = f64::from(row[token as usize]) - total.ln();
    if near(expected, got.logprob) {
        Ok(())
    } else {
        Err(format!(
            "log-probability {} of {token}, expected {expected}",
            got.logprob
        ))
    }
}
