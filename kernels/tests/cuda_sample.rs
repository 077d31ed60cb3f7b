//! The CUDA sampler on the shim: the conformance suite's sampling, and what tokens come against a full sort in f64.
#![expect(
    unsafe_code,
    reason = "launches read and write raw memory, which the tests allocate"
)]

use galerne_core::ids::{BlockId, TokenId};
use galerne_core::sampling::{Candidate, SamplingPlan};
use galerne_core::weights::WeightSource;
use galerne_cuda_shim::{Memory, Shim};
use galerne_kernels::conformance::{Numbers, cases};
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::cuda::driver::{DeviceView, Driver};
use galerne_kernels::cuda::launch::sample::{Addresses, SampleParams};
use galerne_kernels::cuda::sampler::{SamplerRoom, decode};
use galerne_kernels::device::{
    Device, DeviceError, DeviceInfo, LoadOptions, LoadedProgram, MemoryUse, Precision, SampleOutcome,
    SampleRequest, StepBatch, TokenCount,
};
use galerne_kernels::program::Program;
use proptest::prelude::*;

/// Serves requests in rounds of a room, as a device does.
fn sample(
    shim: &Shim,
    logits: DeviceView,
    room: &SamplerRoom,
    requests: &[SampleRequest<'_>],
) -> Vec<SampleOutcome> {
    let device_upload: Memory<'_, u8> = shim.poisoned(room.upload_bytes);
    let scratch: Memory<'_, u8> = shim.poisoned(room.scratch_bytes);
    let results: Memory<'_, u8> = shim.poisoned(room.result_bytes);
    let addresses = Addresses {
        upload: device_upload.at(),
        scratch: scratch.at(),
        results: results.at(),
    };
    let mut upload = vec![0xff; room.upload_bytes];
    let mut outcomes = Vec::new();
    while outcomes.len() < requests.len() {
        let rest = &requests[outcomes.len()..];
        let round = room.encode(rest, logits, addresses, &mut upload);
        assert!(round.requests > 0, "no request found room");
        // SAFETY: everything was allocated as large as the room says.
        unsafe {
            shim.write(addresses.upload, &upload[..round.upload_bytes])
                .expect("the upload has room");
            shim.enqueue(&round.launches).expect("kernels run");
        }
        let bytes = results.read();
        outcomes.extend(decode(&rest[..round.requests], &bytes[..round.result_bytes]));
    }
    outcomes
}

/// Rows in device memory, from `start` on, `gap` numbers apart; vectors can be read if both are multiples of 4.
struct Rows<'s> {
    memory: Memory<'s, f32>,
    start: u32,
    stride: u32,
    width: u32,
}

impl<'s> Rows<'s> {
    fn new(shim: &'s Shim, rows: &[Vec<f32>], start: u32, gap: u32) -> Self {
        let width = rows[0].len() as u32;
        let mut numbers = vec![f32::MAX; start as usize];
        for (i, row) in rows.iter().enumerate() {
            if i > 0 {
                numbers.extend(std::iter::repeat_n(f32::MAX, gap as usize));
            }
            numbers.extend(row);
        }
        Self {
            memory: shim.memory(&numbers),
            start,
            stride: width + gap,
            width,
        }
    }

    fn view(&self) -> DeviceView {
        self.memory.view(self.stride, self.start, self.width)
    }
}

