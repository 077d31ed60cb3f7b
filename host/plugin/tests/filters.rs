//! Filters through the real boundary: what goes in and out, and that one that misbehaves fails alone, in bounded time.

mod guests;

use std::time::{Duration, Instant};

use galerne_core::filter::{Channel, FilterError, Refusal, Verdict};
use galerne_core::guest::{FilterSession, GuestError};
use galerne_core::limits::GuestLimits;
use galerne_plugin::PluginOptions;
use guests::expect::{FOREVER, is_deadline, is_limit, is_trap, serves};
use guests::filter::{Filter, info, request};
use guests::{built, host, host_with};

/// Takes all but the last byte.
const HOLD_ONE: &str = "(call $passage (local.get 3)
    (i32.sub (local.get 4) (i32.const 1)) (i32.sub (local.get 4) (i32.const 1)))";
/// Takes nothing.
const HOLD_ALL: &str = "(call $passage (i32.const 0) (i32.const 0) (i32.const 0))";

fn on_text(body: &str) -> Filter<'_> {
    Filter {
        on_text: body,
        ..Filter::default()
    }
}

fn on_request(body: &str) -> Filter<'_> {
    Filter {
        on_request: body,
        ..Filter::default()
    }
}

#[test]
fn a_filter_that_does_nothing_changes_nothing() {
    let mut session = Filter::default().session(&host());
    assert_eq!(session.on_request(&request()), Ok(Verdict::Pass));
    for channel in [Channel::Content, Channel::Reasoning, Channel::ToolArguments(3)] {
        assert_eq!(session.on_text(channel, "héllo"), Ok("héllo".to_owned()));
        assert_eq!(session.finish(channel), Ok(String::new()));
    }
}

#[test]
fn a_request_comes_back_as_it_was_rewritten() {
    // rewrite, with the lists that came.
    let body = "(i32.store (i32.const 96) (i32.const 1))
        (i32.store (i32.const 100) (local.get 1)) (i32.store (i32.const 104) (local.get 2))
        (i32.store (i32.const 108) (local.get 3)) (i32.store (i32.const 112) (local.get 4)) (i32.const 96)";
    let mut session = on_request(body).session(&host());
    assert_eq!(session.on_request(&request()), Ok(Verdict::Rewrite(request())));
}

#[test]
fn what_is_held_back_comes_again_on_its_own_channel() {
    let mut session = on_text(HOLD_ONE).session(&host());
    let (content, reasoning) = (Channel::Content, Channel::Reasoning);
    assert_eq!(session.on_text(content, "abc"), Ok("ab".to_owned()));
    assert_eq!(session.on_text(reasoning, "12"), Ok("1".to_owned()));
    assert_eq!(session.on_text(content, ""), Ok(String::new()));
    assert_eq!(session.on_text(content, "d"), Ok("c".to_owned()));
    assert_eq!(session.finish(content), Ok("d".to_owned()));
    assert_eq!(session.finish(reasoning), Ok("2".to_owned()));
    assert_eq!(session.finish(content), Ok(String::new()), "it is held no more");
}

#[test]
fn a_refused_request_says_why() {
    // refuse: status 451, "no".
    let body =
        "(drop (call $refusal (i32.const 451))) (i32.store (i32.const 128) (i32.const 2)) (i32.const 128)";
    let mut session = on_request(body).session(&host());
    let expected = FilterError::Refused(Refusal {
        guest: "evil".to_owned(),
        status: 451,
        reason: "no".to_owned(),
    });
    assert_eq!(session.on_request(&request()), Err(expected.clone()));
    assert_eq!(session.on_text(Channel::Content, "a"), Err(expected));
}

#[test]
fn a_refusal_in_the_middle_of_an_answer_ends_it() {
    // From the third byte on.
    let body = "(if (result i32) (i32.ge_u (local.get 4) (i32.const 3))
        (then (call $refusal (i32.const 403))) (else (call $passage (i32.const 0) (i32.const 0) (i32.const 0))))";
    let mut session = on_text(body).session(&host());
    assert_eq!(session.on_text(Channel::Content, "ab"), Ok(String::new()));
    let Err(refused) = session.on_text(Channel::Content, "c") else {
        panic!("it let the third byte out")
    };
    assert!(
        matches!(&refused, FilterError::Refused(refusal) if refusal.status == 403 && refusal.reason == "no"),
        "{refused}"
    );
    assert_eq!(session.on_text(Channel::Reasoning, "a"), Err(refused.clone()));
    assert_eq!(session.finish(Channel::Content), Err(refused));
}

