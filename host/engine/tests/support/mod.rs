//! What the engine's tests share: a device whose tokens depend on every KV entry, guests that answer late, and a
//! sink that records. Knows nothing of real models.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod device;
pub mod grammar;
pub mod guest;
pub mod proposer;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::limits::EngineLimits;
use galerne_core::sampling::{SamplingPlan, TokenLogprobs};
use galerne_engine::admission::Admission;
use galerne_engine::engine::{Engine, Step};
use galerne_engine::request::{Event, EventSink, Request, Sampling};
use galerne_kernels::device::LoadedProgram;

use device::{FakeProgram, VOCABULARY};

/// The events one sequence's owner has heard.
#[derive(Clone, Default)]
pub struct Record(Arc<Mutex<Vec<Event>>>);

impl Record {
    pub fn sink(&self) -> Box<dyn EventSink> {
        let events = Arc::clone(&self.0);
        Box::new(move |event| events.lock().expect("no panic while recording").push(event))
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().expect("no panic while recording").clone()
    }

    pub fn tokens(&self) -> Vec<u32> {
        let token = |event: &Event| match event {
            Event::Token { token, .. } => Some(token.0),
            _ => None,
        };
        self.events().iter().filter_map(token).collect()
    }

    pub fn tokens_with_logprobs(&self) -> Vec<(TokenId, Option<TokenLogprobs>)> {
        let token = |event| match event {
            Event::Token { token, logprobs } => Some((token, logprobs)),
            _ => None,
        };
        self.events().into_iter().filter_map(token).collect()
    }

    /// The last event, which must be the only one of its kind.
    pub fn end(&self) -> Option<Event> {
        let events = self.events();
        let is_end = |event: &&Event| !matches!(event, Event::Token { .. });
        let ends = events.iter().filter(is_end).count();
        assert!(ends <= 1, "more than one last event: {events:?}");
        let last = events.last().filter(is_end).cloned();
        assert_eq!(last.is_some(), ends == 1, "events after the last one: {events:?}");
        last
    }
}

/// A greedy request.
pub fn request(prompt: &[u32], tokens_max: u32) -> Request {
    Request {
        tenant: TenantId(1),
        salt: TenantSalt([1; 16]),
        prompt: prompt.iter().copied().map(TokenId).collect(),
        tokens_max,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        sampling: Sampling::Plan(SamplingPlan {
            temperature: 0.0,
            ..SamplingPlan::default()
        }),
        grammar: None,
        seed: 7,
        logprobs: None,
        use_prefix_cache: true,
    }
}

pub fn limits(
    blocks: usize,
    block_tokens: usize,
    step_tokens_max: usize,
    sequences_max: usize,
) -> EngineLimits {
    EngineLimits {
        step_tokens_max,
        sequences_max,
        queue_max: 1_000,
        block_tokens,
        blocks,
        candidates_max: 16,
        guesses_max: 16,
    }
}

/// An engine and its device, stepped by hand.
pub struct Bench {
    pub engine: Engine,
    pub device: FakeProgram,
    pub now: Instant,
    /// Whether steps are submitted before the tokens of the one before are known, where they can be.
    pub runs_ahead: bool,
    context_tokens_max: u32,
    /// Blocks zeroed so far.
    pub zeroed: usize,
}

impl Bench {
    pub fn new(limits: EngineLimits, context_tokens_max: u32) -> Self {
        let admission = Admission {
            limits,
            vocabulary: VOCABULARY,
            context_tokens_max,
        };
        Self {
            engine: Engine::new(admission, 5),
            device: FakeProgram::new(limits),
            now: Instant::now(),
            runs_ahead: false,
            context_tokens_max,
            zeroed: 0,
        }
    }

    /// One step, checked; `false` if there was nothing to compute.
    pub fn step(&mut self) -> bool {
        self.now += std::time::Duration::from_millis(1);
        if !self.engine.is_under_way() {
            let Some(step) = self.engine.schedule(self.now) else {
                self.engine
                    .check_integrity()
                    .expect("sound when nothing is to be computed");
                return false;
            };
            self.prepare(&step);
            self.device.submit(&step.batch).expect("a sound batch");
        }
        self.engine.ask_guests();
        self.device.wait().expect("the device works");
        self.engine.settle_plans(self.now);
        let next = self.runs_ahead.then(|| self.engine.schedule_next()).flatten();
        if let Some(next) = &next {
            self.prepare(&next.step);
        }
        let requests = self.engine.sample_requests();
        let outcomes = match &next {
            Some(next) => self
                .device
                .sample_and_submit(&requests, &next.step.batch, &next.drawn),
            None => self.device.sample(&requests),
        };
        let outcomes = outcomes.expect("the device works");
        self.engine
            .complete(self.now, outcomes)
            .expect("the device answered every request");
        self.engine.settle_choices(self.now);
        self.engine.settle_ahead(self.now);
        self.engine.check_integrity().expect("sound after a step");
        true
    }

    fn prepare(&mut self, step: &Step) {
        for slice in &step.batch.sequences {
            let end = slice.position as usize + slice.tokens;
            assert!(end < self.context_tokens_max as usize, "{:?}", step.batch);
        }
        self.zeroed += step.zero.len();
        self.device.zero_blocks(&step.zero).expect("blocks exist");
    }

    /// Steps until nothing is left.
    pub fn drain(&mut self) {
        for _ in 0..100_000 {
            if self.engine.is_idle() {
                return;
            }
            self.step();
        }
        panic!("100000 steps were not enough: {:?}", self.engine.stats());
    }

    pub fn submit(&mut self, request: Request) -> Record {
        let record = Record::default();
        self.engine
            .add(self.now, request, record.sink())
            .expect("the request is accepted");
        record
    }
}