fn plan(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> SamplingPlan {
    SamplingPlan {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingPlan::default()
    }
}

fn request(row: usize, plan: &SamplingPlan, uniform: f32) -> SampleRequest<'_> {
    SampleRequest {
        row,
        plan,
        mask: None,
        seen: &[],
        uniform,
        logprobs: None,
    }
}

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
fn check(row: &[f32], request: &SampleRequest<'_>, outcome: &SampleOutcome) -> Result<(), String> {
    let ordered = ordered(row, request);
    let plan = request.plan;
    let (token, logprobs) = match outcome {
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
    let raw = self::ordered(row, &self::request(request.row, &raw_plan, 0.0));
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

#[test]
fn the_parameter_struct_is_the_kernels() {
    let kernels = galerne_cuda_shim::kernels();
    for name in ["sample_best", "sample_weigh", "sample_gather", "sample_pick"] {
        let bytes = kernels
            .iter()
            .find(|(kernel, _)| kernel == name)
            .map(|(_, bytes)| *bytes);
        assert_eq!(bytes, Some(size_of::<SampleParams>()), "{name}");
    }
}

/// The CPU device, but for drawing.
struct Wrapped(CpuDevice);

struct WrappedProgram {
    inner: Box<dyn LoadedProgram>,
    width: usize,
}

impl Device for Wrapped {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }

    fn load(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        options: LoadOptions,
    ) -> Result<Box<dyn LoadedProgram>, DeviceError> {
        Ok(Box::new(WrappedProgram {
            inner: self.0.load(program, weights, options)?,
            width: program.output.width as usize,
        }))
    }
}

impl LoadedProgram for WrappedProgram {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.inner.submit(batch)
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        self.inner.wait()
    }

    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
        // What is refused is the gate's business, which all devices share.
        self.inner.sample(requests)?;
        let output = self.inner.read_output()?;
        let rows: Vec<Vec<f32>> = output.chunks(self.width).map(<[f32]>::to_vec).collect();
        let shim = Shim::new(output.len() as u64);
        let rows = Rows::new(&shim, &rows, 0, 0);
        let room = SamplerRoom::new(rows.width, 2);
        Ok(sample(&shim, rows.view(), &room, requests))
    }

    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
        self.inner.read_output()
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
        self.inner.copy_blocks(pairs)
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.inner.zero_blocks(blocks)
    }

    fn memory(&self) -> MemoryUse {
        self.inner.memory()
    }
}

#[test]
fn conforms() {
    const SAMPLING: [&str; 7] = [
        "greedy",
        "draws against a full sort",
        "draws from long rows, flat, peaked and full of ties",
        "bias and penalties",
        "candidates and log-probabilities",
        "logits that are not numbers",
        "masks",
    ];
    let device = Wrapped(CpuDevice::new(CpuOptions::default()).expect("a CPU"));
    let mut run = 0;
    for case in cases().iter().filter(|case| SAMPLING.contains(&case.name)) {
        run += 1;
        if let Err(error) = case.run(&device, Precision::F32) {
            panic!("{error}");
        }
    }
    assert_eq!(run, SAMPLING.len(), "cases of the suite");
}

/// Rows as wide as vocabularies are: as models make them, flat, full of ties, one token nearly certain.
fn wide_rows(width: usize) -> Vec<Vec<f32>> {
    let tied: Vec<f32> = Numbers::new(3)
        .normals(width, 2.0)
        .iter()
        .map(|x| x.round())
        .collect();
    let mut certain = Numbers::new(4).normals(width, 1.0);
    certain[width - 1] = 40.0;
    vec![
        Numbers::new(1).normals(width, 2.5),
        Numbers::new(2).normals(width, 0.01),
        tied,
        certain,
    ]
}

#[test]
fn wide_rows_are_drawn_from_as_a_full_sort_draws() {
    const WIDTH: usize = 128_256;
    let shim = Shim::new(1);
    let rows = wide_rows(WIDTH);
    let memory = Rows::new(&shim, &rows, 0, 0);
    let mut numbers = Numbers::new(5);
    let half: Vec<u32> = (0..WIDTH.div_ceil(32))
        .map(|_| numbers.next_bits() as u32)
        .collect();
    let mut few = vec![0; WIDTH.div_ceil(32)];
    (few[0], few[2_000], few[4_007]) = (1 << 31, 0xff, 1 << 31);
    let candidates = SamplingPlan {
        candidates: 256,
        ..plan(0.2, 0, 0.99, 0.0)
    };
    let plans = [
        plan(0.0, 0, 1.0, 0.0),
        plan(1.0, 0, 1.0, 0.0),
        plan(0.7, 0, 0.9, 0.0),
        plan(1.0, 40, 0.95, 0.05),
        plan(2.0, 20_000, 0.9, 0.0),
        candidates,
    ];
    let mut requests = Vec::new();
    for row in 0..rows.len() {
        for (i, plan) in plans.iter().enumerate() {
            let uniform = numbers.below(1 << 24) as f32 / (1 << 24) as f32;
            requests.push(SampleRequest {
                mask: [None, Some(&half[..]), Some(&few[..])][(row + i) % 3],
                logprobs: (i % 3 == 0).then_some(20),
                ..request(row, plan, uniform)
            });
        }
    }
    let outcomes = sample(
        &shim,
        memory.view(),
        &SamplerRoom::new(WIDTH as u32, 8),
        &requests,
    );
    for (request, outcome) in requests.iter().zip(&outcomes) {
        if let Err(error) = check(&rows[request.row], request, outcome) {
            panic!("row {}, {:?}: {error}", request.row, request.plan);
        }
    }
}

