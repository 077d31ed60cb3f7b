//! Launcher of `sample.cu` and `sample_pick.cu`: the four kernels that answer a round of sampling jobs.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, DeviceView, Launch};

/// Tokens a block works on.
const CHUNK: usize = 4_096;
/// Bins of a row's histogram.
const BINS: usize = 1_024;
/// Most tokens that are sorted at once.
pub const GATHERED_MAX: usize = 4_096;
/// Past this many logits below the largest one, bins end; then times the temperature where that is above 1.
pub const BINS_PER_LOGIT: f32 = (BINS / 32) as f32;
const CHUNK_THREADS: u32 = 256;
const ROW_THREADS: u32 = 1_024;

/// What a job asks, `JobKind` in `sample.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// The most likely token.
    Greedy = 1,
    /// A token drawn.
    Draw = 2,
    /// The most likely tokens.
    List = 3,
}

/// One question about one row, `Job` in `sample.cuh`; offsets are bytes from the upload's beginning.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Job {
    /// [`JobKind`]; 0 is no job.
    pub kind: u32,
    /// Row of the logits.
    pub row: u32,
    /// The mask's words, or [`Job::NO_MASK`].
    pub mask: u32,
    /// Pairs of token and f32 to add.
    pub bias: u32,
    /// Their number.
    pub biases: u32,
    /// Pairs of token and occurrences in the output.
    pub seen: u32,
    /// Their number.
    pub seens: u32,
    /// As in the plan.
    pub top_k: u32,
    /// As in the plan.
    pub repetition: f32,
    /// As in the plan.
    pub frequency: f32,
    /// As in the plan.
    pub presence: f32,
    /// `log2(e) / temperature`.
    pub exponent: f32,
    /// How finely the row's histogram tells logits apart.
    pub bins_per_logit: f32,
    /// `ln(min_p) * temperature`.
    pub min_p_below: f32,
    /// As in the plan.
    pub top_p: f32,
    /// The number that decides the draw.
    pub uniform: f32,
    /// Most tokens listed.
    pub list: u32,
    /// Where among the lists' entries they go.
    pub list_at: u32,
}

impl Job {
    /// No mask.
    pub const NO_MASK: u32 = u32::MAX;
}

/// What came of a job, `Result` in `sample.cuh`.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub struct JobResult {
    /// Sum of the row's weights, in units of [`MASS_OF_ONE`].
    pub total: u64,
    /// The token that came.
    pub token: u32,
    /// Its logit before bias, penalties and mask.
    pub raw: f32,
    /// The row's largest logit, finite.
    pub largest: f32,
    /// Tokens listed.
    pub listed: u32,
}

impl JobResult {
    /// Bytes before the token.
    pub const TOKEN: usize = std::mem::offset_of!(Self, token);
    /// Numbers of 4 bytes from one job's to the next one's.
    pub const WORDS: u32 = (size_of::<Self>() / 4) as u32;
}

/// The mass of the most likely token.
pub const MASS_OF_ONE: f64 = (1_u64 << 39) as f64;

/// An entry of a list, `Listed` in `sample.cuh`.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Listed {
    /// The token.
    pub token: u32,
    /// Its logit, after bias and penalties; minus infinity if it is not a number.
    pub logit: f32,
}

/// `SampleParams` in `sample.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct SampleParams {
    logits: DeviceView,
    upload: DevicePtr,
    scratch: DevicePtr,
    results: DevicePtr,
    job_bytes: u64,
    jobs: u32,
    chunks: u32,
    is_vector: u32,
    padding: u32,
}

/// Where a round's data lie, each aligned to 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The jobs and what they point to.
    pub upload: DevicePtr,
    /// [`scratch_bytes`] per job.
    pub scratch: DevicePtr,
    /// A [`JobResult`] per job, then the lists.
    pub results: DevicePtr,
}

/// Scratch of one job over rows of `width` logits.
#[must_use]
pub const fn scratch_bytes(width: u32) -> usize {
    const CUT: usize = 40;
    const CHUNK_SUMMARY: usize = 24;
    let chunks = (width as usize).div_ceil(CHUNK);
    (BINS * 12 + GATHERED_MAX * 8 + CUT + chunks * CHUNK_SUMMARY).next_multiple_of(256)
}

/// Answers `jobs` jobs about rows of `logits`.
#[must_use]
pub fn sample(logits: DeviceView, addresses: Addresses, jobs: u32) -> [Launch; 4] {
    const ROOM: u32 = (CHUNK * 4) as u32 + 512;
    let chunks = logits.width.div_ceil(CHUNK as u32);
    let params = SampleParams {
        logits,
        upload: addresses.upload,
        scratch: addresses.scratch,
        results: addresses.results,
        job_bytes: scratch_bytes(logits.width) as u64,
        jobs,
        chunks,
        is_vector: u32::from(logits.is_vector_aligned()),
        padding: 0,
    };
    let over_chunks =
        |kernel, shared_bytes| Launch::new(kernel, [chunks, jobs, 1], CHUNK_THREADS, shared_bytes, &params);
    [
        over_chunks("sample_best", ROOM),
        over_chunks("sample_weigh", ROOM + (3 * BINS * 4) as u32),
        over_chunks("sample_gather", ROOM),
        Launch::new(
            "sample_pick",
            [1, jobs, 1],
            ROW_THREADS,
            ROOM + (2 * GATHERED_MAX * 8) as u32,
            &params,
        ),
    ]
}
