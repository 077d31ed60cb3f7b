//! The state machine against itself: whatever the batch, the pool, the cache and the guests do, every sequence
//! ends once and its tokens are those of the same request run alone.

mod support;

use galerne_core::grammar::GrammarSession;
use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::limits::EngineLimits;
use galerne_core::sampling::SamplingPlan;
use galerne_engine::admission::Admission;
use galerne_engine::request::{Event, FinishReason, Request, Sampling, SequenceError, SubmitError};
use proptest::prelude::*;

use support::device::VOCABULARY;
use support::grammar::FakeGrammar;
use support::guest::{FakeGuest, Manner};
use support::{Bench, Record, limits, request};

/// A request that can be made twice.
#[derive(Debug, Clone)]
struct Spec {
    tenant: u64,
    shared: usize,
    tail: Vec<u32>,
    tokens_max: u32,
    stops: bool,
    rule: Rule,
    /// When a grammar answers, if there is one.
    grammar: Option<[u8; 3]>,
    seed: u64,
    logprobs: Option<u32>,
    cache: bool,
}

#[derive(Debug, Clone)]
enum Rule {
    Plan(SamplingPlan),
    Guest(Manner),
}

impl Spec {
    /// The request; guest and grammar are never late if `prompt_guest` is set.
    fn request(&self, prompt_guest: bool) -> Request {
        let shared = (0..).map(|i| (i * 7 + 3) % VOCABULARY).take(self.shared);
        let sampling = match &self.rule {
            Rule::Plan(plan) => Sampling::Plan(plan.clone()),
            Rule::Guest(manner) => {
                let delays = if prompt_guest { [0; 3] } else { manner.delays };
                Sampling::Guest(Box::new(FakeGuest::new(Manner { delays, ..*manner })))
            }
        };
        Request {
            tenant: TenantId(self.tenant),
            salt: TenantSalt([u8::try_from(self.tenant).expect("few tenants"); 16]),
            prompt: shared.chain(self.tail.iter().copied()).map(TokenId).collect(),
            tokens_max: self.tokens_max,
            stop_tokens: vec![TokenId(4)],
            ignore_eos: !self.stops,
            sampling,
            grammar: self.grammar.map(|delays| -> Box<dyn GrammarSession> {
                Box::new(FakeGrammar::new(if prompt_guest { [0; 3] } else { delays }))
            }),
            seed: self.seed,
            logprobs: self.logprobs,
            use_prefix_cache: self.cache,
        }
    }

    /// The events of this request alone, on an engine with room for everything in one step.
    fn alone(&self, sequence_tokens_max: u32) -> Record {
        let limits = EngineLimits {
            guesses_max: 0,
            ..limits(64, 16, 1_024, 1)
        };
        let mut bench = Bench::new(limits, sequence_tokens_max);
        let record = bench.submit(Request {
            use_prefix_cache: false,
            ..self.request(true)
        });
        bench.drain();
        record
    }
}

fn spec() -> impl Strategy<Value = Spec> {
    let plan = prop_oneof![
        Just(SamplingPlan {
            temperature: 0.0,
            ..SamplingPlan::default()
        }),
        Just(SamplingPlan {
            presence_penalty: 1.0,
            frequency_penalty: 0.5,
            ..SamplingPlan::default()
        }),
        Just(SamplingPlan {
            forced: vec![TokenId(9), TokenId(8)],
            ..SamplingPlan::default()
        }),
    ];
    let candidates = prop_oneof![Just(0), 0..5_u32];
    let keeps = proptest::bool::weighted(0.3);
    let manner = (any::<[u8; 3]>(), 0..4_u32, candidates, 0..4_u32, 0..4_u32, keeps).prop_map(
        |(delays, valid_steps, candidates, forces_every, proposes, keeps)| Manner {
            delays: delays.map(|d| d % 4),
            valid_steps,
            candidates,
            forces_every,
            proposes,
            keeps,
            traps_at: None,
        },
    );
    let rule = prop_oneof![2 => plan.prop_map(Rule::Plan), 1 => manner.prop_map(Rule::Guest)];
    let tail = proptest::collection::vec(0..VOCABULARY, 1..6);
    let prompt = (1..3_u64, 0..12_usize, tail);
    (
        prompt,
        1..14_u32,
        any::<bool>(),
        (rule, proptest::option::weighted(0.3, any::<[u8; 3]>())),
        0..4_u64,
        proptest::option::of(0..3_u32),
        any::<bool>(),
    )
        .prop_map(
            |((tenant, shared, tail), tokens_max, stops, (rule, grammar), seed, logprobs, cache)| Spec {
                tenant,
                shared,
                tail,
                tokens_max,
                stops,
                // A request and its guest do not both bring one.
                grammar: grammar
                    .filter(|_| !matches!(&rule, Rule::Guest(manner) if manner.keeps))
                    .map(|delays| delays.map(|delay| delay % 4)),
                rule,
                seed,
                logprobs,
                cache,
            },
        )
}

