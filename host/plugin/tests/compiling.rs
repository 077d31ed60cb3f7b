//! Compiling in a process of its own: what it gives, what it is denied, and that its work is kept.

mod guests;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use galerne_core::guest::{GuestError, SequenceInfo};
use galerne_core::limits::CompileLimits;
use galerne_plugin::{PluginHost, PluginOptions};
use guests::expect::{is_limit, is_link, serves};
use guests::{Model, Sampler, host_with, worker};

fn options() -> PluginOptions {
    PluginOptions {
        worker: Some(worker()),
        ..PluginOptions::default()
    }
}

/// A component whose one function keeps hundreds of values alive over thousands of instructions.
fn slow_to_compile() -> Vec<u8> {
    let locals = "(local i64)".repeat(900);
    let mut body = String::from("(loop $again ");
    for at in 0..60_000u64 {
        let (to, from, other) = (at * 7 % 900, at * 13 % 900, at * 31 % 900);
        body += &format!(
            "(local.set {to} (i64.add (local.get {from}) (i64.mul (local.get {other}) (i64.const {at})))) "
        );
    }
    body += "(br $again))";
    let more = format!("(func {locals} {body})");
    Model {
        more: &more,
        ..Model::default()
    }
    .component()
}

/// How loading the slow component ends under these limits.
fn refused(limits: CompileLimits) -> GuestError {
    let host = host_with(&PluginOptions {
        compile: limits,
        ..options()
    });
    let started = Instant::now();
    let error = host
        .load_model("evil", &slow_to_compile())
        .err()
        .expect("past a limit");
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    error
}

#[test]
fn a_component_compiled_elsewhere_runs_here() {
    let host = host_with(&options());
    serves(&host);
    let guest = host
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let mut session = guest
        .session(&SequenceInfo::new("{}", 100, 0), guests::counting_waker().0)
        .expect("a session");
    assert!(guests::plan(&mut session, 1, &[]).is_ok());
}

#[test]
fn compiling_that_takes_too_long() {
    let wall = Duration::from_millis(300);
    let error = refused(CompileLimits {
        wall,
        ..CompileLimits::default()
    });
    is_limit(&error, "compiling for at most 0.3 s");
    let error = refused(CompileLimits {
        cpu: Duration::from_secs(1),
        ..CompileLimits::default()
    });
    is_limit(&error, "at most 1 s of CPU time");
}

#[test]
fn compiling_that_takes_too_much_memory() {
    let memory_bytes_max = 48 << 20;
    let error = refused(CompileLimits {
        memory_bytes_max,
        ..CompileLimits::default()
    });
    is_limit(&error, &format!("at most {memory_bytes_max} bytes of memory"));
}

#[test]
fn compiled_code_that_is_too_large() {
    let host = host_with(&PluginOptions {
        compile: CompileLimits {
            artifact_bytes_max: 1_000,
            ..CompileLimits::default()
        },
        ..options()
    });
    let error = host
        .load_model("evil", &Model::default().component())
        .err()
        .expect("too large");
    is_limit(&error, "compiled code of at most 1000 bytes");
}

#[test]
fn a_broken_component_is_described_as_ever() {
    let broken = [&Model::default().component()[..64], &[0xff; 64]].concat();
    let here = host_with(&PluginOptions::default())
        .load_model("evil", &broken)
        .err();
    let there = host_with(&options()).load_model("evil", &broken).err();
    is_link(there.as_ref().expect("broken"), &["no valid component"]);
    assert_eq!(here, there);
}

#[test]
fn a_missing_program_is_nobodys_component_fault() {
    let host = host_with(&PluginOptions {
        worker: Some(PathBuf::from("/nowhere/galerne")),
        ..PluginOptions::default()
    });
    match host.load_model("good", &Model::default().component()).err() {
        Some(GuestError::Process { reason, .. }) => assert!(reason.contains("/nowhere/galerne"), "{reason}"),
        other => panic!("expected no process, got {other:?}"),
    }
}

#[test]
fn compiled_code_outlives_the_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let keep = |worker: PathBuf| -> PluginHost {
        host_with(&PluginOptions {
            artifacts: Some(folder.path().join("compiled")),
            worker: Some(worker),
            ..PluginOptions::default()
        })
    };
    serves(&keep(worker()));
    // Nobody there could compile it.
    serves(&keep(PathBuf::from("/nowhere/galerne")));
}
