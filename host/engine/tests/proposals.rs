//! Plans that propose: whatever is guessed, tokens and log-probabilities are those without guesses, in fewer steps.

mod support;

use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::limits::EngineLimits;
use galerne_core::sampling::SamplingPlan;
use galerne_engine::admission::Admission;
use galerne_engine::request::{Event, FinishReason, Request, Sampling, Usage};
use proptest::prelude::*;

use support::device::VOCABULARY;
use support::grammar::FakeGrammar;
use support::proposer::Proposer;
use support::{Bench, Record, limits, request};

/// A request whose guesses are known to be right or wrong.
#[derive(Debug, Clone)]
struct Spec {
    tenant: u64,
    shared: usize,
    tail: Vec<u32>,
    tokens_max: u32,
    stops: bool,
    temperature: f32,
    seed: u64,
    logprobs: Option<u32>,
    cache: bool,
    /// The guess at each output position of which this says so, over and over, is wrong.
    slips: Vec<bool>,
    /// Guesses at a time.
    count: usize,
    /// When the guest answers; without one the request's own plan proposes everything at once.
    guest: Option<[u8; 3]>,
}

impl Spec {
    fn rule(&self) -> SamplingPlan {
        SamplingPlan {
            temperature: self.temperature,
            ..SamplingPlan::default()
        }
    }

    fn request(&self, sampling: Sampling) -> Request {
        let shared = (0..).map(|i| (i * 7 + 3) % VOCABULARY).take(self.shared);
        Request {
            tenant: TenantId(self.tenant),
            salt: TenantSalt([u8::try_from(self.tenant).expect("few tenants"); 16]),
            prompt: shared.chain(self.tail.iter().copied()).map(TokenId).collect(),
            tokens_max: self.tokens_max,
            stop_tokens: vec![TokenId(4)],
            ignore_eos: !self.stops,
            sampling,
            seed: self.seed,
            logprobs: self.logprobs,
            use_prefix_cache: self.cache,
            ..request(&[], 1)
        }
    }

    /// The events without guesses, alone, on an engine with room for everything in one step. None if it can never fit.
    fn plain(&self, limits_of_run: EngineLimits, context_tokens_max: u32) -> Option<Record> {
        let admission = Admission {
            limits: limits_of_run,
            vocabulary: VOCABULARY,
            context_tokens_max,
        };
        let request = self.request(Sampling::Plan(self.rule()));
        admission.check(&request).ok()?;
        let mut bench = Bench::new(limits(64, 16, 1_024, 1), admission.sequence_tokens_max());
        let record = bench.submit(request);
        bench.drain();
        Some(record)
    }

    /// The request with guesses at what is known to come, a few beyond its end, and slips.
    fn guessing(&self, truth: &Record) -> Request {
        let beyond = [7, 4, 9, 1].into_iter();
        let slips = self.slips.clone();
        let guesses = truth.tokens().into_iter().chain(beyond).enumerate();
        let guesses = guesses.map(move |(place, token)| {
            let slip = u32::from(slips[place % slips.len()]);
            TokenId((token + slip) % VOCABULARY)
        });
        let (guesses, count): (Vec<_>, _) = (guesses.collect(), self.count);
        self.request(match self.guest {
            None => Sampling::Plan(SamplingPlan {
                proposed: guesses,
                ..self.rule()
            }),
            Some(delays) => Sampling::Guest(Box::new(Proposer::new(self.rule(), delays, move |output| {
                guesses.iter().copied().skip(output.len()).take(count).collect()
            }))),
        })
    }
}

fn spec() -> impl Strategy<Value = Spec> {
    let prompt = (
        1..3_u64,
        0..12_usize,
        proptest::collection::vec(0..VOCABULARY, 1..6),
    );
    let delays = any::<[u8; 3]>().prop_map(|delays| delays.map(|delay| delay % 5));
    let guesses = (
        proptest::collection::vec(proptest::bool::weighted(0.2), 1..7),
        1..7_usize,
        proptest::option::weighted(0.8, delays),
    );
    let output = (1..20_u32, any::<bool>(), proptest::option::of(0..3_u32));
    (prompt, output, any::<bool>(), 0..4_u64, any::<bool>(), guesses).prop_map(
        |(
            (tenant, shared, tail),
            (tokens_max, stops, logprobs),
            draws,
            seed,
            cache,
            (slips, count, guest),
        )| Spec {
            tenant,
            shared,
            tail,
            tokens_max,
            stops,
            temperature: if draws { 0.7 } else { 0.0 },
            seed,
            logprobs,
            cache,
            slips,
            count,
            guest,
        },
    )
}