#[test]
fn equal_logits_are_drawn_exactly() {
    const WIDTH: usize = 10_000;
    let shim = Shim::new(2);
    let rows = Rows::new(&shim, &[vec![-3.5; WIDTH]], 0, 0);
    let room = SamplerRoom::new(WIDTH as u32, 64);
    // Of equal tokens, a part of the probability is the same part of the tokens.
    for (plan, kept) in [
        (plan(1.0, 0, 1.0, 0.0), WIDTH),
        (plan(1.0, 0, 0.5, 0.0), WIDTH / 2),
        (plan(1.0, 8_000, 1.0, 1.0), 8_000),
        (plan(1.0, 8_000, 0.75, 0.0), 6_000),
        (plan(1.0, 50, 1.0, 0.0), 50),
    ] {
        let uniforms = [0.0, 0.25, 0.5, 0.999_999_94];
        let requests: Vec<_> = uniforms.iter().map(|&u| request(0, &plan, u)).collect();
        let outcomes = sample(&shim, rows.view(), &room, &requests);
        for (uniform, outcome) in uniforms.iter().zip(outcomes) {
            let token = (f64::from(*uniform) * kept as f64) as u32;
            let expected = SampleOutcome::Token {
                token: TokenId(token),
                logprobs: None,
            };
            assert_eq!(outcome, expected, "{plan:?}, uniform {uniform}");
        }
    }
}

#[test]
fn a_bias_and_a_penalty_for_every_token_find_room() {
    const WIDTH: usize = 9_001;
    let shim = Shim::new(3);
    let rows = [
        Numbers::new(6).normals(WIDTH, 2.0),
        Numbers::new(7).normals(WIDTH, 2.0),
    ];
    let memory = Rows::new(&shim, &rows, 3, 2);
    let mut numbers = Numbers::new(8);
    let bias = (0..WIDTH as u32)
        .map(|t| (TokenId(t), numbers.normal(3.0)))
        .collect();
    let mut seen: Vec<TokenCount> = (0..WIDTH as u32)
        .map(|t| TokenCount {
            token: TokenId(t),
            output: t % 3,
        })
        .collect();
    seen.sort_by_key(|count| count.token.0.wrapping_mul(0x9e37_79b9));
    let plan = SamplingPlan {
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: -0.7,
        bias,
        ..plan(0.8, 0, 0.9, 0.0)
    };
    let mask = vec![0x7fff_fffe; WIDTH.div_ceil(32)];
    let requests: Vec<_> = (0..6)
        .map(|i| SampleRequest {
            seen: &seen,
            mask: Some(&mask),
            logprobs: Some(2_000),
            ..request(i % 2, &plan, 0.15 * i as f32)
        })
        .collect();
    let few = SamplingPlan {
        // The same token twice adds up.
        bias: vec![(TokenId(8_999), 30.0), (TokenId(4), 40.0), (TokenId(8_999), 30.0)],
        ..self::plan(1.0, 0, 1.0, 0.0)
    };
    let few = [request(0, &few, 0.5)];
    let room = SamplerRoom::new(WIDTH as u32, 4);
    for requests in [&requests[..], &few] {
        for (request, outcome) in requests.iter().zip(sample(&shim, memory.view(), &room, requests)) {
            let limited = SampleRequest {
                // Lists end at what the device sorts for one request.
                logprobs: request.logprobs.map(|top| top.min(1_024)),
                ..*request
            };
            if let Err(error) = check(&rows[request.row], &limited, &outcome) {
                panic!("{error}");
            }
        }
    }
}

/// One request of a property test, made from a few numbers.
#[derive(Debug, Clone)]
struct Wish {
    plan: SamplingPlan,
    mask: Option<Vec<u32>>,
    seen: Vec<TokenCount>,
    uniform: f32,
    logprobs: Option<u32>,
}

