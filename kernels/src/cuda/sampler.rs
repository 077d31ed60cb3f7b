//! Requests to sample as the upload and launches of `sample.cu`, and what comes back as outcomes. Knows no driver.
//!
//! A request is a job of its own; one that wants log-probabilities is a second one, about the raw logits. Requests that find no
//! room together go in several rounds of one upload, four launches and one read-back.

use bytemuck::Pod;
use galerne_core::ids::TokenId;
use galerne_core::sampling::{Candidate, TokenLogprobs};

use crate::cuda::driver::{DeviceView, Launch};
use crate::cuda::launch::sample::{
    Addresses, BINS_PER_LOGIT, Job, JobKind, JobResult, Listed, MASS_OF_ONE, sample, scratch_bytes,
};
use crate::device::{SampleOutcome, SampleRequest};

/// Most tokens a request is shown, as candidates or as best ones; it gets no more if it asks for more.
pub const LIST_MAX: usize = 1_024;
/// Entries of lists for which each request finds room beside the others.
const LIST_SHARE: usize = 256;

/// How much memory rounds of sampling take, and what fits into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerRoom {
    width: u32,
    requests_max: usize,
    /// On the host and on the device, aligned to 16 bytes.
    pub upload_bytes: usize,
    /// On the device, aligned to 16 bytes, of any content.
    pub scratch_bytes: usize,
    /// On the device and on the host, aligned to 16 bytes.
    pub result_bytes: usize,
}

/// A round: copy the upload, run the launches, copy the results.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// How many of the requests are in it, from the first on; at least 1.
    pub requests: usize,
    /// How much of the upload was written.
    pub upload_bytes: usize,
    /// How much of the results [`decode`] needs.
    pub result_bytes: usize,
    /// What to run.
    pub launches: [Launch; 4],
}

/// What requests take together.
#[derive(Debug, Clone, Copy, Default)]
struct Use {
    jobs: usize,
    data_bytes: usize,
    listed: usize,
}

impl Use {
    fn with(self, request: &SampleRequest<'_>, width: u32) -> Self {
        let mask_bytes = request
            .mask
            .map_or(0, |mask| size_of_val(mask).next_multiple_of(8));
        let edits = request.plan.bias.len() + seen(request, width).len();
        Self {
            jobs: self.jobs + 1 + usize::from(wants_logprobs(request)),
            data_bytes: self.data_bytes + mask_bytes + edits * 8,
            listed: self.listed + candidates(request) + best(request),
        }
    }
}

impl SamplerRoom {
    /// For rows of `width` logits and at most `requests_max` requests in a round.
    #[must_use]
    pub const fn new(width: u32, requests_max: usize) -> Self {
        let jobs = 2 * requests_max;
        let mask_bytes = (width as usize).div_ceil(32).next_multiple_of(2) * 4;
        // One request can have a bias and a penalty for every token.
        let edit_bytes = width as usize * 16;
        Self {
            width,
            requests_max,
            upload_bytes: jobs * size_of::<Job>() + requests_max * mask_bytes + edit_bytes,
            scratch_bytes: jobs * scratch_bytes(width),
            result_bytes: jobs * size_of::<JobResult>()
                + (2 * LIST_MAX + requests_max * LIST_SHARE) * size_of::<Listed>(),
        }
    }

