//! Drawing tokens: each part of a plan, the order of parts, candidates, log-probabilities, broken logits.

use galerne_core::dtype::DType;
use galerne_core::graph::{EmbeddingIndex, Rows};
use galerne_core::ids::TokenId;
use galerne_core::sampling::SamplingPlan;

use super::{BLOCK_TOKENS, Bench, Build, Case, ConformanceError, Numbers, batch};
use crate::device::{LoadedProgram, SampleOutcome, SampleRequest, TokenCount};
use crate::program::Instr;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "greedy",
        run: greedy,
    },
    Case {
        name: "draws against a full sort",
        run: draws,
    },
    Case {
        name: "draws from long rows, flat, peaked and full of ties",
        run: long_rows,
    },
    Case {
        name: "bias and penalties",
        run: penalties,
    },
    Case {
        name: "candidates and log-probabilities",
        run: candidates,
    },
    Case {
        name: "logits that are not numbers",
        run: broken,
    },
    Case {
        name: "masks",
        run: super::sampling_masks::masks,
    },
];

const WIDTH: usize = 3_000;

/// A program whose logits at token `t` are row `t` of a table.
pub(super) fn program(
    bench: &Bench<'_>,
    rows: &[Vec<f32>],
) -> Result<Box<dyn LoadedProgram>, ConformanceError> {
    let mut b = Build::new(1);
    let width = rows[0].len() as u32;
    let table = b.matrix(DType::F32, super::build::VOCABULARY, width);
    let mut values = rows.concat();
    values.resize((super::build::VOCABULARY * width) as usize, 0.0);
    let name = b.program.weights[table.index()].parts[0].clone();
    b.weights.insert(
        &name,
        DType::F32,
        &[u64::from(super::build::VOCABULARY), u64::from(width)],
        &values,
    );
    let (x, out) = (b.buffer(Rows::Tokens, width), b.buffer(Rows::Outputs, width));
    b.push(Instr::Embedding {
        table,
        index: EmbeddingIndex::Tokens,
        out: x,
    });
    b.push(Instr::OutputRows { x, out });
    b.program.output = out;
    let mut program = bench.load(&b, BLOCK_TOKENS)?;
    let mut step = batch(&[(0, rows.len())], BLOCK_TOKENS, 1);
    step.tokens = (0..rows.len() as u32).map(TokenId).collect();
    bench.step(program.as_mut(), &step)?;
    Ok(program)
}

pub(super) fn request(row: usize, plan: &SamplingPlan, uniform: f32) -> SampleRequest<'_> {
    SampleRequest {
        row,
        plan,
        mask: None,
        seen: &[],
        uniform,
        logprobs: None,
    }
}

pub(super) fn sample(
    bench: &Bench<'_>,
    program: &mut dyn LoadedProgram,
    request: SampleRequest<'_>,
) -> Result<SampleOutcome, ConformanceError> {
    let device = |source| ConformanceError::Device {
        case: bench.case.to_owned(),
        source,
    };
    let outcomes = program.sample(&[request]).map_err(device)?;
    bench.same("outcomes", 1, outcomes.len())?;
    Ok(outcomes[0].clone())
}

pub(super) fn token(bench: &Bench<'_>, outcome: &SampleOutcome) -> Result<u32, ConformanceError> {
    match outcome {
        SampleOutcome::Token { token, .. } => Ok(token.0),
        SampleOutcome::Candidates(_) => {
            bench.same("outcome", "a token", "candidates")?;
            Ok(0)
        }
    }
}