fn wish(width: u32) -> impl Strategy<Value = Wish> {
    let temperature = prop_oneof![Just(0.0_f32), Just(1.0), 0.02_f32..3.0];
    let top_k = prop_oneof![Just(0_u32), 1..60_u32, 1..2 * width];
    let top_p = prop_oneof![Just(1.0_f32), 0.0_f32..1.0];
    let min_p = prop_oneof![Just(0.0_f32), 0.0_f32..1.0];
    let candidates = prop_oneof![4 => Just(0_u32), 1 => 1..300_u32];
    let filters = (temperature, top_k, top_p, min_p, candidates);
    let changes = (any::<u64>(), 0..40_u32, any::<bool>());
    let logprobs = prop_oneof![Just(None), (0..30_u32).prop_map(Some)];
    (filters, changes, 0_u32..1 << 24, logprobs).prop_map(move |(filters, changes, uniform, logprobs)| {
        let (temperature, top_k, top_p, min_p, candidates) = filters;
        let (seed, edits, has_mask) = changes;
        let mut numbers = Numbers::new(seed);
        let mut seen: Vec<TokenCount> = (0..edits)
            .map(|_| TokenCount {
                token: TokenId(numbers.below(width)),
                output: numbers.below(3),
            })
            .collect();
        seen.sort_by_key(|count| count.token.0);
        seen.dedup_by_key(|count| count.token.0);
        let mut mask: Vec<u32> = (0..width.div_ceil(32))
            .map(|_| numbers.next_bits() as u32 & numbers.next_bits() as u32)
            .collect();
        mask[0] |= 1;
        Wish {
            plan: SamplingPlan {
                candidates,
                repetition_penalty: 1.5,
                presence_penalty: 0.5,
                bias: vec![(TokenId(numbers.below(width)), 3.0); edits as usize % 2],
                ..plan(temperature, top_k, top_p, min_p)
            },
            mask: has_mask.then_some(mask),
            seen,
            uniform: uniform as f32 / (1 << 24) as f32,
            logprobs,
        }
    })
}

/// Rows of one width, narrow and wide ones, with few and many equal logits, and wishes about them.
fn batch() -> impl Strategy<Value = (Vec<Vec<f32>>, Vec<Wish>, u64)> {
    let shapes = prop_oneof![
        Just((0.0_f32, 1.0_f32)),
        Just((0.01, 1e-6)),
        Just((3.0, 0.5)),
        Just((8.0, 1e-4)),
        Just((30.0, 1e-4))
    ];
    let width = prop_oneof![1_u32..40, 4_000..4_200_u32, 1..9_000_u32];
    (shapes, width, any::<u64>()).prop_flat_map(|((size, step), width, seed)| {
        let mut numbers = Numbers::new(seed);
        let mut row = || -> Vec<f32> {
            (0..width)
                .map(|_| (numbers.normal(size) / step).round() * step)
                .collect()
        };
        let rows = vec![row(), row()];
        (Just(rows), prop::collection::vec(wish(width), 1..6), Just(seed))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_request_gets_what_a_full_sort_gives_and_the_same_in_any_batch((rows, wishes, seed) in batch()) {
        let shim = Shim::new(seed);
        let width = rows[0].len() as u32;
        let memory = Rows::new(&shim, &rows, (seed % 5) as u32, (seed % 3) as u32);
        let room = SamplerRoom::new(width, 4);
        let requests: Vec<_> = wishes
            .iter()
            .enumerate()
            .map(|(i, wish)| SampleRequest {
                row: i % 2,
                plan: &wish.plan,
                mask: wish.mask.as_deref(),
                seen: &wish.seen,
                uniform: wish.uniform,
                logprobs: wish.logprobs,
            })
            .collect();
        let together = sample(&shim, memory.view(), &room, &requests);
        for (request, outcome) in requests.iter().zip(&together) {
            let greedy_candidates = request.plan.candidates > 0 && request.plan.temperature == 0.0;
            if greedy_candidates {
                let best = ordered(&rows[request.row], request)[0].0;
                let expected = vec![Candidate { token: TokenId(best), logprob: 0.0 }];
                prop_assert_eq!(outcome, &SampleOutcome::Candidates(expected));
            } else if let Err(error) = check(&rows[request.row], request, outcome) {
                prop_assert!(false, "{}", error);
            }
            let other = Shim::new(!seed);
            let own = Rows::new(&other, &rows[request.row..][..1], 1, 0);
            let alone = SampleRequest { row: 0, ..*request };
            let alone = sample(&other, own.view(), &SamplerRoom::new(width, 1), &[alone]);
            prop_assert_eq!(outcome, &alone[0], "in a batch and alone");
        }
    }
}