#[derive(Debug, Clone)]
enum Act {
    Submit(Spec),
    Cancel(usize),
    Steps(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => spec().prop_map(Act::Submit),
        1 => any::<usize>().prop_map(Act::Cancel),
        4 => (1..5_usize).prop_map(Act::Steps),
    ]
}

fn small_limits() -> impl Strategy<Value = EngineLimits> {
    (2..14_usize, 1..5_usize, 1..14_usize, 1..5_usize, 0..5_usize).prop_map(
        |(blocks, block_tokens, step, sequences, guesses_max)| EngineLimits {
            guesses_max,
            ..limits(blocks, block_tokens, step, sequences)
        },
    )
}

/// Plays the acts and compares every sequence with its own run.
fn play(limits: EngineLimits, runs_ahead: bool, acts: &[Act]) {
    let admission = Admission {
        limits,
        vocabulary: VOCABULARY,
        context_tokens_max: 64,
    };
    let mut bench = Bench::new(limits, 64);
    bench.runs_ahead = runs_ahead;
    let mut sequences = Vec::new();
    for act in acts {
        match act {
            Act::Submit(spec) => {
                let record = Record::default();
                match bench.engine.add(bench.now, spec.request(false), record.sink()) {
                    Ok(id) => sequences.push((id, spec, record, false)),
                    Err(error) => {
                        assert!(matches!(error, SubmitError::NeverFits { .. }), "{error}");
                        assert_eq!(record.events(), []);
                    }
                }
            }
            Act::Cancel(which) if !sequences.is_empty() => {
                let count = sequences.len();
                let (id, _, record, cancelled) = &mut sequences[which % count];
                *cancelled |= record.end().is_none();
                bench.engine.cancel(bench.now, *id);
                bench
                    .engine
                    .check_integrity()
                    .expect("sound after a cancellation");
            }
            Act::Cancel(_) => {}
            Act::Steps(count) => (0..*count).for_each(|_| {
                bench.step();
            }),
        }
    }
    bench.drain();
    let stats = bench.engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks_used), (0, 0, 0));
    for (_, spec, record, cancelled) in &sequences {
        let alone = spec.alone(admission.sequence_tokens_max());
        match record.end() {
            Some(Event::Finished {
                reason: FinishReason::Cancelled,
                ..
            }) => {
                assert!(cancelled, "{spec:?}");
                assert!(alone.tokens().starts_with(&record.tokens()), "{spec:?}");
            }
            Some(Event::Finished { reason, usage }) => {
                assert!(!cancelled, "{spec:?}");
                let Some(Event::Finished {
                    reason: alone_reason,
                    usage: alone_usage,
                }) = alone.end()
                else {
                    panic!("{spec:?} alone: {:?}", alone.events());
                };
                let tokens = |record: &Record| -> Vec<Event> {
                    let is_token = |event: &Event| matches!(event, Event::Token { .. });
                    record.events().into_iter().filter(is_token).collect()
                };
                assert_eq!(tokens(record), tokens(&alone), "{spec:?}");
                assert_eq!(reason, alone_reason, "{spec:?}");
                assert_eq!(usage.completion_tokens, alone_usage.completion_tokens, "{spec:?}");
                assert_eq!(
                    usage.completion_tokens as usize,
                    record.tokens().len(),
                    "{spec:?}"
                );
            }
            other => panic!("{spec:?} ended with {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_ends_once_with_the_tokens_of_its_own_run(
        limits in small_limits(),
        runs_ahead in any::<bool>(),
        acts in proptest::collection::vec(act(), 1..24),
    ) {
        play(limits, runs_ahead, &acts);
    }
}

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * i + 1) % VOCABULARY).collect()
}