#[test]
fn sessions_have_separate_instances() {
    // Lets out as many bytes as it was called times.
    let body = "(i32.store (i32.const 200) (i32.add (i32.load (i32.const 200)) (i32.const 1)))
        (call $passage (i32.const 300) (i32.load (i32.const 200)) (local.get 4))";
    let filter = on_text(body);
    let host = host();
    let guest = host.load_filter("counter", &filter.component()).expect("it fits");
    let mut sessions = [0, 1].map(|_| guest.session("{}", &info()).expect("a session"));
    for expected in 1..4 {
        for session in &mut sessions {
            let text = session.on_text(Channel::Content, "a").expect("lets out");
            assert_eq!(text.len(), expected);
        }
    }
}

/// What a misbehaving session gives in bounded time; the host must serve others afterwards.
fn failing(filter: &Filter<'_>, call: impl FnOnce(&mut dyn FilterSession) -> FilterError) -> GuestError {
    let host = host();
    let mut session = filter.session(&host);
    let mut neighbour = Filter::default().session(&host);
    let started = Instant::now();
    let error = call(&mut *session);
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "contained only after {:?}",
        started.elapsed()
    );
    assert_eq!(
        session.finish(Channel::Content),
        Err(error.clone()),
        "a failed session stays failed"
    );
    assert_eq!(neighbour.on_text(Channel::Content, "a"), Ok("a".to_owned()));
    serves(&host);
    match error {
        FilterError::Guest(error) => error,
        FilterError::Refused(refusal) => panic!("expected a failure, got {refusal}"),
    }
}

fn failing_request(body: &str) -> GuestError {
    failing(&on_request(body), |session| {
        session.on_request(&request()).expect_err("it misbehaves")
    })
}

fn failing_text(body: &str, text: &str) -> GuestError {
    failing(&on_text(body), |session| {
        session
            .on_text(Channel::Content, text)
            .expect_err("it misbehaves")
    })
}

fn failing_finish(body: &str) -> GuestError {
    let filter = Filter {
        finish: body,
        ..Filter::default()
    };
    failing(&filter, |session| {
        session.finish(Channel::Content).expect_err("it misbehaves")
    })
}

#[test]
fn calls_that_never_return() {
    is_deadline(&failing_request(FOREVER), "on-request", 300);
    is_deadline(&failing_text(FOREVER, "a"), "on-text", 200);
    is_deadline(&failing_finish(FOREVER), "finish", 200);
}

#[test]
fn a_session_that_is_never_created() {
    let filter = Filter {
        create: FOREVER,
        ..Filter::default()
    };
    let host = host();
    let guest = host.load_filter("evil", &filter.component()).expect("it fits");
    let error = guest.session("{}", &info()).err().expect("it misbehaves");
    is_deadline(&error, "create", 300);
    serves(&host);
}

#[test]
fn calls_that_trap() {
    is_trap(&failing_request("unreachable"), "unreachable");
    is_trap(&failing_text("unreachable", "a"), "unreachable");
    is_trap(&failing_finish("unreachable"), "unreachable");
}

#[test]
fn text_held_back_forever() {
    let error = failing(&on_text(HOLD_ALL), |session| {
        let piece = "x".repeat(1_000);
        (0..66)
            .find_map(|_| session.on_text(Channel::Content, &piece).err())
            .expect("66,000 bytes are more than it may hold back")
    });
    is_limit(&error, "held back of at most 65536 bytes per request, held 66000");
}

#[test]
fn channels_are_held_back_together() {
    let error = failing(&on_text(HOLD_ALL), |session| {
        let piece = "x".repeat(30_000);
        for channel in [Channel::Content, Channel::Reasoning] {
            session.on_text(channel, &piece).expect("within its limit");
        }
        session
            .on_text(Channel::ToolArguments(0), &piece)
            .expect_err("90,000 bytes")
    });
    is_limit(&error, "held back of at most 65536 bytes");
}