    /// Writes the round of as many requests as find room, at least one, from the first on. They have been checked; rows
    /// are of `logits`, as wide as this room is made for; the upload is as long.
    #[must_use]
    pub fn encode(
        &self,
        requests: &[SampleRequest<'_>],
        logits: DeviceView,
        addresses: Addresses,
        upload: &mut [u8],
    ) -> Round {
        let (taken, used) = self.fitting(requests);
        let requests = &requests[..taken];
        let mut upload = Upload {
            bytes: upload,
            end: used.jobs * size_of::<Job>(),
        };
        for (request, slot) in requests.iter().zip(slots(requests)) {
            let job = upload.job(request, slot, self.width);
            upload.put_job(slot.job, &job);
            if let Some(raw) = slot.raw_job {
                upload.put_job(raw, &raw_job(request, slot));
            }
        }
        Round {
            requests: taken,
            upload_bytes: upload.end,
            result_bytes: used.jobs * size_of::<JobResult>() + used.listed * size_of::<Listed>(),
            launches: sample(logits, addresses, used.jobs as u32),
        }
    }

    /// Whether one round has room for all.
    #[must_use]
    pub fn fits(&self, requests: &[SampleRequest<'_>]) -> bool {
        self.fitting(requests).0 == requests.len()
    }

    fn fitting(&self, requests: &[SampleRequest<'_>]) -> (usize, Use) {
        let mut used = Use::default();
        for (taken, request) in requests.iter().enumerate() {
            let more = used.with(request, self.width);
            let upload_bytes = more.jobs * size_of::<Job>() + more.data_bytes;
            let result_bytes = more.jobs * size_of::<JobResult>() + more.listed * size_of::<Listed>();
            let fits = taken < self.requests_max
                && upload_bytes <= self.upload_bytes
                && result_bytes <= self.result_bytes;
            if !fits {
                return (taken, used);
            }
            used = more;
        }
        (requests.len(), used)
    }
}

/// The outcomes of a round's requests from the bytes its launches left.
#[must_use]
pub fn decode(requests: &[SampleRequest<'_>], results: &[u8]) -> Vec<SampleOutcome> {
    let jobs = requests.len() + requests.iter().filter(|r| wants_logprobs(r)).count();
    let results = Results { bytes: results, jobs };
    let outcome = |(request, slot): (&SampleRequest<'_>, Slot)| {
        let result = results.job(slot.job);
        if request.plan.candidates > 0 {
            return SampleOutcome::Candidates(if request.plan.temperature > 0.0 {
                results.list(slot.job, slot.list_at, factor(request.plan.temperature))
            } else {
                // The limit of ever lower temperatures: all probability on one token.
                let token = TokenId(result.token);
                vec![Candidate { token, logprob: 0.0 }]
            });
        }
        let logprobs = |raw: usize| TokenLogprobs {
            logprob: logprob(&results.job(raw), result.raw, 1.0),
            top: results.list(raw, slot.raw_list_at, 1.0),
        };
        SampleOutcome::Token {
            token: TokenId(result.token),
            logprobs: slot.raw_job.map(logprobs),
        }
    };
    requests.iter().zip(slots(requests)).map(outcome).collect()
}

/// Where a request's jobs and lists are.
#[derive(Debug, Clone, Copy)]
struct Slot {
    job: usize,
    raw_job: Option<usize>,
    list_at: usize,
    raw_list_at: usize,
}

fn slots<'a>(requests: &'a [SampleRequest<'a>]) -> impl Iterator<Item = Slot> + 'a {
    let (mut next_raw, mut next_entry) = (requests.len(), 0);
    requests.iter().enumerate().map(move |(job, request)| {
        let raw_job = wants_logprobs(request).then_some(next_raw);
        let list_at = next_entry;
        let raw_list_at = list_at + candidates(request);
        next_raw += usize::from(raw_job.is_some());
        next_entry = raw_list_at + best(request);
        Slot {
            job,
            raw_job,
            list_at,
            raw_list_at,
        }
    })
}

/// Whether the outcome is a token with log-probabilities.
fn wants_logprobs(request: &SampleRequest<'_>) -> bool {
    request.plan.candidates == 0 && request.logprobs.is_some()
}

/// Most candidates that come from the device as a list.
fn candidates(request: &SampleRequest<'_>) -> usize {
    if request.plan.temperature > 0.0 {
        LIST_MAX.min(request.plan.candidates as usize)
    } else {
        0
    }
}

/// Most best tokens.
fn best(request: &SampleRequest<'_>) -> usize {
    match request.logprobs {
        Some(top) if wants_logprobs(request) => LIST_MAX.min(top as usize),
        _ => 0,
    }
}

/// What the penalties apply to.
fn seen<'a>(request: &SampleRequest<'a>, width: u32) -> &'a [crate::device::TokenCount] {
    let plan = request.plan;
    let is_neutral =
        plan.repetition_penalty == 1.0 && plan.frequency_penalty == 0.0 && plan.presence_penalty == 0.0;
    let count = if is_neutral {
        0
    } else {
        request.seen.len().min(width as usize)
    };
    &request.seen[..count]
}

/// One over the temperature, finite.
fn factor(temperature: f32) -> f32 {
    (1.0 / temperature).min(f32::MAX)
}

fn job(kind: JobKind, row: usize, factor: f32) -> Job {
    Job {
        kind: kind as u32,
        row: row as u32,
        mask: Job::NO_MASK,
        repetition: 1.0,
        exponent: (factor * std::f32::consts::LOG2_E).min(f32::MAX),
        bins_per_logit: BINS_PER_LOGIT * factor.min(1.0),
        min_p_below: f32::NEG_INFINITY,
        top_p: 1.0,
        ..bytemuck::Zeroable::zeroed()
    }
}

fn raw_job(request: &SampleRequest<'_>, slot: Slot) -> Job {
    Job {
        list: best(request) as u32,
        list_at: slot.raw_list_at as u32,
        ..job(JobKind::List, request.row, 1.0)
    }
}

/// An upload being written: jobs in their places, then what they point to.
struct Upload<'a> {
    bytes: &'a mut [u8],
    end: usize,
}

impl Upload<'_> {
    fn job(&mut self, request: &SampleRequest<'_>, slot: Slot, width: u32) -> Job {
        let plan = request.plan;
        let kind = match (plan.temperature > 0.0, plan.candidates > 0) {
            (false, _) => JobKind::Greedy,
            (true, false) => JobKind::Draw,
            (true, true) => JobKind::List,
        };
        let factor = factor(plan.temperature);
        let mut biases: Vec<(u32, f32)> = plan.bias.iter().map(|(token, bias)| (token.0, *bias)).collect();
        // Threads add them, each its own token's.
        biases.sort_by_key(|(token, _)| *token);
        biases.dedup_by(|next, kept| {
            let is_same = next.0 == kept.0;
            if is_same {
                kept.1 += next.1;
            }
            is_same
        });
        let seen = seen(request, width);
        Job {
            mask: request.mask.map_or(Job::NO_MASK, |mask| self.put_mask(mask)),
            biases: biases.len() as u32,
            bias: self.put(biases.into_iter().map(|(token, bias)| [token, bias.to_bits()])),
            seens: seen.len() as u32,
            seen: self.put(seen.iter().map(|count| [count.token.0, count.output])),
            top_k: plan.top_k,
            repetition: plan.repetition_penalty,
            frequency: plan.frequency_penalty,
            presence: plan.presence_penalty,
            min_p_below: if plan.min_p > 0.0 {
                plan.min_p.ln() / factor
            } else {
                f32::NEG_INFINITY
            },
            top_p: plan.top_p,
            uniform: request.uniform,
            list: candidates(request) as u32,
            list_at: slot.list_at as u32,
            ..job(kind, request.row, factor)
        }
    }

    fn put_job(&mut self, index: usize, job: &Job) {
        let bytes = bytemuck::bytes_of(job);
        self.bytes[index * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
    }

    fn put_mask(&mut self, mask: &[u32]) -> u32 {
        let start = self.end;
        let bytes: &[u8] = bytemuck::cast_slice(mask);
        self.bytes[start..][..bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len().next_multiple_of(8);
        start as u32
    }

    fn put(&mut self, pairs: impl Iterator<Item = [u32; 2]>) -> u32 {
        let start = self.end;
        for pair in pairs {
            self.bytes[self.end..][..8].copy_from_slice(bytemuck::bytes_of(&pair));
            self.end += 8;
        }
        start as u32
    }
}

/// A round's results.
struct Results<'a> {
    bytes: &'a [u8],
    jobs: usize,
}

impl Results<'_> {
    fn get<T: Pod>(&self, start: usize, index: usize) -> T {
        bytemuck::pod_read_unaligned(&self.bytes[start + index * size_of::<T>()..][..size_of::<T>()])
    }

    fn job(&self, index: usize) -> JobResult {
        self.get(0, index)
    }

    fn list(&self, job: usize, at: usize, factor: f32) -> Vec<Candidate> {
        let result = self.job(job);
        let entry = |i| {
            let Listed { token, logit } = self.get(self.jobs * size_of::<JobResult>(), at + i);
            Candidate {
                token: TokenId(token),
                logprob: logprob(&result, logit, factor),
            }
        };
        (0..result.listed as usize).map(entry).collect()
    }
}

/// The log-probability of a token in the row of a job.
fn logprob(job: &JobResult, logit: f32, factor: f32) -> f32 {
    let logit = if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit.min(f32::MAX)
    };
    // A row without a number has no mass.
    let total = (job.total as f64 / MASS_OF_ONE).max(f64::from(f32::MIN_POSITIVE));
    (logit - job.largest) * factor - total.ln() as f32
}
