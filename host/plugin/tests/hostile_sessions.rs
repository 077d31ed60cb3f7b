//! Sessions and parsers that misbehave: each fails alone, in bounded time, and its instance is freed.

mod guests;

use std::time::{Duration, Instant};

use galerne_core::chat::{ChatError, ChatOptions, Delta};
use galerne_core::guest::{Answer, GuestError, PlanStep, SequenceInfo};
use galerne_plugin::PluginOptions;
use guests::expect::{FOREVER, is_deadline, is_limit, is_trap, serves};
use guests::{Chat, Sampler, choose, counting_waker, host, host_with, plan};

/// A session's failing plan; a new session of the same guest must start afresh.
fn failing_plan(plan_body: &str) -> GuestError {
    let host = host();
    let guest = Sampler {
        plan: plan_body,
        ..Sampler::default()
    };
    let guest = host.load_sampler("evil", &guest.component()).expect("it fits");
    let mut session = guest
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    let error = plan(&mut session, 0, &[]).expect_err("it misbehaves");
    assert_eq!(
        plan(&mut session, 1, &[]),
        Err(error.clone()),
        "a failed session stays failed"
    );
    assert_eq!(choose(&mut session, 3), Err(error.clone()));
    let good = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let mut session = good
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    assert!(plan(&mut session, 1, &[]).is_ok());
    error
}

#[test]
fn a_plan_that_traps() {
    is_trap(&failing_plan("unreachable"), "unreachable");
}

#[test]
fn a_plan_that_never_returns() {
    is_deadline(&failing_plan(FOREVER), "plan", 200);
}

#[test]
fn a_plan_with_numbers_out_of_range() {
    for (field, offset, value) in [
        ("temperature", 148, f32::NAN),
        ("temperature", 148, -1.0),
        ("top_p", 156, f32::INFINITY),
        ("repetition_penalty", 136, 0.0),
    ] {
        let body = format!(
            "(i32.store (i32.const {offset}) (i32.const {})) (i32.const 128)",
            value.to_bits()
        );
        match failing_plan(&body) {
            GuestError::Plan { error, .. } => assert_eq!(error.field, field),
            other => panic!("expected a plan error, got {other:?}"),
        }
    }
}

#[test]
fn a_plan_that_wants_too_many_candidates() {
    let error = failing_plan("(i32.store (i32.const 176) (i32.const 257)) (i32.const 128)");
    assert!(
        matches!(&error, GuestError::Plan { error, .. } if error.field == "candidates"),
        "{error}"
    );
}

#[test]
fn a_choice_outside_the_candidates() {
    for index in ["3", "-1"] {
        let choose_body = format!("(i32.const {index})");
        let host = host();
        let guest = Sampler {
            choose: &choose_body,
            ..Sampler::default()
        };
        let guest = host.load_sampler("evil", &guest.component()).expect("it fits");
        let mut session = guest
            .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
            .expect("a session");
        let error = choose(&mut session, 3).expect_err("out of range");
        assert!(
            matches!(&error, GuestError::Plan { error, .. } if error.field == "choose"),
            "{error}"
        );
        serves(&host);
    }
}

/// What `create` gives with this body.
fn failing_create(create: &str) -> GuestError {
    let host = host();
    let guest = Sampler {
        create,
        ..Sampler::default()
    };
    let guest = host.load_sampler("evil", &guest.component()).expect("it fits");
    let error = guest
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .err()
        .expect("it misbehaves");
    serves(&host);
    error
}

#[test]
fn a_session_that_is_never_created() {
    is_deadline(&failing_create(FOREVER), "create", 300);
}

#[test]
fn a_forged_handle() {
    is_trap(
        &failing_create("(i32.store (i32.const 68) (i32.const 12345)) (i32.const 64)"),
        "handle",
    );
}

#[test]
fn handles_without_end() {
    let create = "(loop $again (drop (call $new (i32.const 1))) (br $again)) unreachable";
    is_limit(&failing_create(create), "at most 64 live resource handles");
}

