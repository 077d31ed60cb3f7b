//! Batches that break their contract are refused, and the program goes on working.

use galerne_core::dtype::DType;
use galerne_core::ids::{BlockId, TokenId};

use super::{BLOCK_TOKENS, Bench, Build, Case, ConformanceError, batch};
use crate::device::{DeviceError, StepBatch};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "broken batches are refused",
        run: refused,
    },
    Case {
        name: "a missing or misshapen weight is named",
        run: weights,
    },
];

type Break = fn(&mut StepBatch);

const BREAKS: [(&str, Break); 13] = [
    ("no tokens", |step| *step = StepBatch::default()),
    ("too many tokens", |step| step.tokens.resize(1_000, TokenId(0))),
    ("a token outside the table", |step| step.tokens[2] = TokenId(50)),
    ("a gap between slices", |step| step.sequences[1].first_token += 1),
    ("an empty slice", |step| step.sequences[1].tokens = 0),
    ("tokens of no slice", |step| step.tokens.push(TokenId(1))),
    ("too few blocks", |step| step.sequences[0].blocks.truncate(1)),
    ("a block outside the pool", |step| {
        step.sequences[0].blocks[1] = BlockId(64);
    }),
    ("two writers of one block", |step| {
        step.sequences[1].blocks = step.sequences[0].blocks.clone();
    }),
    ("a position past the context", |step| {
        step.sequences[0].position = 5_000;
    }),
    ("an output row past the tokens", |step| step.output_rows.push(999)),
    ("output rows out of order", |step| step.output_rows.swap(0, 1)),
    ("more sequences generating than there are", |step| {
        step.generating = 3;
    }),
];

fn refused(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let b = Build::transformer(DType::F32, 1, 1);
    let mut program = bench.load(&b, BLOCK_TOKENS)?;
    let good = batch(&[(0, 20), (0, 5)], BLOCK_TOKENS, 1);
    let before = bench.step(program.as_mut(), &good)?;
    for (what, break_it) in BREAKS {
        let mut step = good.clone();
        break_it(&mut step);
        let got = program.submit(&step);
        let is_refused = matches!(got, Err(DeviceError::Batch { .. }));
        bench.same(&format!("{what} is refused (got {got:?})"), true, is_refused)?;
    }
    let after = bench.step(program.as_mut(), &good)?;
    bench.same("the same step after refusals", before, after)
}

fn weights(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut missing = Build::transformer(DType::F32, 1, 1);
    let name = "nowhere".to_owned();
    missing.program.weights[3].parts[0].clone_from(&name);
    let mut narrow = Build::transformer(DType::F32, 1, 1);
    let first = narrow.program.weights[0].parts[0].clone();
    narrow
        .weights
        .insert(&first, DType::F32, &[50, 32], &[0.0; 50 * 32]);
    for (build, expected) in [(missing, name), (narrow, first)] {
        let got = bench
            .device
            .load(&build.program, &build.weights, bench.options(BLOCK_TOKENS));
        match got.map(|_| ()) {
            Err(DeviceError::Weight { name, .. }) => bench.same("the weight named", expected, name)?,
            other => bench.same(
                "a load with a wrong weight",
                "an error that names it".to_owned(),
                format!("{other:?}"),
            )?,
        }
    }
    Ok(())
}