#[test]
fn an_equal_prefix_is_computed_once_and_at_least_one_token_always() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 128);
    let first = bench.submit(request(&prompt(8), 3));
    bench.drain();
    let prefilled = bench.engine.stats().tokens_prefilled;
    let second = bench.submit(request(&prompt(8), 3));
    bench.drain();
    // Two whole blocks are known, but the last token's logits are wanted.
    assert_eq!(bench.engine.stats().tokens_prefilled - prefilled, 4);
    assert_eq!(first.tokens(), second.tokens());
    let Some(Event::Finished { usage, .. }) = second.end() else {
        panic!("finished")
    };
    assert_eq!(
        (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        (8, 4, 3)
    );
}

#[test]
fn sequences_that_start_together_compute_their_common_beginning_once() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 128);
    let forks: Vec<Record> = (0..3)
        .map(|number| {
            let mut prompt = prompt(13);
            prompt.push(number);
            bench.submit(request(&prompt, 3))
        })
        .collect();
    let other = bench.submit(request(&[5, 4, 3, 2, 1], 3));
    bench.drain();
    let cached = |record: &Record| match record.end() {
        Some(Event::Finished { usage, .. }) => usage.cached_tokens,
        other => panic!("expected an end, got {other:?}"),
    };
    assert_eq!(forks.iter().map(cached).collect::<Vec<_>>(), [0, 12, 12]);
    assert_eq!(cached(&other), 0);
    // 14 tokens, twice the two behind the common blocks, and the other's.
    assert_eq!(bench.engine.stats().tokens_prefilled, 14 + 2 * 2 + 5);
}

#[test]
fn other_tenants_and_requests_without_cache_share_nothing() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 128);
    bench.submit(request(&prompt(12), 2));
    bench.drain();
    let other_tenant = Request {
        tenant: TenantId(2),
        ..request(&prompt(12), 2)
    };
    let other_salt = Request {
        salt: TenantSalt([9; 16]),
        ..request(&prompt(12), 2)
    };
    let no_cache = Request {
        use_prefix_cache: false,
        ..request(&prompt(12), 2)
    };
    for request in [other_tenant, other_salt, no_cache] {
        bench.submit(request);
        bench.drain();
    }
    assert_eq!(bench.engine.stats().prefix_hit_tokens, 0);
}

#[test]
fn blocks_are_zeroed_on_their_way_to_another_tenant() {
    let mut bench = Bench::new(limits(2, 4, 64, 4), 128);
    for (tenant, zeroed) in [(1, 0), (1, 0), (2, 2), (2, 2), (1, 4)] {
        let request = Request {
            tenant: TenantId(tenant),
            use_prefix_cache: false,
            ..request(&prompt(5), 2)
        };
        bench.submit(request);
        bench.drain();
        assert_eq!(bench.zeroed, zeroed, "after a sequence of tenant {tenant}");
    }
}

#[test]
fn a_small_pool_preempts_the_youngest_and_changes_nothing() {
    let mut bench = Bench::new(limits(6, 2, 16, 3), 64);
    let records: Vec<_> = (0..3).map(|i| bench.submit(request(&prompt(3 + i), 7))).collect();
    bench.drain();
    assert!(bench.engine.stats().preemptions > 0, "{:?}", bench.engine.stats());
    for (i, record) in records.iter().enumerate() {
        let mut alone = Bench::new(limits(64, 2, 64, 1), 64);
        let expected = alone.submit(request(&prompt(3 + u32::try_from(i).expect("small")), 7));
        alone.drain();
        assert_eq!(record.tokens(), expected.tokens());
    }
}

#[test]
fn cancelling_frees_blocks_in_the_queue_in_prefill_and_in_decode() {
    for steps in [0, 1, 3, 6] {
        let mut bench = Bench::new(limits(16, 4, 4, 1), 64);
        let record = Record::default();
        let id = bench
            .engine
            .add(bench.now, request(&prompt(12), 40), record.sink())
            .expect("accepted");
        (0..steps).for_each(|_| {
            bench.step();
        });
        assert_eq!(bench.engine.stats().blocks_used > 0, steps > 0);
        bench.engine.cancel(bench.now, id);
        bench.engine.cancel(bench.now, id);
        assert_eq!(bench.engine.stats().blocks_used, 0);
        let end = record.end();
        assert!(
            matches!(
                end,
                Some(Event::Finished {
                    reason: FinishReason::Cancelled,
                    ..
                })
            ),
            "{end:?}"
        );
    }
}