#[test]
fn a_refusal_keeps_the_guests_words() {
    let create = "(i32.store8 (i32.const 64) (i32.const 1)) (i32.store (i32.const 68) (i32.const 300))
        (i32.store (i32.const 72) (i32.const 2)) (i32.store16 (i32.const 300) (i32.const 0x6f6e)) (i32.const 64)";
    match failing_create(create) {
        GuestError::Refused { message, .. } => assert_eq!(message, "no"),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn a_looping_session_does_not_stop_the_others() {
    let host = host();
    let evil = Sampler {
        plan: FOREVER,
        ..Sampler::default()
    };
    let evil = host.load_sampler("evil", &evil.component()).expect("it fits");
    let good = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let mut looping = evil
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    let mut others = [0, 1].map(|_| {
        good.session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
            .expect("a session")
    });
    looping.request_plan(PlanStep {
        position: 0,
        accepted: vec![],
    });
    looping.flush();
    let mut answered = 0;
    while matches!(looping.take_plan(), Answer::Pending) {
        for session in &mut others {
            plan(session, 1, &[]).expect("a plan");
            answered += 1;
        }
    }
    assert!(answered >= 4, "only {answered} plans while one guest looped");
}

#[test]
fn a_session_dropped_with_an_open_question_frees_its_instance() {
    let host = host_with(&PluginOptions {
        instances_max: 1,
        ..PluginOptions::default()
    });
    let evil = Sampler {
        plan: FOREVER,
        ..Sampler::default()
    };
    let evil = host.load_sampler("evil", &evil.component()).expect("it fits");
    let mut session = evil
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    is_limit(
        &evil
            .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
            .err()
            .expect("one instance only"),
        "all instances of this host are in use",
    );
    session.request_plan(PlanStep {
        position: 0,
        accepted: vec![],
    });
    session.flush();
    drop(session);
    let patience = Instant::now() + Duration::from_secs(5);
    while evil
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .is_err()
    {
        assert!(Instant::now() < patience, "the instance was never freed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_second_question_while_one_is_open_is_the_hosts_bug_and_harmless() {
    let host = host();
    let guest = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let mut session = guest
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    assert!(
        matches!(session.take_plan(), Answer::Ready(Err(_))),
        "nothing was asked"
    );
    assert!(plan(&mut session, 1, &[]).is_ok());
    session.request_plan(PlanStep {
        position: 2,
        accepted: vec![],
    });
    session.flush();
    let error = guests::wait(|| session.take_choice()).expect_err("a plan was asked for");
    is_trap(&error, "bug of the host");
    assert!(plan(&mut session, 3, &[]).is_ok());
}

#[test]
fn a_parser_that_traps_fails_alone() {
    let host = host();
    // Traps on an empty push.
    let push = "(if (i32.eqz (local.get 2)) (then unreachable)) (i32.const 280)";
    let guest = host
        .load_chat(
            "evil",
            &Chat {
                push,
                ..Chat::default()
            }
            .component(),
        )
        .expect("it fits");
    let mut broken = guest.parser(&ChatOptions::default()).expect("a parser");
    let mut whole = guest.parser(&ChatOptions::default()).expect("a parser");
    let error = broken.push("").expect_err("it traps");
    assert_eq!(
        broken.push("a"),
        Err(error.clone()),
        "a failed parser stays failed"
    );
    assert_eq!(broken.finish(), Err(error));
    assert_eq!(whole.push("a"), Ok(Vec::<Delta>::new()));
}

#[test]
fn a_render_that_never_returns() {
    let host = host();
    let guest = host
        .load_chat(
            "evil",
            &Chat {
                render: FOREVER,
                ..Chat::default()
            }
            .component(),
        )
        .expect("it fits");
    match guest.render(&[], &[], &ChatOptions::default()) {
        Err(ChatError::Guest(error)) => is_deadline(&error, "render", 300),
        other => panic!("expected a deadline, got {other:?}"),
    }
    serves(&host);
}