fn greedy(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let plan = SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    };
    let mut rows = vec![
        Numbers::new(1).normals(WIDTH, 1.0),
        vec![-1.0; WIDTH],
        Numbers::new(2).normals(WIDTH, 3.0),
    ];
    rows[0][2_999] = 50.0;
    rows[1][17] = 2.0;
    rows[1][1_500] = 2.0;
    rows[2][0] = 60.0;
    let mut program = program(bench, &rows)?;
    for (row, expected) in [(0, 2_999), (1, 17), (2, 0)] {
        let outcome = sample(bench, program.as_mut(), request(row, &plan, 0.9))?;
        bench.same(
            "greedy token, ties to the lowest id",
            expected,
            token(bench, &outcome)?,
        )?;
    }
    let bad = program.sample(&[request(3, &plan, 0.5)]);
    bench.same("a row that is not there is refused", true, bad.is_err())
}

/// The tokens a plan keeps with their probabilities, by a full sort in f64.
pub(super) fn kept(logits: &[f32], plan: &SamplingPlan) -> Vec<(u32, f64)> {
    let scaled: Vec<f64> = logits
        .iter()
        .map(|&l| f64::from(l) / f64::from(plan.temperature))
        .collect();
    let largest = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut tokens: Vec<(u32, f64)> = scaled
        .iter()
        .enumerate()
        .map(|(t, s)| (t as u32, (s - largest).exp()))
        .collect();
    let filtered = plan.top_k > 0 || plan.top_p < 1.0 || plan.min_p > 0.0;
    if filtered || plan.candidates > 0 {
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }
    if plan.top_k > 0 {
        tokens.truncate(plan.top_k as usize);
    }
    let mass: f64 = tokens.iter().map(|(_, p)| p).sum();
    if plan.top_p < 1.0 {
        let mut seen = 0.0;
        let enough = tokens.iter().position(|(_, p)| {
            seen += p;
            seen >= f64::from(plan.top_p) * mass
        });
        tokens.truncate(enough.map_or(tokens.len(), |last| last + 1));
    }
    let best = tokens[0].1;
    if plan.min_p > 0.0 {
        tokens.retain(|(_, p)| *p >= f64::from(plan.min_p) * best);
    }
    let total: f64 = tokens.iter().map(|(_, p)| p).sum();
    tokens.iter().map(|(t, p)| (*t, p / total)).collect()
}

fn draws(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let rows = vec![
        Numbers::new(3).normals(WIDTH, 2.0),
        Numbers::new(4).normals(WIDTH, 0.01),
        vec![0.5; WIDTH],
    ];
    let mut program = program(bench, &rows)?;
    let base = SamplingPlan::default();
    let plans = [
        base.clone(),
        SamplingPlan {
            temperature: 0.3,
            ..base.clone()
        },
        SamplingPlan {
            top_k: 1,
            ..base.clone()
        },
        SamplingPlan {
            top_k: 40,
            ..base.clone()
        },
        SamplingPlan {
            top_p: 0.9,
            ..base.clone()
        },
        SamplingPlan {
            top_p: 0.0,
            ..base.clone()
        },
        SamplingPlan {
            min_p: 0.05,
            ..base.clone()
        },
        SamplingPlan {
            temperature: 0.7,
            top_k: 100,
            top_p: 0.8,
            min_p: 0.02,
            ..base.clone()
        },
        SamplingPlan {
            temperature: 5.0,
            top_p: 0.999,
            ..base
        },
    ];
    draws_fit(bench, program.as_mut(), &rows, &plans)
}

/// Rows in which a nucleus is a handful of tokens, most of the row, or ends inside thousands of equal ones.
fn long_rows(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    const LONG: usize = 20_003;
    let tied = |size: f32, seed| -> Vec<f32> {
        let mut numbers = Numbers::new(seed);
        (0..LONG).map(|_| numbers.normal(size).round()).collect()
    };
    let mut one = Numbers::new(9).normals(LONG, 1.0);
    one[LONG - 1] = 30.0;
    let rows = vec![
        Numbers::new(6).normals(LONG, 0.01),
        Numbers::new(7).normals(LONG, 5.0),
        tied(1.0, 8),
        one,
        vec![-3.0; LONG],
    ];
    let mut program = program(bench, &rows)?;
    let base = SamplingPlan::default();
    let plans = [
        base.clone(),
        SamplingPlan {
            top_p: 0.9,
            temperature: 0.7,
            ..base.clone()
        },
        SamplingPlan {
            top_p: 0.9,
            ..base.clone()
        },
        SamplingPlan {
            top_p: 0.999,
            min_p: 0.3,
            ..base.clone()
        },
        SamplingPlan {
            top_k: 40,
            top_p: 0.95,
            ..base
        },
    ];
    draws_fit(bench, program.as_mut(), &rows, &plans)
}