#[test]
fn a_guest_that_traps_ends_its_own_sequence_only() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
    let manner = Manner {
        valid_steps: 1,
        traps_at: Some(3),
        ..Manner::default()
    };
    let sampling = Sampling::Guest(Box::new(FakeGuest::new(manner)));
    let hurt = bench.submit(Request {
        sampling,
        ..request(&prompt(5), 9)
    });
    let fine = bench.submit(request(&prompt(5), 9));
    bench.drain();
    assert_eq!(hurt.tokens().len(), 3);
    assert!(
        matches!(hurt.end(), Some(Event::Failed(SequenceError::Guest(_)))),
        "{:?}",
        hurt.end()
    );
    assert_eq!(fine.tokens().len(), 9);
    assert_eq!(bench.engine.stats().blocks_used, 0);
}

#[test]
fn a_bad_plan_names_its_field() {
    struct Bad;
    impl galerne_core::guest::SamplerSession for Bad {
        fn request_plan(&mut self, _: galerne_core::guest::PlanStep) {}
        fn take_plan(&mut self) -> galerne_core::guest::Answer<SamplingPlan> {
            let plan = SamplingPlan {
                top_p: 2.0,
                ..SamplingPlan::default()
            };
            galerne_core::guest::Answer::Ready(Ok(plan))
        }
        fn request_choice(&mut self, _: Vec<galerne_core::sampling::Candidate>) {}
        fn take_choice(&mut self) -> galerne_core::guest::Answer<usize> {
            galerne_core::guest::Answer::Pending
        }
    }
    let mut bench = Bench::new(limits(8, 4, 16, 2), 64);
    let record = bench.submit(Request {
        sampling: Sampling::Guest(Box::new(Bad)),
        ..request(&[1], 4)
    });
    bench.drain();
    let Some(Event::Failed(error)) = record.end() else {
        panic!("{:?}", record.events())
    };
    assert!(error.to_string().contains("top_p"), "{error}");
}

#[test]
fn a_late_guest_sits_out_while_others_go_on() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
    let manner = Manner {
        delays: [40; 3],
        valid_steps: 1,
        ..Manner::default()
    };
    let sampling = Sampling::Guest(Box::new(FakeGuest::new(manner)));
    let late = bench.submit(Request {
        sampling,
        ..request(&prompt(5), 2)
    });
    let other = bench.submit(request(&[9, 8, 7, 6, 5], 9));
    (0..9).for_each(|_| assert!(bench.step()));
    assert_eq!((late.tokens().len(), other.tokens().len()), (0, 9));
    bench.drain();
    let Some(Event::Finished { usage, .. }) = late.end() else {
        panic!("{:?}", late.end())
    };
    assert_eq!((usage.completion_tokens, usage.sat_out_steps), (2, 2));
}

#[test]
fn a_sequence_preempted_while_its_guest_chooses_is_computed_again_and_not_asked_twice() {
    let choosing = |delays| {
        let manner = Manner {
            delays,
            candidates: 3,
            ..Manner::default()
        };
        Request {
            sampling: Sampling::Guest(Box::new(FakeGuest::new(manner))),
            ..request(&prompt(4), 3)
        }
    };
    let mut bench = Bench::new(limits(5, 2, 16, 2), 64);
    bench.submit(request(&prompt(3), 8));
    let late = bench.submit(choosing([0, 40, 40]));
    bench.drain();
    assert!(bench.engine.stats().preemptions > 0, "{:?}", bench.engine.stats());
    let mut alone = Bench::new(limits(5, 2, 16, 2), 64);
    let expected = alone.submit(choosing([0; 3]));
    alone.drain();
    assert_eq!(late.tokens(), expected.tokens());
}

