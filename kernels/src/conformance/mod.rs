//! The suite every device must pass: small random programs, compared with a naive interpreter in f64.
//! Uses devices only through their traits.

mod attention;
mod batches;
mod build;
mod instructions;
mod linear;
mod quantized;
mod reference;
mod sampling;
mod sampling_masks;
mod weights;

pub use build::Build;
pub use quantized::rounded;
pub use reference::Reference;
pub use weights::{MemoryWeights, Numbers};

use galerne_core::ids::{BlockId, TokenId};

use crate::device::{
    Device, DeviceError, KvDtype, KvSpec, LoadOptions, LoadedProgram, Precision, Quantization, SequenceSlice,
    StepBatch,
};

/// Why a device does not conform.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConformanceError {
    /// The device refused or failed.
    #[error("{case}: expected success, got an error: {source}")]
    Device {
        /// The case.
        case: String,
        /// What the device said.
        source: DeviceError,
    },
    /// A number is too far from the reference: the first one in order.
    #[error(
        "{case}: row {row} column {column}: expected {expected} within {tolerance}, got {got} \
         (first of {wrong} of {all})"
    )]
    Mismatch {
        /// The case and step.
        case: String,
        /// Row of the output.
        row: usize,
        /// Column of the output.
        column: usize,
        /// The reference.
        expected: f64,
        /// The device.
        got: f32,
        /// Largest difference allowed.
        tolerance: f64,
        /// Numbers that are wrong.
        wrong: usize,
        /// Numbers compared.
        all: usize,
    },
    /// Something else is not as documented.
    #[error("{case}: {what}: expected {expected}, got {got}")]
    Behaviour {
        /// The case.
        case: String,
        /// What was looked at.
        what: String,
        /// What the trait's documentation promises.
        expected: String,
        /// What came.
        got: String,
    },
}

/// One named case.
#[derive(Clone, Copy)]
pub struct Case {
    /// What it looks at.
    pub name: &'static str,
    run: fn(&Bench<'_>) -> Result<(), ConformanceError>,
}

impl Case {
    /// Puts a device through the case.
    ///
    /// # Errors
    /// The first thing that is not as documented.
    pub fn run(&self, device: &dyn Device, precision: Precision) -> Result<(), ConformanceError> {
        (self.run)(&Bench {
            case: self.name,
            device,
            precision,
            kv: KvDtype::default(),
            quantization: None,
        })
    }
}

/// All cases.
#[must_use]
pub fn cases() -> Vec<Case> {
    [
        instructions::CASES,
        linear::CASES,
        quantized::CASES,
        attention::CASES,
        sampling::CASES,
        batches::CASES,
    ]
    .concat()
}

/// Puts a device through all cases.
///
/// # Errors
/// The first case that fails.
pub fn run(device: &dyn Device, precision: Precision) -> Result<(), ConformanceError> {
    cases().iter().try_for_each(|case| case.run(device, precision))
}

/// Tokens of one KV block in cases that do not care.
const BLOCK_TOKENS: usize = 16;

/// A device under test.
struct Bench<'a> {
    case: &'static str,
    device: &'a dyn Device,
    precision: Precision,
    kv: KvDtype,
    quantization: Option<Quantization>,
}

