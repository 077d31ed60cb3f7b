//! The CUDA sampler on the shim: the conformance suite's sampling, and what tokens come against a full sort in f64.
#![expect(
    unsafe_code,
    reason = "launches read and write raw memory, which the tests allocate"
)]

mod batches;
mod full_sort;

use batches::batch;
use full_sort::check;
use galerne_core::ids::{BlockId, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_core::weights::WeightSource;
use galerne_cuda_shim::{Memory, Rig};
use galerne_kernels::conformance::{Numbers, cases};
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::cuda::driver::DeviceView;
use galerne_kernels::cuda::launch::sample::Addresses;
use galerne_kernels::cuda::sampler::{SamplerRoom, decode};
use galerne_kernels::device::{
    Device, DeviceError, DeviceInfo, LoadOptions, LoadedProgram, MemoryUse, Precision, SampleOutcome,
    SampleRequest, StepBatch, TokenCount,
};
use galerne_kernels::program::Program;
use proptest::prelude::*;

/// Serves requests in rounds of a room, as a device does.
fn sample(
    rig: &Rig,
    logits: DeviceView,
    room: &SamplerRoom,
    requests: &[SampleRequest<'_>],
) -> Vec<SampleOutcome> {
    let device_upload: Memory<'_, u8> = rig.poisoned(room.upload_bytes);
    let scratch: Memory<'_, u8> = rig.poisoned(room.scratch_bytes);
    let results: Memory<'_, u8> = rig.poisoned(room.result_bytes);
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
            rig.write(addresses.upload, &upload[..round.upload_bytes])
                .expect("the upload has room");
            rig.enqueue(&round.launches).expect("kernels run");
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
    fn new(rig: &'s Rig, rows: &[Vec<f32>], start: u32, gap: u32) -> Self {
        let width = rows[0].len() as u32;
        let mut numbers = vec![f32::MAX; start as usize];
        for (i, row) in rows.iter().enumerate() {
            if i > 0 {
                numbers.extend(std::iter::repeat_n(f32::MAX, gap as usize));
            }
            numbers.extend(row);
        }
        Self {
            memory: rig.memory(&numbers),
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
        let rig = Rig::new(output.len() as u64);
        let rows = Rows::new(&rig, &rows, 0, 0);
        let room = SamplerRoom::new(rows.width, 2);
        Ok(sample(&rig, rows.view(), &room, requests))
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
    let rig = Rig::new(1);
    let rows = wide_rows(WIDTH);
    let memory = Rows::new(&rig, &rows, 0, 0);
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
    let outcomes = sample(&rig, memory.view(), &SamplerRoom::new(WIDTH as u32, 8), &requests);
    for (request, outcome) in requests.iter().zip(&outcomes) {
        if let Err(error) = check(&rows[request.row], request, outcome) {
            panic!("row {}, {:?}: {error}", request.row, request.plan);
        }
    }
}

#[test]
fn equal_logits_are_drawn_exactly() {
    const WIDTH: usize = 10_000;
    let rig = Rig::new(2);
    let rows = Rows::new(&rig, &[vec![-3.5; WIDTH]], 0, 0);
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
        let outcomes = sample(&rig, rows.view(), &room, &requests);
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
fn filters_end_inside_thousands_of_like_tokens() {
    const WIDTH: usize = 10_000;
    let rig = Rig::new(4);
    let nearly: Vec<f32> = (0..WIDTH).map(|t| -0.001 * (t % 2) as f32).collect();
    let rows = Rows::new(&rig, &[nearly, vec![2.0; WIDTH]], 0, 0);
    let room = SamplerRoom::new(WIDTH as u32, 2);
    // e^-0.001 is less than this: the even tokens are left.
    let even = plan(1.0, 0, 1.0, 0.9995);
    let outcomes = sample(
        &rig,
        rows.view(),
        &room,
        &[request(0, &even, 0.5), request(0, &even, 0.999_99)],
    );
    let token = |token| SampleOutcome::Token {
        token: TokenId(token),
        logprobs: None,
    };
    assert_eq!(outcomes, [token(5_000), token(9_998)]);
    // As likely as the best is likely enough: also where few tokens are sorted.
    let best = plan(1.0, 0, 1.0, 1.0);
    let mut mask = vec![0; WIDTH.div_ceil(32)];
    (mask[3], mask[200]) = (u32::MAX, u32::MAX);
    let masked = SampleRequest {
        mask: Some(&mask),
        ..request(1, &best, 0.5)
    };
    assert_eq!(sample(&rig, rows.view(), &room, &[masked]), [token(6_400)]);
    // A part of the probability of 8,000 tokens is that of so many.
    let listed = SamplingPlan {
        candidates: 300,
        ..plan(1.0, 8_000, 1.0 / 32.0, 0.0)
    };
    let outcomes = sample(&rig, rows.view(), &room, &[request(1, &listed, 0.0)]);
    let SampleOutcome::Candidates(candidates) = &outcomes[0] else {
        panic!("expected candidates, got {outcomes:?}");
    };
    let tokens: Vec<u32> = candidates.iter().map(|candidate| candidate.token.0).collect();
    assert_eq!(tokens, (0..250).collect::<Vec<_>>());
}

#[test]
fn a_bias_and_a_penalty_for_every_token_find_room() {
    const WIDTH: usize = 9_001;
    let rig = Rig::new(3);
    let rows = [
        Numbers::new(6).normals(WIDTH, 2.0),
        Numbers::new(7).normals(WIDTH, 2.0),
    ];
    let memory = Rows::new(&rig, &rows, 3, 2);
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
        for (request, outcome) in requests.iter().zip(sample(&rig, memory.view(), &room, requests)) {
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_request_gets_what_a_full_sort_gives_and_the_same_in_any_batch((rows, wishes, seed) in batch()) {
        let rig = Rig::new(seed);
        let width = rows[0].len() as u32;
        let memory = Rows::new(&rig, &rows, (seed % 5) as u32, (seed % 3) as u32);
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
        let together = sample(&rig, memory.view(), &room, &requests);
        for (request, outcome) in requests.iter().zip(&together) {
            if let Err(error) = check(&rows[request.row], request, outcome) {
                prop_assert!(false, "{}", error);
            }
            let other = Rig::new(!seed);
            let own = Rows::new(&other, &rows[request.row..][..1], 1, 0);
            let alone = SampleRequest { row: 0, ..*request };
            let alone = sample(&other, own.view(), &SamplerRoom::new(width, 1), &[alone]);
            prop_assert_eq!(outcome, &alone[0], "in a batch and alone");
        }
    }
}
