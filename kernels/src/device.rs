//! The boundary between the engine and an accelerator: few object-safe methods, work submitted whole.

use galerne_core::ids::{BlockId, TokenId};
use galerne_core::sampling::{Candidate, SamplingPlan, TokenLogprobs};
use galerne_core::weights::WeightSource;

use crate::batch::check_drawn;
use crate::program::Program;

/// How exactly a device computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// The device's fast path: activations may be quantized for matmuls, KV as [`KvSpec::dtype`] says.
    Auto,
    /// Everything in f32: weights dequantized exactly, KV in f32 whatever the spec says.
    F32,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// 16 bits with f32's range.
    #[default]
    Bf16,
    /// 16 bits, more exact; larger numbers than 65,504 are stored as that.
    F16,
    /// As computed.
    F32,
    /// 8 bits with one f32 scale per token and head, for keys and for values.
    Int8,
    /// 8-bit floats (e4m3) without scales: 3 bits after the first one; larger numbers than 448 are stored as that.
    Fp8,
}

impl KvDtype {
    /// Bytes one head's key and value of one token take, of `width` elements each, without padding.
    #[must_use]
    pub const fn token_bytes(self, width: usize) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 4 * width,
            Self::F32 => 8 * width,
            Self::Int8 => 2 * width + 8,
            Self::Fp8 => 2 * width,
        }
    }
}

/// The KV pool a program is loaded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSpec {
    /// Blocks in the pool.
    pub blocks: usize,
    /// Tokens in one block.
    pub block_tokens: usize,
    /// How they are stored under [`Precision::Auto`].
    pub dtype: KvDtype,
}

/// What weights are rounded to while they are loaded, if they are stored as 16- or 32-bit floats and belong to linear maps of
/// tokens' rows or to experts. Tables, routers, norms, biases and the map to the logits stay as stored: what vLLM's online
/// quantization leaves alone too. Nothing is calibrated: each number goes to the nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// 8-bit floats (e4m3) with one f32 factor per output.
    Fp8,
    /// The same; under [`Precision::Auto`] activations of many rows become 8-bit floats too, with a factor per row, where the device
    /// multiplies such.
    Fp8W8A8,
    /// 4-bit integers with an f16 scale and a zero per 128 inputs.
    Int4,
    /// 4-bit floats (e2m1) with an e4m3 scale per 16 inputs and an f32 factor per output.
    Nvfp4,
}

impl Quantization {
    /// All.
    pub const ALL: [Self; 4] = [Self::Fp8, Self::Fp8W8A8, Self::Int4, Self::Nvfp4];
}

/// How a program is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// How exactly to compute.
    pub precision: Precision,
    /// What weights are rounded to, under every precision; as stored if not given.
    pub quantization: Option<Quantization>,
    /// The KV pool.
    pub kv: KvSpec,
    /// Most tokens in one step; buffers are sized for it once.
    pub step_tokens_max: usize,
    /// Most sequences in one step.
    pub sequences_max: usize,
}

impl LoadOptions {
    /// How keys and values are stored, for the precision asked for.
    #[must_use]
    pub const fn kv_dtype(&self) -> KvDtype {
        match self.precision {
            Precision::Auto => self.kv.dtype,
            Precision::F32 => KvDtype::F32,
        }
    }
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// For example `cpu`.
    pub name: String,
    /// Instruction set or architecture in use, for example `avx512-vnni`.
    pub isa: String,
    /// Worker threads, or streaming multiprocessors.
    pub threads: usize,
    /// Tokens of a KV block that suit it.
    pub block_tokens: usize,
    /// Most tokens of a step that suit it.
    pub step_tokens: usize,
    /// Bytes of its own memory that nobody has taken; none if it computes in the machine's.
    pub free_bytes: Option<usize>,
}