impl Bench<'_> {
    fn options(&self, block_tokens: usize) -> LoadOptions {
        LoadOptions {
            precision: self.precision,
            quantization: self.quantization,
            kv: KvSpec {
                blocks: 64,
                block_tokens,
                dtype: self.kv,
            },
            step_tokens_max: 96,
            sequences_max: 8,
        }
    }

    fn load(&self, build: &Build, block_tokens: usize) -> Result<Box<dyn LoadedProgram>, ConformanceError> {
        let loaded = self
            .device
            .load(&build.program, &build.weights, self.options(block_tokens));
        loaded.map_err(|source| ConformanceError::Device {
            case: self.case.to_owned(),
            source,
        })
    }

    fn step(&self, program: &mut dyn LoadedProgram, batch: &StepBatch) -> Result<Vec<f32>, ConformanceError> {
        let done = program
            .submit(batch)
            .and_then(|()| program.wait())
            .and_then(|()| program.read_output());
        done.map_err(|source| ConformanceError::Device {
            case: self.case.to_owned(),
            source,
        })
    }

    /// Runs steps on device and reference and compares each. The tolerances are fractions of the largest
    /// number expected or of 1: `exact` for f32, `fast` for the device's fast path.
    fn compare(
        &self,
        what: &str,
        build: &Build,
        steps: &[StepBatch],
        (exact, fast): (f64, f64),
        block_tokens: usize,
    ) -> Result<(), ConformanceError> {
        let mut program = self.load(build, block_tokens)?;
        let rounded = self
            .quantization
            .map(|quantization| rounded(&build.program, &build.weights, quantization));
        let weights = rounded.as_ref().unwrap_or(&build.weights);
        let mut reference = Reference::new(&build.program, weights, block_tokens);
        for (index, batch) in steps.iter().enumerate() {
            let got = self.step(program.as_mut(), batch)?;
            let expected = reference.step(batch);
            self.close(&format!("{what} step {index}"), &expected, &got, (exact, fast))?;
        }
        Ok(())
    }

    fn close(
        &self,
        what: &str,
        expected: &[Vec<f64>],
        got: &[f32],
        (exact, fast): (f64, f64),
    ) -> Result<(), ConformanceError> {
        // Inputs and weights are made for outputs of about unit size: few small outputs are off by as much.
        let size = expected
            .iter()
            .flatten()
            .fold(1.0, |size: f64, v| size.max(v.abs()));
        let fraction = if self.precision == Precision::F32 {
            exact
        } else {
            fast
        };
        let tolerance = fraction * size;
        let width = expected.first().map_or(0, Vec::len);
        self.same(&format!("{what}: numbers"), expected.len() * width, got.len())?;
        let is_wrong = |(expected, got): &(&f64, &f32)| {
            let difference = (**expected - f64::from(**got)).abs();
            difference.is_nan() || difference > tolerance
        };
        let pairs = || expected.iter().flatten().zip(got);
        let wrong = pairs().filter(is_wrong).count();
        match pairs().enumerate().find(|(_, pair)| is_wrong(pair)) {
            None => Ok(()),
            Some((at, (&expected, &got))) => Err(ConformanceError::Mismatch {
                case: format!("{} {what}", self.case),
                row: at / width,
                column: at % width,
                expected,
                got,
                tolerance,
                wrong,
                all: pairs().count(),
            }),
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "mostly numbers and literals")]
    fn same<T: PartialEq + std::fmt::Debug>(
        &self,
        what: &str,
        expected: T,
        got: T,
    ) -> Result<(), ConformanceError> {
        if expected == got {
            return Ok(());
        }
        let (expected, got) = (format!("{expected:?}"), format!("{got:?}"));
        Err(ConformanceError::Behaviour {
            case: self.case.to_owned(),
            what: what.to_owned(),
            expected,
            got,
        })
    }
}

/// Sequences of `(position, tokens)`, each with its own blocks; tokens from a small vocabulary; all rows are outputs.
fn batch(sequences: &[(usize, usize)], block_tokens: usize, seed: u64) -> StepBatch {
    let mut numbers = Numbers::new(seed);
    let mut batch = StepBatch::default();
    for (lane, &(position, tokens)) in sequences.iter().enumerate() {
        let first_token = batch.tokens.len();
        batch
            .tokens
            .extend((0..tokens).map(|_| TokenId(numbers.below(build::VOCABULARY))));
        let blocks = (position + tokens).div_ceil(block_tokens);
        // Blocks of a sequence do not follow each other, nor are they in order.
        let lanes = sequences.len();
        let block = |b: usize| BlockId(((blocks - 1 - b) * lanes + lane) as u32);
        let blocks = (0..blocks).map(block).collect();
        batch.sequences.push(SequenceSlice {
            first_token,
            tokens,
            position: position as u32,
            blocks,
        });
    }
    batch.generating = sequences.iter().take_while(|(_, tokens)| *tokens == 1).count();
    batch.output_rows = (0..batch.tokens.len()).collect();
    batch
}