fn finished(record: &Record) -> (FinishReason, Usage) {
    match record.end() {
        Some(Event::Finished { reason, usage }) => (reason, usage),
        other => panic!("expected an end, got {other:?}"),
    }
}

fn token_events(record: &Record) -> Vec<Event> {
    let is_token = |event: &Event| matches!(event, Event::Token { .. });
    record.events().into_iter().filter(is_token).collect()
}

/// Runs the requests together, each submitted some steps after the one before, a few cancelled later.
fn play(
    (limits, context_tokens_max): (EngineLimits, u32),
    runs_ahead: bool,
    specs: &[(Spec, usize, Option<usize>)],
) {
    let mut bench = Bench::new(limits, context_tokens_max);
    bench.runs_ahead = runs_ahead;
    let mut runs = Vec::new();
    for (spec, steps, cancel) in specs {
        if let Some(truth) = spec.plain(limits, context_tokens_max) {
            let record = Record::default();
            let id = bench.engine.add(bench.now, spec.guessing(&truth), record.sink());
            runs.push((spec, id.expect("it fits"), truth, record));
        }
        (0..*steps).for_each(|_| {
            bench.step();
        });
        if let Some(which) = cancel
            && !runs.is_empty()
        {
            bench.engine.cancel(bench.now, runs[which % runs.len()].1);
        }
    }
    bench.drain();
    let stats = bench.engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks_used), (0, 0, 0));
    let mut counts = (0, 0);
    for (spec, _, truth, record) in &runs {
        let (reason, usage) = finished(record);
        counts.0 += u64::from(usage.proposed_tokens);
        counts.1 += u64::from(usage.accepted_tokens);
        assert!(usage.accepted_tokens <= usage.completion_tokens, "{usage:?}");
        let (expected, got) = (token_events(truth), token_events(record));
        if reason == FinishReason::Cancelled {
            assert!(expected.starts_with(&got), "{spec:?}");
            continue;
        }
        let (plain_reason, plain_usage) = finished(truth);
        assert_eq!(expected, got, "{spec:?}");
        assert_eq!(reason, plain_reason, "{spec:?}");
        assert_eq!(usage.completion_tokens, plain_usage.completion_tokens, "{spec:?}");
    }
    assert_eq!(counts, (stats.tokens_proposed, stats.tokens_accepted));
    assert!(stats.tokens_accepted <= stats.tokens_proposed, "{stats:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn guesses_change_no_token(
        (blocks, block_tokens, step, sequences) in (2..14_usize, 1..6_usize, 1..24_usize, 1..5_usize),
        (guesses_max, context_tokens_max, runs_ahead) in (0..9_usize, 12..64_u32, any::<bool>()),
        specs in proptest::collection::vec((spec(), 0..6_usize, proptest::option::weighted(0.2, any::<usize>())), 1..9),
    ) {
        let limits = EngineLimits { guesses_max, ..limits(blocks, block_tokens, step, sequences) };
        play((limits, context_tokens_max), runs_ahead, &specs);
    }
}

fn greedy() -> SamplingPlan {
    SamplingPlan {
        temperature: 0.0,
        ..SamplingPlan::default()
    }
}

/// The tokens, the steps and the usage of one request on a device whose text soon repeats itself.
fn repetitive(limits: EngineLimits, request: Request) -> (Vec<u32>, u64, Usage) {
    let mut bench = Bench::new(limits, 512);
    bench.device.memory = 1;
    let record = bench.submit(request);
    bench.drain();
    (record.tokens(), bench.engine.stats().steps, finished(&record).1)
}

#[test]
fn a_text_that_repeats_itself_takes_few_steps() {
    let (prompt, roomy) = ([3, 1, 4, 1, 5], limits(64, 16, 256, 4));
    let (plain, plain_steps, usage) = repetitive(roomy, request(&prompt, 200));
    assert_eq!(
        (plain_steps, usage.proposed_tokens, usage.accepted_tokens),
        (200, 0, 0)
    );
    // Answers that come between the steps, just before the draw, and after it.
    for (delays, at_most) in [([0; 3], 40), ([2; 3], 50), ([3; 3], 60)] {
        let guest = Proposer::by_bigrams(greedy(), delays, &prompt);
        let (tokens, steps, usage) = repetitive(
            roomy,
            Request {
                sampling: Sampling::Guest(Box::new(guest)),
                ..request(&prompt, 200)
            },
        );
        assert_eq!(tokens, plain);
        assert!(
            steps <= at_most,
            "{steps} steps, answers after {delays:?} looks: {usage:?}"
        );
    }
}