#[test]
fn forced_tokens_come_with_logprobs_when_wanted() {
    let mut bench = Bench::new(limits(8, 4, 16, 2), 64);
    let plan = SamplingPlan {
        forced: vec![TokenId(3), TokenId(5)],
        ..SamplingPlan::default()
    };
    let sampling = Sampling::Plan(plan);
    let record = bench.submit(Request {
        sampling,
        logprobs: Some(1),
        ..request(&[1, 2], 3)
    });
    bench.drain();
    assert_eq!(record.tokens()[..2], [3, 5]);
    for event in &record.events()[..3] {
        assert!(
            matches!(
                event,
                Event::Token {
                    logprobs: Some(_),
                    ..
                }
            ),
            "{event:?}"
        );
    }
}

#[test]
fn hopeless_requests_are_refused_with_their_reason() {
    let mut bench = Bench::new(limits(4, 4, 16, 2), 32);
    let mut refused = |request| {
        bench
            .engine
            .add(bench.now, request, Record::default().sink())
            .unwrap_err()
    };
    assert_eq!(refused(request(&[], 4)), SubmitError::EmptyPrompt);
    assert_eq!(refused(request(&[1], 0)), SubmitError::NoOutput);
    assert_eq!(
        refused(request(&prompt(32), 4)),
        SubmitError::PromptTooLong { tokens: 32, max: 31 }
    );
    assert_eq!(
        refused(request(&prompt(17), 4)),
        SubmitError::NeverFits {
            blocks_needed: 5,
            blocks: 4
        }
    );
    let unknown = SubmitError::UnknownToken {
        token: TokenId(99),
        position: 1,
        vocabulary: VOCABULARY,
    };
    assert_eq!(refused(request(&[1, 99], 4)), unknown);
    let plan = SamplingPlan {
        candidates: 3,
        ..SamplingPlan::default()
    };
    let error = refused(Request {
        sampling: Sampling::Plan(plan),
        ..request(&[1], 4)
    });
    assert!(error.to_string().contains("candidates"), "{error}");
}

#[test]
fn the_pool_bounds_the_output() {
    let mut bench = Bench::new(limits(2, 4, 16, 2), 1_000);
    let record = bench.submit(request(&prompt(5), 1_000));
    bench.drain();
    // Eight places: the ninth token is drawn but never computed.
    assert_eq!(record.tokens().len(), 4);
    assert!(matches!(
        record.end(),
        Some(Event::Finished {
            reason: FinishReason::Length,
            ..
        })
    ));
}

#[test]
fn steps_run_ahead_where_nothing_depends_on_the_tokens_before() {
    // Steps, those that ran ahead, and tokens of the first sequence.
    let run = |runs_ahead, sampling: fn() -> Sampling| {
        let mut bench = Bench::new(limits(32, 4, 64, 4), 128);
        bench.runs_ahead = runs_ahead;
        let records: Vec<_> = [20, 9]
            .map(|tokens_max| {
                bench.submit(Request {
                    sampling: sampling(),
                    ..request(&prompt(5), tokens_max)
                })
            })
            .into();
        bench.drain();
        let stats = bench.engine.stats();
        let tokens: Vec<_> = records.iter().map(Record::tokens).collect();
        (stats.steps, stats.steps_ahead, tokens)
    };
    let check = |sampling: fn() -> Sampling, steps_ahead| {
        let (steps, none, expected) = run(false, sampling);
        assert_eq!(none, 0);
        assert_eq!(run(true, sampling), (steps, steps_ahead, expected));
    };
    // All but the two prompts, of which one waits for the other's blocks, run ahead.
    check(|| Sampling::Plan(SamplingPlan::default()), 18);
    check(
        || {
            Sampling::Plan(SamplingPlan {
                presence_penalty: 0.5,
                ..SamplingPlan::default()
            })
        },
        0,
    );
    let guest = || {
        let manner = Manner {
            valid_steps: 3,
            ..Manner::default()
        };
        Sampling::Guest(Box::new(FakeGuest::new(manner)))
    };
    // The two are asked in different steps: of three steps one runs ahead, and two once the second has ended.
    check(guest, 9);
}

#[test]
fn a_dropped_engine_leaves_nobody_waiting() {
    let mut bench = Bench::new(limits(8, 4, 16, 1), 64);
    let records = [
        bench.submit(request(&prompt(3), 9)),
        bench.submit(request(&prompt(3), 9)),
    ];
    bench.step();
    drop(bench);
    for record in records {
        assert_eq!(record.end(), Some(Event::Failed(SequenceError::EngineStopped)));
    }
}