/// Why a device could not do something.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// The program uses something this device lacks.
    #[error("device {device} does not implement {op}; use another device or another model")]
    Unsupported {
        /// The device's name.
        device: &'static str,
        /// The op or dtype.
        op: String,
    },
    /// A weight the program names is not there or has another shape.
    #[error(
        "weight \"{name}\": expected {expected}, got {got}; do config.json and the weight file belong together?"
    )]
    Weight {
        /// Its name.
        name: String,
        /// What the program needs.
        expected: String,
        /// What there is.
        got: String,
    },
    /// A program's instruction does not fit its buffers or weights: a host bug.
    #[error(
        "program: instruction {instr}: {what}: expected {expected}, got {got}; this is a bug in the lowering"
    )]
    Program {
        /// Its index in [`Program::instrs`]; one past the last for the output.
        instr: usize,
        /// The operand.
        what: &'static str,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A batch breaks the contract of [`StepBatch`]: a host bug.
    #[error("step batch: {what}: expected {expected}, got {got}")]
    Batch {
        /// The field.
        what: &'static str,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// Memory could not be had.
    #[error(
        "device memory: {needed_bytes} bytes for {what} could not be allocated; lower --kv-blocks or use a smaller model"
    )]
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        needed_bytes: usize,
    },
    /// A worker died: a host bug.
    #[error("device {device} failed while running a step: {reason}")]
    Failed {
        /// The device's name.
        device: &'static str,
        /// What is known.
        reason: String,
    },
}

/// One sequence's tokens in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSlice {
    /// Index of its first token in [`StepBatch::tokens`]; slices follow each other without gaps.
    pub first_token: usize,
    /// Number of its tokens, at least 1.
    pub tokens: usize,
    /// Position in the sequence of its first token: the number of tokens already in the KV blocks.
    pub position: u32,
    /// KV blocks by position: token `p` lies in block `blocks[p / block_tokens]`. Long enough for the step's tokens.
    pub blocks: Vec<BlockId>,
}

/// The tokens of one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepBatch {
    /// All tokens, sequence after sequence.
    pub tokens: Vec<TokenId>,
    /// The sequences they belong to.
    pub sequences: Vec<SequenceSlice>,
    /// How many of them, the first ones, go on with what they have generated; the others work through a prompt. A device may
    /// compute prompts' rows in a faster way that rounds otherwise, and all rows, output rows too, if many are generated.
    /// Beside that, a row's result does not depend on its batch.
    pub generating: usize,
    /// Indices into `tokens` of the rows whose output is wanted, ascending.
    pub output_rows: Vec<usize>,
}

/// What has been seen of a token, for penalties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCount {
    /// The token.
    pub token: TokenId,
    /// Occurrences in the output (0 if only in the prompt).
    pub output: u32,
}

/// A request to draw one token from a row of the last step's logits.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// Row of the output: index into [`StepBatch::output_rows`].
    pub row: usize,
    /// How; already checked. `forced` is handled by the engine and ignored here.
    pub plan: &'a SamplingPlan,
    /// If set, the tokens that may be drawn, at least one: token `t` if bit `t % 32` of word `t / 32` is set. As many words
    /// as the row's width needs; bits past it are ignored. Other tokens count as if they were not in the vocabulary, but
    /// for `logprobs`.
    pub mask: Option<&'a [u32]>,
    /// Every distinct token of prompt and output, if the plan has penalties; else may be empty.
    pub seen: &'a [TokenCount],
    /// A uniform number in `[0, 1)` that decides the draw.
    pub uniform: f32,
    /// If set, the log-probability (under the raw logits, before the plan) of the drawn token and of this many best ones.
    pub logprobs: Option<u32>,
}

/// What came of a [`SampleRequest`].
#[derive(Debug, Clone, PartialEq)]
pub enum SampleOutcome {
    /// A token was drawn.
    Token {
        /// The token.
        token: TokenId,
        /// If they were asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The plan asked for candidates: most likely first, at least one, at most `plan.candidates`, after the
    /// plan's bias, penalties, temperature and filters. Log-probabilities are under the temperature-scaled,
    /// penalised distribution over the whole vocabulary, before the filters.
    Candidates(Vec<Candidate>),
}

/// An accelerator, or the CPU.
pub trait Device: Send + Sync {
    /// What it is.
    fn info(&self) -> DeviceInfo;