#[test]
fn text_without_end() {
    let host = host_with(&PluginOptions {
        limits: GuestLimits {
            filtered_bytes_max: 100_000,
            ..GuestLimits::default()
        },
        ..PluginOptions::default()
    });
    let body = "(call $passage (i32.const 1000) (i32.const 30000) (local.get 4))";
    let mut session = on_text(body).session(&host);
    let error = (0..4).find_map(|_| session.on_text(Channel::Content, "a").err());
    match error {
        Some(FilterError::Guest(error)) => {
            is_limit(
                &error,
                "let out of at most 100000 bytes per request, wanted 120000",
            );
        }
        other => panic!("expected a limit, got {other:?}"),
    }
}

#[test]
fn text_that_is_not_in_memory() {
    let body = "(call $passage (i32.const 1000) (i32.const 2147483647) (local.get 4))";
    is_trap(&failing_text(body, "a"), "out of bounds of memory");
}

/// The guest gave an answer the contract does not allow.
fn is_answer(error: &GuestError, words: &str) {
    match error {
        GuestError::Answer { got, .. } => assert!(got.contains(words), "expected \"{words}\" in \"{got}\""),
        other => panic!("expected a wrong answer, got {other:?}"),
    }
}

#[test]
fn more_taken_than_there_is() {
    for taken in [2, u32::MAX] {
        let body = format!("(call $passage (i32.const 0) (i32.const 0) (i32.const {taken}))");
        is_answer(&failing_text(&body, "a"), &format!("{taken} of 1 bytes"));
    }
}

#[test]
fn half_a_character_taken() {
    let body = "(call $passage (i32.const 0) (i32.const 0) (i32.const 1))";
    is_answer(&failing_text(body, "é"), "1 of 2 bytes");
}

#[test]
fn a_refusal_with_a_status_of_success() {
    is_answer(&failing_text("(call $refusal (i32.const 200))", "a"), "200");
    is_answer(&failing_finish("(call $refusal (i32.const 65535))"), "65535");
}

#[test]
fn a_request_rewritten_to_nothing() {
    is_answer(
        &failing_request("(i32.store (i32.const 96) (i32.const 1)) (i32.const 96)"),
        "without messages",
    );
}

/// What the hostile guest's filter gives when it misbehaves like this in this call, after some thousand pieces of text.
fn hostile(component: &[u8], how: &str, call: &str) -> Result<(), FilterError> {
    let host = host();
    let guest = host.load_filter("evil", component).expect("it fits");
    let params = format!(r#"{{"misbehave": "{how}", "in": "{call}"}}"#);
    let started = Instant::now();
    let answer = || {
        let mut session = guest.session(&params, &info())?;
        session.on_request(&request())?;
        for _ in 0..5_000 {
            session.on_text(Channel::Content, "some more text ")?;
        }
        session.finish(Channel::Content).map(drop)
    };
    let result = answer();
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{how} in {call}: contained only after {:?}",
        started.elapsed()
    );
    serves(&host);
    result
}

#[test]
fn a_hostile_filter_is_contained_in_every_call() {
    let Some(component) = built("hostile") else { return };
    hostile(&component, "nothing", "create").expect("it behaves");
    for call in ["create", "on-request", "on-text", "finish"] {
        for (how, error) in [
            ("loop", "past its limit of"),
            ("trap", "trapped"),
            ("recurse", "trapped"),
            ("alloc", "memory of at most"),
        ] {
            let got = hostile(&component, how, call).expect_err("it misbehaves");
            let text = got.to_string();
            assert!(
                text.contains(error) && text.contains(&format!("in {call}")),
                "{how} in {call}: expected \"{error}\" in \"{text}\""
            );
        }
    }
}

#[test]
fn what_a_hostile_filter_says_is_not_believed() {
    let Some(component) = built("hostile") else { return };
    for (how, error) in [
        ("empty", "a request without messages"),
        ("hold", "text held back of at most 65536 bytes"),
        ("gigantic", "a call may pass at most"),
        ("flood", "text let out of at most 8388608 bytes"),
        ("overtake", "4294967295 of 15 bytes"),
        ("status", "200"),
    ] {
        let got = hostile(&component, how, "none").expect_err("it misbehaves");
        assert!(
            got.to_string().contains(error),
            "{how}: expected \"{error}\" in \"{got}\""
        );
    }
}