#[test]
fn a_plan_that_comes_while_its_step_runs_is_in_time() {
    let limits = limits(64, 16, 256, 4);
    let (plain, ..) = repetitive(limits, request(&[1, 2], 100));
    let mut bench = Bench::new(limits, 512);
    bench.device.memory = 1;
    let wrong = plain
        .iter()
        .map(|token| TokenId((token + 1) % VOCABULARY))
        .collect::<Vec<_>>();
    // Looked at twice between two steps, and a third time in the step.
    let guest = Proposer::new(greedy(), [2; 3], move |output| wrong[output.len()..].to_vec());
    let record = bench.submit(Request {
        sampling: Sampling::Guest(Box::new(guest)),
        ..request(&[1, 2], 100)
    });
    bench.submit(request(&[9, 8], 200));
    let mut steps = 0;
    while record.end().is_none() {
        assert!(bench.step());
        steps += 1;
    }
    // Only the first plan is asked for when its step runs already: that one sits out this step and the next.
    assert_eq!((steps, finished(&record).1.sat_out_steps), (102, 1));
    assert_eq!(record.tokens(), plain);
}

#[test]
fn bad_guesses_soon_take_little() {
    let roomy = limits(64, 16, 256, 4);
    let (plain, ..) = repetitive(roomy, request(&[1, 2], 100));
    let truth = plain.clone();
    let guest = Proposer::new(greedy(), [0; 3], move |output| {
        let next = truth.get(output.len()).copied().unwrap_or_default();
        vec![TokenId((next + 1) % VOCABULARY); 16]
    });
    let (tokens, steps, usage) = repetitive(
        roomy,
        Request {
            sampling: Sampling::Guest(Box::new(guest)),
            ..request(&[1, 2], 100)
        },
    );
    assert_eq!(tokens, plain);
    assert_eq!((steps, usage.accepted_tokens), (100, 0));
    assert!(usage.proposed_tokens < 120, "{usage:?}");
}

#[test]
fn guesses_are_not_computed_where_the_rule_looks_at_earlier_tokens() {
    let check = |plan: SamplingPlan, has_grammar: bool| {
        let mut bench = Bench::new(limits(64, 16, 256, 4), 512);
        let record = bench.submit(Request {
            sampling: Sampling::Plan(SamplingPlan {
                proposed: vec![TokenId(5); 30],
                ..plan.clone()
            }),
            grammar: has_grammar.then(|| Box::new(FakeGrammar::new([0; 3])) as Box<_>),
            ..request(&[1, 2], 8)
        });
        bench.drain();
        assert_eq!(bench.engine.stats().tokens_proposed, 0, "{plan:?}");
        assert_eq!(record.tokens().len(), 8);
    };
    check(greedy(), true);
    check(
        SamplingPlan {
            frequency_penalty: 0.5,
            ..greedy()
        },
        false,
    );
    check(
        SamplingPlan {
            forced: vec![TokenId(5)],
            ..greedy()
        },
        false,
    );
}

#[test]
fn what_is_sure_goes_before_what_is_guessed() {
    let steps_to_first_token = |guesses_max| {
        let limits = EngineLimits {
            guesses_max,
            ..limits(64, 4, 6, 2)
        };
        let mut bench = Bench::new(limits, 512);
        bench.device.memory = 1;
        let guest = Proposer::by_bigrams(greedy(), [0; 3], &[1]);
        bench.submit(Request {
            sampling: Sampling::Guest(Box::new(guest)),
            ..request(&[1], 200)
        });
        (0..20).for_each(|_| assert!(bench.step()));
        let other = bench.submit(request(&(0..20).collect::<Vec<_>>(), 2));
        let mut steps = 0;
        while other.tokens().is_empty() {
            assert!(bench.step());
            steps += 1;
        }
        (steps, bench.engine.stats().tokens_accepted > 0)
    };
    assert_eq!(steps_to_first_token(0), (4, false));
    assert_eq!(steps_to_first_token(8), (4, true));
}

#[test]
fn a_stop_token_among_the_guesses_ends_the_output_there() {
    let (prompt, roomy) = ([3, 1, 4, 1, 5], limits(64, 16, 256, 4));
    let (plain, ..) = repetitive(roomy, request(&prompt, 30));
    let stop = plain[9];
    let place = plain.iter().position(|token| *token == stop).expect("just seen");
    let plan = SamplingPlan {
        proposed: plain.iter().copied().map(TokenId).collect(),
        ..greedy()
    };
    let (tokens, steps, usage) = repetitive(
        roomy,
        Request {
            sampling: Sampling::Plan(plan),
            stop_tokens: vec![TokenId(stop)],
            ..request(&prompt, 30)
        },
    );
    assert_eq!(tokens, plain[..=place]);
    assert_eq!(usage.completion_tokens as usize, place + 1);
    assert_eq!(usage.accepted_tokens as usize, place + 1);
    assert_eq!((steps, usage.proposed_tokens), (1, 16));
}
