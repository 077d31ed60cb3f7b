//! Sequences kept to a grammar: only allowed tokens come, the end comes by itself, a late or failing grammar costs nobody
//! else anything.

mod support;

use galerne_core::grammar::{GrammarError, Next};
use galerne_core::ids::TokenId;
use galerne_core::sampling::SamplingPlan;
use galerne_engine::request::{Event, FinishReason, Request, Sampling, SequenceError};

use support::grammar::{FakeGrammar, LENGTH, follows};
use support::guest::{FakeGuest, Manner};
use support::{Bench, limits, request};

fn kept(grammar: FakeGrammar, request: Request) -> Request {
    Request {
        grammar: Some(Box::new(grammar)),
        ..request
    }
}

fn warm() -> Request {
    Request {
        sampling: Sampling::Plan(SamplingPlan::default()),
        ..request(&[1, 2, 3], 40)
    }
}

/// That each token was allowed after those before.
fn assert_allowed(tokens: &[u32]) {
    let tokens: Vec<TokenId> = tokens.iter().copied().map(TokenId).collect();
    for (at, token) in tokens.iter().enumerate() {
        let Next::Tokens(mask) = follows(&tokens[..at]) else {
            panic!("{tokens:?} goes on after its end")
        };
        assert!(mask.allows(*token), "token {at} of {tokens:?}");
    }
}

#[test]
fn only_allowed_tokens_come_and_the_end_comes_by_itself() {
    for seed in 0..20 {
        let guest = Manner {
            candidates: 3,
            ..Manner::default()
        };
        let requests = [
            request(&[1, 2, 3], 40),
            warm(),
            Request {
                logprobs: Some(2),
                ..warm()
            },
            Request {
                sampling: Sampling::Guest(Box::new(FakeGuest::new(guest))),
                ..warm()
            },
        ];
        for wanted in requests {
            let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
            let logprobs = wanted.logprobs.is_some();
            let record = bench.submit(kept(FakeGrammar::new([0; 3]), Request { seed, ..wanted }));
            bench.drain();
            assert_allowed(&record.tokens());
            assert_eq!(record.tokens().len(), LENGTH);
            let end = record.end();
            assert!(
                matches!(
                    end,
                    Some(Event::Finished {
                        reason: FinishReason::Stop,
                        ..
                    })
                ),
                "{end:?}"
            );
            let is_bare = |event: &Event| matches!(event, Event::Token { logprobs: None, .. });
            assert_eq!(
                record.events().iter().any(is_bare),
                !logprobs,
                "log-probabilities as asked for"
            );
        }
    }
}

#[test]
fn a_plan_brings_a_grammar_that_holds_like_the_requests_own() {
    for (valid_steps, candidates, delay) in [(1, 0, 0), (3, 0, 1), (0, 0, 2), (1, 3, 0), (2, 2, 1)] {
        let manner = Manner {
            valid_steps,
            candidates,
            delays: [delay; 3],
            ..Manner::default()
        };
        let guest = |keeps| Request {
            sampling: Sampling::Guest(Box::new(FakeGuest::new(Manner { keeps, ..manner }))),
            ..warm()
        };
        let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
        let by_plan = bench.submit(guest(true));
        let by_request = bench.submit(kept(FakeGrammar::new([0; 3]), guest(false)));
        bench.drain();
        assert_allowed(&by_plan.tokens());
        assert_eq!(by_plan.tokens().len(), LENGTH, "{:?}", by_plan.end());
        assert_eq!(by_plan.tokens(), by_request.tokens(), "{manner:?}");
    }
}

#[test]
fn a_second_grammar_ends_the_sequence() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
    let guest = Manner {
        keeps: true,
        ..Manner::default()
    };
    let record = bench.submit(kept(
        FakeGrammar::new([0; 3]),
        Request {
            sampling: Sampling::Guest(Box::new(FakeGuest::new(guest))),
            ..warm()
        },
    ));
    let other = bench.submit(kept(FakeGrammar::new([0; 3]), warm()));
    bench.drain();
    let Some(Event::Failed(error @ SequenceError::Plan(_))) = record.end() else {
        panic!("{:?}", record.end())
    };
    let words = "grammar must be none where the request has its own";
    assert!(error.to_string().contains(words), "{error}");
    assert!(record.tokens().is_empty());
    assert_eq!(other.tokens().len(), LENGTH);
}

#[test]
fn a_late_grammar_sits_out_while_others_go_on() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
    let late = bench.submit(kept(FakeGrammar::new([40; 3]), request(&[1, 2, 3], 2)));
    let other = bench.submit(request(&[1, 2, 3], 9));
    (0..9).for_each(|_| assert!(bench.step()));
    assert_eq!((late.tokens().len(), other.tokens().len()), (0, 9));
    bench.drain();
    let Some(Event::Finished { usage, .. }) = late.end() else {
        panic!("{:?}", late.end())
    };
    assert_eq!((usage.completion_tokens, usage.sat_out_steps), (2, 2));
}

#[test]
fn a_failing_grammar_ends_its_own_sequence() {
    let mut bench = Bench::new(limits(32, 4, 64, 4), 64);
    let mut grammar = FakeGrammar::new([0; 3]);
    grammar.fails_at = Some(3);
    let failing = bench.submit(kept(grammar, warm()));
    let other = bench.submit(kept(FakeGrammar::new([1; 3]), warm()));
    bench.drain();
    assert_eq!(failing.tokens().len(), 3);
    assert!(
        matches!(
            failing.end(),
            Some(Event::Failed(SequenceError::Grammar(GrammarError::Stuck { .. })))
        ),
        "{:?}",
        failing.end()
    );
    assert_eq!(other.tokens().len(), LENGTH);
    assert_allowed(&other.tokens());
}
