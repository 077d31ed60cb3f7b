//! A model's tokens on the device beside those of the CPU in f32 (on the same weights, rounded ones too), both given the CPU's so that one difference is one difference.

use anyhow::{Result, ensure};
use galerne_core::ids::{BlockId, TokenId};
use galerne_kernels::device::{KvSpec, LoadOptions, LoadedProgram, Precision, SequenceSlice, StepBatch};
use galerne_plugin::PluginHost;

use super::model::SeededModel;
use super::{Checked, DeviceArg, Figure, ModelArgs};
use crate::config::DataArgs;
use crate::guests;

/// Lengths of the prompts of the sequences that run together.
const PROMPTS: [usize; 3] = [5, 33, 70];
const BLOCK_TOKENS: usize = 16;
/// What f32 sums in another order may differ by, as a fraction of the largest logit; and what 16-bit inputs may.
const TOLERANCE_F32: f32 = 1e-4;
const TOLERANCE_AUTO: f32 = 0.05;

/// What came of comparing rows of logits.
#[derive(Default)]
struct Seen {
    tokens: usize,
    equal: usize,
    /// Tokens that differ although no rounding explains it.
    wrong: usize,
    largest_difference: f32,
    largest_logit: f32,
}

pub(super) fn run(
    data: &DataArgs,
    checked: &Checked,
    args: &ModelArgs,
    precision: Precision,
    steps: usize,
) -> Result<()> {
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let model = SeededModel::new(&plugins, args)?;
    let blocks_each = (PROMPTS[2] + steps).div_ceil(BLOCK_TOKENS);
    let load = |checked: &Checked, precision| {
        let options = LoadOptions {
            precision,
            quantization: args.quantize.map(Into::into),
            kv: KvSpec {
                blocks: blocks_each * PROMPTS.len(),
                block_tokens: BLOCK_TOKENS,
                dtype: args.kv_dtype.into(),
            },
            step_tokens_max: PROMPTS.iter().sum(),
            sequences_max: PROMPTS.len(),
        };
        checked.load(&model, options)
    };
    let mut reference = load(&Checked::open(DeviceArg::Cpu)?, Precision::F32)?;
    let mut tested = load(checked, precision)?;
    let mut batch = prompts(model.vocabulary, blocks_each);
    let mut seen = Seen::default();
    let width = model.vocabulary as usize;
    for _ in 0..steps {
        let expected = logits(&mut *reference, &batch)?;
        let got = logits(&mut *tested, &batch)?;
        ensure!(
            got.len() == expected.len(),
            "expected {} logits, got {}",
            expected.len(),
            got.len()
        );
        let tolerance = match precision {
            Precision::F32 => TOLERANCE_F32,
            Precision::Auto => TOLERANCE_AUTO,
        };
        let rows = expected.chunks_exact(width).zip(got.chunks_exact(width));
        let next: Vec<TokenId> = rows
            .map(|(expected, got)| seen.compare(expected, got, tolerance))
            .collect();
        batch = following(&batch, &next);
    }
    seen.print(args, precision)
}

fn prompts(vocabulary: u32, blocks_each: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    for (lane, &tokens) in PROMPTS.iter().enumerate() {
        let first_token = batch.tokens.len();
        let token = |at: usize| TokenId((at as u32 * 7_919 + lane as u32 * 104_729) % vocabulary);
        batch.tokens.extend((0..tokens).map(token));
        batch.output_rows.push(batch.tokens.len() - 1);
        batch.sequences.push(SequenceSlice {
            first_token,
            tokens,
            position: 0,
            // Neighbours in a sequence are not neighbours in the pool.
            blocks: (0..blocks_each)
                .map(|block| BlockId((block * PROMPTS.len() + lane) as u32))
                .collect(),
        });
    }
    batch
}

/// The step after this one, a token for each sequence.
fn following(batch: &StepBatch, next: &[TokenId]) -> StepBatch {
    let sequence = |(lane, before): (usize, &SequenceSlice)| SequenceSlice {
        first_token: lane,
        tokens: 1,
        position: before.position + before.tokens as u32,
        blocks: before.blocks.clone(),
    };
    StepBatch {
        tokens: next.to_vec(),
        sequences: batch.sequences.iter().enumerate().map(sequence).collect(),
        generating: next.len(),
        output_rows: (0..next.len()).collect(),
    }
}

fn logits(program: &mut dyn LoadedProgram, batch: &StepBatch) -> Result<Vec<f32>> {
    program.submit(batch)?;
    program.wait()?;
    Ok(program.read_output()?)
}

/// The largest, the first of equals; what is no number is never it.
fn best(logits: &[f32]) -> usize {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || (logits[best].is_nan() && !logit.is_nan()) {
            best = token;
        }
    }
    best
}

impl Seen {
    /// Gives the token that is expected.
    fn compare(&mut self, expected: &[f32], got: &[f32], tolerance: f32) -> TokenId {
        let (right, chosen) = (best(expected), best(got));
        let largest = expected
            .iter()
            .fold(0.0, |largest: f32, logit| largest.max(logit.abs()));
        let difference = |(expected, got): (&f32, &f32)| (expected - got).abs();
        let differences = expected.iter().zip(got).map(difference);
        let difference = differences.fold(
            0.0,
            |most: f32, d| if d.is_nan() { f32::INFINITY } else { most.max(d) },
        );
        let gap = expected[right] - expected[chosen];
        self.tokens += 1;
        self.equal += usize::from(right == chosen);
        self.wrong += usize::from(gap > 2.0 * tolerance * largest || difference > tolerance * largest);
        self.largest_difference = self.largest_difference.max(difference);
        self.largest_logit = self.largest_logit.max(largest);
        TokenId(right as u32)
    }

    fn print(&self, args: &ModelArgs, precision: Precision) -> Result<()> {
        Figure {
            name: format!("tokens {} {precision:?} as on the CPU in f32", args.name()),
            passed: Some(self.wrong == 0),
            value: Some(self.equal as f64 / self.tokens as f64),
            unit: Some("of the tokens"),
            note: Some(format!(
                "{} of {} tokens equal; logits differ by {:.2e} at most, the largest is {:.2}",
                self.equal, self.tokens, self.largest_difference, self.largest_logit
            )),
            ..Figure::default()
        }
        .print()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_counts_as_wrong_where_rounding_does_not_explain_it() {
        let of = |expected: &[f32], got: &[f32]| {
            let mut seen = Seen::default();
            seen.compare(expected, got, 1e-3);
            (seen.equal, seen.wrong)
        };
        assert_eq!(of(&[1.0, 0.5], &[1.0, 0.5]), (1, 0));
        assert_eq!(of(&[1.0, 0.9995], &[0.9996, 0.9999]), (0, 0));
        assert_eq!(of(&[1.0, 0.5], &[0.5, 1.0]), (0, 1));
        assert_eq!(of(&[1.0, 0.5], &[1.0, 0.6]), (1, 1));
        assert_eq!(of(&[1.0, 0.5], &[1.0, f32::NAN]), (1, 1));
        assert_eq!(of(&[1.0, 0.5], &[f32::NAN, f32::NAN]), (1, 1));
    }
}
