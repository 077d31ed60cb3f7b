//! Cells that die, fall silent or do not start: what their requests are told, and that others go on.

mod guests;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use galerne_core::chat::ChatOptions;
use galerne_core::guest::{Answer, GuestError, PlanStep, SequenceInfo};
use galerne_core::ids::TokenId;
use galerne_core::limits::CellLimits;
use galerne_plugin::{Isolation, PluginHost, PluginOptions};
use guests::{Chat, Sampler, counting_waker, host_with, plan, wait, worker};

/// Signals by number, for `kill`.
const KILL: &str = "-KILL";
const STOP: &str = "-STOP";

/// A host whose cells have this mark on their command line: their limit on memory.
fn marked(mark: u64) -> PluginHost {
    host_with(&PluginOptions {
        isolation: Isolation::Process,
        worker: Some(worker()),
        cell: CellLimits {
            memory_bytes_max: (4 << 30) + mark,
            slack: Duration::from_millis(500),
            ..CellLimits::default()
        },
        ..PluginOptions::default()
    })
}

/// The processes of cells with this mark.
fn cells(mark: u64) -> Vec<String> {
    let marked = format!("cell\0{}\0", (4u64 << 30) + mark);
    let processes = std::fs::read_dir("/proc").expect("the kernel lists processes");
    processes
        .flatten()
        .filter(|process| {
            let line = std::fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            line.ends_with(&marked)
        })
        .map(|process| process.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Sends a signal to the one cell with this mark.
fn signal(mark: u64, signal: &str) {
    let pids = cells(mark);
    assert_eq!(pids.len(), 1, "one cell of a tenant, found {pids:?}");
    let sent = std::process::Command::new("kill").arg(signal).args(pids).status();
    assert!(sent.expect("kill runs").success());
}

fn is_gone(error: &GuestError, words: &str) {
    match error {
        GuestError::Process { guest, reason, .. } => {
            assert_eq!(guest, "good");
            assert!(reason.contains(words), "expected \"{words}\" in \"{reason}\"");
        }
        other => panic!("expected a lost process, got {other:?}"),
    }
}

#[test]
fn a_cell_that_dies_ends_its_requests_and_comes_back() {
    let host = marked(1);
    let guest = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let session = || {
        guest
            .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
            .expect("a session")
    };
    let mut before = session();
    plan(&mut before, 1, &[]).expect("a plan");
    signal(1, KILL);
    let error = plan(&mut before, 2, &[]).expect_err("its process is gone");
    is_gone(&error, "signal: 9");
    assert_eq!(plan(&mut before, 3, &[]), Err(error), "a lost session stays lost");
    plan(&mut session(), 1, &[]).expect("a new session has a new process");
}

#[test]
fn a_cell_that_falls_silent_is_ended() {
    let host = marked(2);
    let guest = host
        .load_chat("good", &Chat::default().component())
        .expect("it fits");
    let mut parser = guest.parser(&ChatOptions::default()).expect("a parser");
    parser.push("a").expect("it answers");
    signal(2, STOP);
    let started = Instant::now();
    let Err(galerne_core::chat::ChatError::Guest(error)) = parser.push("a") else {
        panic!("a stopped process answered")
    };
    is_gone(&error, "did not answer within 700 ms");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(guest.recognises(None, &[]), Ok(true));
}

#[test]
fn tenants_have_cells_of_their_own() {
    let host = marked(3);
    let component = Sampler::default().component();
    let load = |tenant: &str| host.for_tenant(tenant).load_sampler("good", &component);
    let (ours, theirs) = (load("ours").expect("it fits"), load("theirs").expect("it fits"));
    let mut session = ours
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    // Stopped in the middle of whatever it does, and then gone.
    drop(theirs);
    plan(&mut session, 1, &[]).expect("a plan");
}

#[test]
fn the_questions_of_a_step_are_all_answered() {
    let host = marked(4);
    let guest = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let mut sessions: Vec<_> = (0..16)
        .map(|_| {
            guest
                .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
                .expect("a session")
        })
        .collect();
    for position in 0..100u32 {
        for session in &mut sessions {
            session.request_plan(PlanStep {
                position,
                accepted: vec![],
            });
            session.flush();
        }
        // Whoever hears them: this thread does beside the one that reads, or that alone.
        let hears = position % 2 == 0;
        for session in &mut sessions {
            let take = || {
                if hears {
                    session.hear();
                }
                session.take_plan()
            };
            let plan = wait(take).expect("a plan");
            assert_eq!(plan.temperature.to_bits(), (position as f32).to_bits());
        }
    }
}

#[test]
fn a_program_that_is_no_cell_is_tried_again_later_and_later() {
    // Compiles in this process's stead, then cannot be a cell.
    let folder = tempfile::tempdir().expect("a folder");
    let options = |worker: PathBuf| PluginOptions {
        isolation: Isolation::Process,
        worker: Some(worker),
        artifacts: Some(folder.path().join("compiled")),
        ..PluginOptions::default()
    };
    let component = Chat::default().component();
    let load = |host: &PluginHost| host.load_chat("good", &component);
    load(&host_with(&options(worker()))).expect("it fits");
    let host = host_with(&options(PathBuf::from("/bin/false")));
    is_gone(&load(&host).err().expect("no cell"), "its cell ended");
    let mut said = String::new();
    for _ in 0..6 {
        said = load(&host).err().expect("no cell").to_string();
    }
    assert!(said.contains("is started again in"), "{said}");
}

#[test]
fn a_closed_session_with_an_open_question_is_no_error() {
    let host = marked(5);
    let guest = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    for _ in 0..100 {
        let mut session = guest
            .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
            .expect("a session");
        session.request_plan(PlanStep {
            position: 0,
            accepted: vec![],
        });
        session.flush();
        if let Answer::Ready(plan) = session.take_plan() {
            plan.expect("an open question is no error");
        }
    }
}

#[test]
fn whoever_ends_a_session_does_not_wait_for_a_cell_that_does_not_read() {
    let host = marked(7);
    let guest = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let mut session = guest
        .session(&SequenceInfo::new("{}", 100, 0), counting_waker().0)
        .expect("a session");
    signal(7, STOP);
    // More than the socket takes.
    session.request_plan(PlanStep {
        position: 0,
        accepted: vec![TokenId(u32::MAX); 200_000],
    });
    let begin = Instant::now();
    drop(session);
    assert!(
        begin.elapsed() < Duration::from_millis(200),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_tenant_without_guests_has_no_process() {
    let host = marked(6);
    let load = || {
        host.load_chat("good", &Chat::default().component())
            .expect("it fits")
    };
    let (guest, other) = (load(), load());
    let parser = guest.parser(&ChatOptions::default()).expect("a parser");
    drop((guest, other));
    assert_eq!(cells(6).len(), 1, "a parser is still in use");
    drop(parser);
    let patience = Instant::now() + Duration::from_secs(5);
    while !cells(6).is_empty() {
        assert!(Instant::now() < patience, "the process was never ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        load().recognises(None, &[]),
        Ok(true),
        "the next guest has a new one"
    );
}
