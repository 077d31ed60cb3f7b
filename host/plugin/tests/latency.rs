//! What the boundary costs. Run with `--ignored --nocapture` on a quiet machine.
#![expect(clippy::print_stdout, reason = "measurements are for reading")]

mod guests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use galerne_core::chat::ChatOptions;
use galerne_core::filter::{Channel, FilterRequest};
use galerne_core::guest::{Answer, PlanStep, SequenceInfo, Waker};
use galerne_core::ids::TokenId;
use galerne_core::sampling::Candidate;
use galerne_plugin::{Isolation, PluginHost, PluginOptions};
use guests::filter::{info, user};
use guests::{Chat, Model, Sampler, built, host, host_with, worker};

fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what}: p50 {:?}, p90 {:?}, p99 {:?}", at(50), at(90), at(99));
    at(50)
}

fn timed(count: usize, mut run: impl FnMut()) -> Vec<Duration> {
    (0..count)
        .map(|_| {
            let started = Instant::now();
            run();
            started.elapsed()
        })
        .collect()
}

#[test]
#[ignore = "a measurement"]
fn plan_and_choose() {
    let small = Sampler::default().component();
    rounds("idle cores", &small, 40);
    if let Some(mirostat) = built("mirostat") {
        rounds("idle cores, mirostat", &mirostat, 256);
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        rounds("all cores busy", &small, 40);
        stop.store(true, Ordering::Relaxed);
    });
}

/// Rounds as the engine has them: ask, sleep until woken, take.
fn rounds(when: &str, component: &[u8], shown: u32) {
    let guest = host().load_sampler("good", component).expect("it fits");
    let engine = std::thread::current();
    let waker: Waker = Arc::new(move || engine.unpark());
    let mut session = guest
        .session(&SequenceInfo::new("{}", 49_152, 0), waker)
        .expect("a session");
    let candidates: Vec<Candidate> = (0..shown)
        .map(|token| Candidate {
            token: TokenId(token),
            logprob: -1.0,
        })
        .collect();
    let mut plans = Vec::new();
    let mut choices = Vec::new();
    for position in 0..5_000 {
        let started = Instant::now();
        session.request_plan(PlanStep {
            position: position % 100,
            accepted: vec![TokenId(position)],
        });
        session.flush();
        while matches!(session.take_plan(), Answer::Pending) {
            std::thread::park();
        }
        plans.push(started.elapsed());
        let started = Instant::now();
        session.request_choice(candidates.clone());
        session.flush();
        while matches!(session.take_choice(), Answer::Pending) {
            std::thread::park();
        }
        choices.push(started.elapsed());
    }
    let plan = report(&format!("{when}: plan, asked to taken"), plans);
    let choice = report(&format!("{when}: choose of {shown}, asked to taken"), choices);
    println!("{when}: a round costs {:?}", plan + choice);
}

#[test]
#[ignore = "a measurement"]
fn steps_in_a_cell() {
    let small = Sampler::default().component();
    steps("16 sessions in this process", &host(), &small);
    let in_cells = host_with(&PluginOptions {
        isolation: Isolation::Process,
        worker: Some(worker()),
        ..PluginOptions::default()
    });
    steps("16 sessions in a cell", &in_cells, &small);
    if let Some(mirostat) = built("mirostat") {
        steps("16 sessions of mirostat in a cell", &in_cells, &mirostat);
    }
}