/// Draws with every plan from every row and compares with a full sort.
fn draws_fit(
    bench: &Bench<'_>,
    program: &mut dyn LoadedProgram,
    rows: &[Vec<f32>],
    plans: &[SamplingPlan],
) -> Result<(), ConformanceError> {
    for plan in plans {
        for (row, logits) in rows.iter().enumerate() {
            let kept = kept(logits, plan);
            for uniform in [0.0, 0.1, 0.37, 0.5, 0.77, 0.9, 0.999] {
                let outcome = sample(bench, program, request(row, plan, uniform))?;
                let got = token(bench, &outcome)?;
                // Tokens whose interval of the cumulative distribution touches the number, give or take
                // what f32 sums over the vocabulary are off by.
                let mut end = 0.0;
                let allowed = kept.iter().any(|(token, p)| {
                    let start = end;
                    end += p;
                    let u = f64::from(uniform);
                    *token == got && start - 1e-4 <= u && u <= end + 1e-4
                });
                bench.same(
                    &format!("row {row}, {plan:?}, uniform {uniform}: token {got} fits"),
                    true,
                    allowed,
                )?;
            }
        }
    }
    Ok(())
}

fn penalties(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut row = vec![-5.0; 200];
    (row[3], row[7], row[9]) = (4.0, 3.0, 2.0);
    let mut program = program(bench, &[row, vec![-1.0; 200]])?;
    let base = SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    };
    let seen = [
        TokenCount {
            token: TokenId(3),
            output: 2,
        },
        TokenCount {
            token: TokenId(7),
            output: 0,
        },
    ];
    let cases = [
        (
            SamplingPlan {
                bias: vec![(TokenId(9), 2.5)],
                ..base.clone()
            },
            9,
        ),
        (
            SamplingPlan {
                bias: vec![(TokenId(3), -9.0)],
                ..base.clone()
            },
            7,
        ),
        // 4 / 2 = 2 and 3 / 2: the tie of 3 and 9 goes to 3.
        (
            SamplingPlan {
                repetition_penalty: 2.0,
                ..base.clone()
            },
            3,
        ),
        (
            SamplingPlan {
                repetition_penalty: 2.5,
                ..base.clone()
            },
            9,
        ),
        // Only output counts: 4 - 2 * 0.6 < 3.
        (
            SamplingPlan {
                frequency_penalty: 0.6,
                ..base.clone()
            },
            7,
        ),
        (
            SamplingPlan {
                presence_penalty: 0.9,
                ..base.clone()
            },
            3,
        ),
        (
            SamplingPlan {
                presence_penalty: 1.1,
                ..base.clone()
            },
            7,
        ),
        // Bias comes first: (2 + 2.9) > (4 + 5) / 2 > 3 / 2.
        (
            SamplingPlan {
                bias: vec![(TokenId(3), 5.0), (TokenId(9), 2.9)],
                repetition_penalty: 2.0,
                ..base.clone()
            },
            9,
        ),
    ];
    for (plan, expected) in &cases {
        let outcome = sample(
            bench,
            program.as_mut(),
            SampleRequest {
                seen: &seen,
                ..request(0, plan, 0.5)
            },
        )?;
        bench.same(
            &format!("token under {plan:?}"),
            *expected,
            token(bench, &outcome)?,
        )?;
    }
    // A negative logit is multiplied: away from zero.
    let plan = SamplingPlan {
        repetition_penalty: 2.0,
        ..base
    };
    let seen = [TokenCount {
        token: TokenId(0),
        output: 1,
    }];
    let outcome = sample(
        bench,
        program.as_mut(),
        SampleRequest {
            seen: &seen,
            ..request(1, &plan, 0.5)
        },
    )?;
    bench.same("the token that was not seen", 1, token(bench, &outcome)?)
}