    /// Loads a program with its weights and a KV pool. All memory of later steps is taken here.
    ///
    /// # Errors
    /// An op or dtype this device lacks, a missing weight, or not enough memory.
    fn load(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        options: LoadOptions,
    ) -> Result<Box<dyn LoadedProgram>, DeviceError>;
}

/// A program with its weights and KV pool on a device. One step at a time.
pub trait LoadedProgram: Send {
    /// Starts a step and returns while it runs.
    ///
    /// # Errors
    /// A batch that breaks its contract; nothing was started. Or the device failed; the program is unusable.
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError>;

    /// Waits for the step that was submitted last.
    ///
    /// # Errors
    /// The device failed; the program is unusable.
    fn wait(&mut self) -> Result<(), DeviceError>;

    /// Whether the last step is still running on its own. A device that needs the caller's thread or cores to get on says
    /// no: then [`LoadedProgram::wait`] is the thing to do.
    ///
    /// # Errors
    /// The device failed.
    fn is_running(&mut self) -> Result<bool, DeviceError> {
        Ok(false)
    }

    /// Draws tokens from the last step's logits, in the order of the requests. It waits for the step by itself; asked while
    /// the step runs, a device goes from one to the other without the host in between.
    ///
    /// # Errors
    /// The device failed.
    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError>;

    /// Whether [`sample_and_submit`](Self::sample_and_submit) keeps the device busy where it would wait for the host otherwise.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Draws as [`sample`](Self::sample) does and starts the next step before anybody has seen what was drawn; returns the
    /// outcomes while that step runs. Token `t` of the step is what request `drawn[t]` drew, whatever stands in
    /// `next.tokens`; each sequence has one. No request asks for candidates. Steps and block copies run one after the other,
    /// so that `next` may write to blocks that are given to another sequence as soon as this returns.
    ///
    /// # Errors
    /// A batch that breaks its contract, or the device failed. What was drawn is lost.
    fn sample_and_submit(
        &mut self,
        requests: &[SampleRequest<'_>],
        next: &StepBatch,
        drawn: &[usize],
    ) -> Result<Vec<SampleOutcome>, DeviceError> {
        sample_then_submit(self, requests, next, drawn)
    }

    /// The last step's output rows, `[outputs, width]` row-major, f32. For tests, embeddings and measurements.
    ///
    /// # Errors
    /// The device failed.
    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError>;

    /// Copies KV blocks, all layers, `(from, to)`. Pairs do not overlap.
    ///
    /// # Errors
    /// The device failed.
    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError>;

    /// Overwrites KV blocks with zeros, all layers: before a block goes from one tenant to another.
    ///
    /// # Errors
    /// The device failed.
    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError>;

    /// Bytes of weights and of the KV pool as held.
    fn memory(&self) -> MemoryUse;
}

/// Bytes a loaded program holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Weights, repacked copies included.
    pub weight_bytes: usize,
    /// The KV pool.
    pub kv_bytes: usize,
    /// Buffers and workspaces.
    pub workspace_bytes: usize,
}

/// [`LoadedProgram::sample_and_submit`] with the host in between.
pub(crate) fn sample_then_submit<P: LoadedProgram + ?Sized>(
    program: &mut P,
    requests: &[SampleRequest<'_>],
    next: &StepBatch,
    drawn: &[usize],
) -> Result<Vec<SampleOutcome>, DeviceError> {
    check_drawn(requests, next, drawn)?;
    let outcomes = program.sample(requests)?;
    let mut next = next.clone();
    for (token, request) in next.tokens.iter_mut().zip(drawn) {
        if let SampleOutcome::Token { token: drawn, .. } = outcomes[*request] {
            *token = drawn;
        }
    }
    program.submit(&next)?;
    Ok(outcomes)
}