/// Steps as the engine has them: ask every session, sleep until all have answered.
fn steps(what: &str, host: &PluginHost, component: &[u8]) {
    let guest = host.load_sampler("good", component).expect("it fits");
    let (engine, waiting) = (std::thread::current(), Arc::new(AtomicUsize::new(0)));
    let woken = Arc::clone(&waiting);
    let waker: Waker = Arc::new(move || {
        if woken.fetch_sub(1, Ordering::AcqRel) == 1 {
            engine.unpark();
        }
    });
    let open = || guest.session(&SequenceInfo::new("{}", 49_152, 0), Arc::clone(&waker));
    report(&format!("{what}: a new session"), timed(2_000, || drop(open())));
    let mut sessions: Vec<_> = (0..16).map(|_| open().expect("a session")).collect();
    let times = timed(5_000, || {
        waiting.store(sessions.len(), Ordering::Release);
        for session in &mut sessions {
            session.request_plan(PlanStep {
                position: 1,
                accepted: vec![TokenId(1)],
            });
        }
        sessions.iter_mut().for_each(|session| session.flush());
        while waiting.load(Ordering::Acquire) > 0 {
            std::thread::park();
        }
        for session in &mut sessions {
            assert!(matches!(session.take_plan(), Answer::Ready(Ok(_))));
        }
    });
    report(&format!("{what}: a step's plans"), times);
}

#[test]
#[ignore = "a measurement"]
fn instances_and_calls() {
    let host = host();
    let component = Chat::default().component();
    report(
        "load of a new component",
        vec![timed(1, || drop(host.load_chat("good", &component)))[0]],
    );
    report(
        "load of a known component",
        timed(50, || drop(host.load_chat("good", &component))),
    );
    let chat = host.load_chat("good", &component).expect("it fits");
    report(
        "recognises in a fresh instance",
        timed(5_000, || drop(chat.recognises(None, &[]))),
    );
    let mut parser = chat.parser(&ChatOptions::default()).expect("a parser");
    let push = report("push to a parser", timed(50_000, || drop(parser.push("token"))));
    assert!(push < Duration::from_millis(1), "a push costs {push:?}");
    let model = host
        .load_model("good", &Model::default().component())
        .expect("it fits");
    report(
        "model-types in a fresh instance",
        timed(5_000, || drop(model.model_types())),
    );
}

#[test]
#[ignore = "a measurement"]
fn a_filter_on_an_answer() {
    let Some(component) = built("pii-redact") else {
        return;
    };
    let guest = host().load_filter("pii-redact", &component).expect("it fits");
    report(
        "pii-redact: a new session",
        timed(2_000, || drop(guest.session("{}", &info()))),
    );
    let mut session = guest.session("{}", &info()).expect("a session");
    let long = "Call Anne on 06 12 34 56 78 or write to anne@exemple.fr. ".repeat(200);
    let request = FilterRequest {
        messages: vec![user(&long)],
        tools: vec![],
    };
    report(
        "pii-redact: a request of 11 KB",
        timed(200, || drop(session.on_request(&request))),
    );
    let text = report(
        "pii-redact: on-text of a token",
        timed(50_000, || drop(session.on_text(Channel::Content, "token"))),
    );
    assert!(text < Duration::from_millis(1), "on-text costs {text:?}");
}

/// What an interpreter costs: `cargo xtask languages` builds these guests. Deadlines are a host's, not the tests' shorter
/// ones.
#[test]
#[ignore = "a measurement"]
fn languages() {
    let host = PluginHost::new(PluginOptions::default()).expect("a host");
    if let Some(python) = built("python-filter") {
        let guest = host.load_filter("python", &python).expect("it fits");
        let params = "{\"mask\": [\"paris\"]}";
        let session = || guest.session(params, &info()).expect("a session");
        report("python: a new session", timed(200, || drop(session())));
        let mut session = session();
        let request = FilterRequest {
            messages: vec![user("Which is the capital of France?")],
            tools: vec![],
        };
        report(
            "python: a request",
            timed(500, || drop(session.on_request(&request).expect("it passes"))),
        );
        let mut token = || session.on_text(Channel::Content, " token").expect("it passes");
        report("python: on-text of a token", timed(5_000, || drop(token())));
    }
    if let Some(javascript) = built("javascript-tool") {
        let guest = host.load_tool("javascript", &javascript).expect("it fits");
        let mut session = guest.session("{}", &info()).expect("a session");
        let arguments = "{\"from\": \"2024-02-01\", \"to\": \"2024-03-01\"}";
        let mut call = || session.call("days_between", arguments).expect("it counts");
        report(
            "javascript: a call in a new instance",
            timed(1_000, || drop(call())),
        );
    }
}