pub(super) fn near(bench: &Bench<'_>, what: &str, expected: f64, got: f32) -> Result<(), ConformanceError> {
    let is_near = (expected - f64::from(got)).abs() < 1e-4;
    bench.same(&format!("{what}: {expected} is near {got}"), true, is_near)
}

fn candidates(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let rows = vec![Numbers::new(5).normals(WIDTH, 2.0)];
    let mut program = program(bench, &rows)?;
    let plan = SamplingPlan {
        temperature: 0.8,
        candidates: 25,
        ..SamplingPlan::default()
    };
    let all = kept(&rows[0], &plan);
    for (plan, expected) in [(plan.clone(), 25), (SamplingPlan { top_k: 4, ..plan }, 4)] {
        let SampleOutcome::Candidates(got) = sample(bench, program.as_mut(), request(0, &plan, 0.5))? else {
            return bench.same("outcome", "candidates", "a token");
        };
        bench.same("candidates", expected, got.len())?;
        for (candidate, (token, p)) in got.iter().zip(&all) {
            bench.same("candidate", *token, candidate.token.0)?;
            near(
                bench,
                "log-probability before the filters",
                p.ln(),
                candidate.logprob,
            )?;
        }
    }
    let plan = SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    };
    let raw = kept(
        &rows[0],
        &SamplingPlan {
            candidates: 1,
            ..SamplingPlan::default()
        },
    );
    let wanted = SampleRequest {
        logprobs: Some(5),
        ..request(0, &plan, 0.5)
    };
    let SampleOutcome::Token {
        token,
        logprobs: Some(logprobs),
    } = sample(bench, program.as_mut(), wanted)?
    else {
        return bench.same("outcome", "a token with log-probabilities", "something else");
    };
    bench.same("the most likely token", raw[0].0, token.0)?;
    near(
        bench,
        "its log-probability under the raw logits",
        raw[0].1.ln(),
        logprobs.logprob,
    )?;
    bench.same("best tokens", 5, logprobs.top.len())?;
    for (candidate, (token, p)) in logprobs.top.iter().zip(&raw) {
        bench.same("best token", *token, candidate.token.0)?;
        near(bench, "log-probability", p.ln(), candidate.logprob)?;
    }
    Ok(())
}

fn broken(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut some = vec![f32::NAN; 100];
    some[40] = 1.0;
    let rows = [
        some,
        vec![f32::NAN; 100],
        vec![f32::NEG_INFINITY; 100],
        vec![f32::INFINITY; 100],
    ];
    let mut program = program(bench, &rows)?;
    for row in 0..rows.len() {
        for temperature in [0.0, 0.5, 1.0] {
            for (top_k, top_p, candidates) in [(0, 1.0, 0), (5, 0.9, 0), (0, 0.5, 0), (0, 1.0, 10)] {
                let plan = SamplingPlan {
                    temperature,
                    top_k,
                    top_p,
                    candidates,
                    ..SamplingPlan::default()
                };
                let wanted = SampleRequest {
                    logprobs: Some(3),
                    ..request(row, &plan, 0.3)
                };
                let got = match sample(bench, program.as_mut(), wanted)? {
                    SampleOutcome::Token { token, .. } => token.0,
                    SampleOutcome::Candidates(candidates) => {
                        candidates.first().map_or(u32::MAX, |c| c.token.0)
                    }
                };
                bench.same("a token of the vocabulary", true, got < 100)?;
                if row == 0 && temperature == 0.0 {
                    bench.same("the only number", 40, got)?;
                }
            }
        }
    }
    Ok(())
}
