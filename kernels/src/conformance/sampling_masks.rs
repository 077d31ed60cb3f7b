//! Drawing tokens under a mask: what it forbids counts nowhere but in raw log-probabilities.

use galerne_core::ids::TokenId;
use galerne_core::sampling::SamplingPlan;

use super::sampling::{kept, near, program, request, sample, token};
use super::{Bench, ConformanceError, Numbers};
use crate::device::{LoadedProgram, SampleOutcome, SampleRequest, TokenCount};

/// Not a multiple of 32, so that the last word of a mask is not whole.
const WIDTH: usize = 3_001;

/// Masks that allow nearly everything, about half, a handful, and single tokens at both ends.
fn some_masks() -> Vec<Vec<u32>> {
    let words = WIDTH.div_ceil(32);
    let mut numbers = Numbers::new(11);
    let half = (0..words).map(|_| numbers.below(u32::MAX)).collect();
    let mut most = vec![u32::MAX; words];
    (most[3], most[40]) = (0, 0xffff_0001);
    let mut few = vec![0; words];
    (few[0], few[7], few[words - 1]) = (1 << 5, 0x8000_0001, 1 << 24);
    let single = |word: usize, bit: u32| {
        let mut mask = vec![0; words];
        mask[word] = 1 << bit;
        mask
    };
    vec![half, most, few, single(0, 0), single(words - 1, 24)]
}

fn allows(mask: &[u32], token: u32) -> bool {
    mask[token as usize / 32] >> (token % 32) & 1 == 1
}

/// The allowed tokens and their logits.
fn allowed(logits: &[f32], mask: &[u32]) -> (Vec<u32>, Vec<f32>) {
    let tokens: Vec<u32> = (0..logits.len() as u32).filter(|t| allows(mask, *t)).collect();
    let logits = tokens.iter().map(|t| logits[*t as usize]).collect();
    (tokens, logits)
}

pub(super) fn masks(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut not_numbers = vec![f32::NAN; WIDTH];
    not_numbers[1] = f32::NEG_INFINITY;
    let rows = vec![
        Numbers::new(12).normals(WIDTH, 2.0),
        vec![0.5; WIDTH],
        not_numbers,
    ];
    let mut program = program(bench, &rows)?;
    for mask in &some_masks() {
        draws(bench, program.as_mut(), &rows, mask)?;
        candidates(bench, program.as_mut(), &rows[0], mask)?;
        broken(bench, program.as_mut(), mask)?;
    }
    penalised(bench, program.as_mut(), &rows[0])?;
    raw_logprobs(bench, program.as_mut(), &rows[0])?;
    refused(bench, program.as_mut())
}

fn plans() -> Vec<SamplingPlan> {
    let plan = |temperature, top_k, top_p, min_p| SamplingPlan {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingPlan::default()
    };
    vec![
        plan(1.0, 0, 1.0, 0.0),
        plan(0.7, 0, 0.9, 0.0),
        plan(1.0, 40, 1.0, 0.0),
        plan(1.0, 3_000, 0.95, 0.02),
        plan(1.5, 0, 1.0, 0.1),
    ]
}

fn draws(
    bench: &Bench<'_>,
    program: &mut dyn LoadedProgram,
    rows: &[Vec<f32>],
    mask: &[u32],
) -> Result<(), ConformanceError> {
    for (row, logits) in rows.iter().enumerate().take(2) {
        let (tokens, logits) = allowed(logits, mask);
        for plan in &plans() {
            // A plan that keeps more than there is draws in the order of ids, like one that keeps all.
            let top_k = if plan.top_k as usize >= tokens.len() {
                0
            } else {
                plan.top_k
            };
            let kept = kept(
                &logits,
                &SamplingPlan {
                    top_k,
                    ..plan.clone()
                },
            );
            for uniform in [0.0, 0.3, 0.8, 0.999] {
                let masked = SampleRequest {
                    mask: Some(mask),
                    ..request(row, plan, uniform)
                };
                let outcome = sample(bench, program, masked)?;
                let got = token(bench, &outcome)?;
                let mut end = 0.0;
                let fits = kept.iter().any(|(place, p)| {
                    let start = end;
                    end += p;
                    let u = f64::from(uniform);
                    tokens[*place as usize] == got && start - 1e-4 <= u && u <= end + 1e-4
                });
                let what = format!("row {row}, {plan:?}, uniform {uniform}: token {got} fits");
                bench.same(&what, true, fits)?;
            }
        }
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|logit| *logit == best).unwrap_or(0);
        let greedy = SamplingPlan {
            temperature: 0.0,
            ..SamplingPlan::default()
        };
        let masked = SampleRequest {
            mask: Some(mask),
            ..request(row, &greedy, 0.5)
        };
        let outcome = sample(bench, program, masked)?;
        bench.same(
            "the most likely allowed token",
            tokens[first],
            token(bench, &outcome)?,
        )?;
    }
    Ok(())
}

fn candidates(
    bench: &Bench<'_>,
    program: &mut dyn LoadedProgram,
    logits: &[f32],
    mask: &[u32],
) -> Result<(), ConformanceError> {
    let plan = SamplingPlan {
        temperature: 0.8,
        candidates: 25,
        ..SamplingPlan::default()
    };
    let (tokens, logits) = allowed(logits, mask);
    let expected = kept(&logits, &plan);
    let masked = SampleRequest {
        mask: Some(mask),
        ..request(0, &plan, 0.5)
    };
    let SampleOutcome::Candidates(got) = sample(bench, program, masked)? else {
        return bench.same("outcome", "candidates", "a token");
    };
    bench.same("candidates", tokens.len().min(25), got.len())?;
    for (candidate, (place, p)) in got.iter().zip(&expected) {
        bench.same("candidate", tokens[*place as usize], candidate.token.0)?;
        near(
            bench,
            "log-probability among the allowed",
            p.ln(),
            candidate.logprob,
        )?;
    }
    Ok(())
}

/// Even where no allowed logit is a number, no other token comes.
fn broken(bench: &Bench<'_>, program: &mut dyn LoadedProgram, mask: &[u32]) -> Result<(), ConformanceError> {
    let greedy = SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    };
    for plan in plans().iter().chain([&greedy]) {
        for uniform in [0.0, 0.999] {
            let masked = SampleRequest {
                mask: Some(mask),
                ..request(2, plan, uniform)
            };
            let outcome = sample(bench, program, masked)?;
            let got = token(bench, &outcome)?;
            bench.same(&format!("token {got} is allowed"), true, allows(mask, got))?;
        }
    }
    Ok(())
}

/// Bias and penalties find their tokens among the allowed ones.
fn penalised(
    bench: &Bench<'_>,
    program: &mut dyn LoadedProgram,
    logits: &[f32],
) -> Result<(), ConformanceError> {
    let mut mask = vec![0; WIDTH.div_ceil(32)];
    (mask[1], mask[2]) = (0b1110, 0b1);
    let second = (33..36).fold(33, |best, t| if logits[t] > logits[best] { t } else { best });
    let plan = SamplingPlan {
        temperature: 0.0,
        presence_penalty: 50.0,
        // 64 is allowed; 65 is not and would win.
        bias: vec![(TokenId(64), 20.0), (TokenId(65), 80.0)],
        ..SamplingPlan::default()
    };
    let seen = [TokenCount {
        token: TokenId(64),
        output: 1,
    }];
    for (seen, expected) in [(&[][..], 64), (&seen[..], second as u32)] {
        let masked = SampleRequest {
            mask: Some(&mask),
            seen,
            ..request(0, &plan, 0.5)
        };
        let outcome = sample(bench, program, masked)?;
        bench.same(
            "token under bias, penalty and mask",
            expected,
            token(bench, &outcome)?,
        )?;
    }
    Ok(())
}

fn raw_logprobs(
    bench: &Bench<'_>,
    program: &mut dyn LoadedProgram,
    logits: &[f32],
) -> Result<(), ConformanceError> {
    let mut mask = vec![0; WIDTH.div_ceil(32)];
    mask[9] = 1;
    let raw = SamplingPlan {
        candidates: 1,
        ..SamplingPlan::default()
    };
    let raw = kept(logits, &raw);
    let plan = SamplingPlan::default();
    let masked = SampleRequest {
        mask: Some(&mask),
        logprobs: Some(3),
        ..request(0, &plan, 0.5)
    };
    let SampleOutcome::Token {
        token,
        logprobs: Some(logprobs),
    } = sample(bench, program, masked)?
    else {
        return bench.same("outcome", "a token with log-probabilities", "something else");
    };
    bench.same("the only allowed token", 288, token.0)?;
    let p = raw.iter().find(|(t, _)| *t == 288).map_or(0.0, |(_, p)| *p);
    near(
        bench,
        "its log-probability without the mask",
        p.ln(),
        logprobs.logprob,
    )?;
    bench.same(
        "the best token without the mask",
        Some(raw[0].0),
        logprobs.top.first().map(|c| c.token.0),
    )
}

fn refused(bench: &Bench<'_>, program: &mut dyn LoadedProgram) -> Result<(), ConformanceError> {
    let words = WIDTH.div_ceil(32);
    let mut past = vec![0; words];
    past[words - 1] = 1 << 25;
    let plan = SamplingPlan::default();
    for (what, mask) in [
        ("short", vec![1; words - 1]),
        ("empty", vec![0; words]),
        ("past the row", past),
    ] {
        let masked = SampleRequest {
            mask: Some(&mask),
            ..request(0, &plan, 0.5)
        };
        let is_refused = program.sample(&[masked]).is_err();
        bench.same(&format!("a mask that is {what} is refused"), true, is_refused)?;
    }
    Ok(())
}
