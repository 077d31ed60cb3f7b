//! Tools through the real boundary: what is listed and answered, and that one that misbehaves fails alone, in bounded time.

pub(crate) mod guests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_core::guest::{GuestError, ToolFactory};
use galerne_core::limits::GuestLimits;
use galerne_core::tool::ToolError;
use galerne_plugin::{PluginHost, PluginOptions};
use guests::expect::{is_deadline, is_limit, is_link, is_trap, serves};
use guests::filter::{Filter, info};
use guests::{built, host_with};

/// A host whose tools have little time.
fn host() -> PluginHost {
    host_with(&PluginOptions {
        limits: GuestLimits {
            tool_deadline: Duration::from_millis(200),
            ..GuestLimits::default()
        },
        ..PluginOptions::default()
    })
}

fn params(how: &str, call: &str) -> String {
    format!(r#"{{"misbehave": "{how}", "in": "{call}"}}"#)
}

/// The hostile guest, called "evil", if it is built.
fn evil(host: &PluginHost) -> Option<Arc<dyn ToolFactory>> {
    Some(host.load_tool("evil", &built("hostile")?).expect("it fits"))
}

/// What `run` gives in bounded time; the host serves others afterwards.
fn contained<T>(host: &PluginHost, run: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = run();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(5), "contained only after {took:?}");
    serves(host);
    result
}

#[test]
fn calculator_calculates() {
    let Some(component) = built("calculator") else {
        return;
    };
    let host = host();
    let guest = host.load_tool("calculator", &component).expect("it fits");
    let tools = guest.list("{}").expect("lists");
    let names: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
    assert_eq!(names, ["calculate"]);
    let mut session = guest.session("{}", &info()).expect("a session");
    let answer = session.call("calculate", r#"{"expression": "(1 + 2) * 3 / 4"}"#);
    assert_eq!(answer, Ok("2.25".to_owned()));
    for wrong in [r#"{"expression": "1 +"}"#, r#"{"expr": "1"}"#, "[]", "{", ""] {
        let error = session.call("calculate", wrong).expect_err(wrong);
        assert!(matches!(error, ToolError::Arguments(_)), "{wrong}: {error:?}");
    }
    let error = session.call("shell", "{}").expect_err("no such function");
    assert!(matches!(error, ToolError::Failed(_)), "{error:?}");
    let error = guest.list(r#"{"precision": 3}"#).expect_err("unknown parameters");
    assert!(matches!(error, GuestError::Refused { .. }), "{error}");
}

#[test]
fn a_filter_is_no_tool() {
    let error = host()
        .load_tool("evil", &Filter::default().component())
        .err()
        .expect("another world");
    is_link(&error, &["galerne:tool/tools@0.1.0"]);
}

#[test]
fn hostile_lists_are_contained() {
    let host = host();
    let Some(guest) = evil(&host) else { return };
    let list = |how: &str| contained(&host, || guest.list(&params(how, "list")).expect_err(how));
    is_deadline(&list("loop"), "list", 300);
    is_trap(&list("trap"), "unreachable");
    is_trap(&list("recurse"), "");
    is_limit(&list("alloc"), "memory of at most");
    // It runs out of whichever comes first.
    let error = list("million");
    assert!(
        matches!(error, GuestError::Limit { .. } | GuestError::Deadline { .. }),
        "{error}"
    );
    is_limit(&list("hundred"), "at most 64 functions in one list, got 100");
    is_limit(&list("wordy"), "descriptions and schemas of at most 262144 bytes");
    for (how, words) in [
        ("twins", "\"a\" again"),
        ("name", "drop table"),
        ("schema", "that of \"a\": no JSON"),
        ("list-schema", "that of \"a\": JSON, but no object"),
        ("refuse", "no parameters please"),
    ] {
        let text = list(how).to_string();
        assert!(text.contains(words), "{how}: expected \"{words}\" in \"{text}\"");
    }
    guest.list("{}").expect("lists after all that");
}

#[test]
fn hostile_calls_are_contained_and_say_nothing_of_the_next() {
    let host = host();
    let Some(guest) = evil(&host) else { return };
    let call = |how: &str| {
        let params = params(how, "call");
        let mut session = guest.session(&params, &info()).expect("a session");
        contained(&host, || session.call("a", "{}"))
    };
    let failed = |how: &str| match call(how) {
        Err(ToolError::Guest(error)) => error,
        other => panic!("{how}: expected a failure, got {other:?}"),
    };
    is_deadline(&failed("loop"), "call", 200);
    is_trap(&failed("trap"), "unreachable");
    is_trap(&failed("recurse"), "");
    is_limit(&failed("alloc"), "memory of at most");
    is_limit(&failed("large"), "an answer of at most 262144 bytes, got 1048576");
    is_limit(&failed("gigantic"), "a call may pass at most");
    match call("wordy-error") {
        Err(ToolError::Failed(message)) => assert!(message.len() < 500, "{} bytes", message.len()),
        other => panic!("expected a short message, got {other:?}"),
    }
    assert_eq!(call("nothing"), Ok("all is well".to_owned()));
}

#[test]
fn a_session_survives_a_call_that_fails() {
    let host = host();
    let Some(guest) = evil(&host) else { return };
    let mut session = guest
        .session(&params("trap", "call"), &info())
        .expect("a session");
    for _ in 0..2 {
        assert!(matches!(
            session.call("a", "{}"),
            Err(ToolError::Guest(GuestError::Trap { .. }))
        ));
    }
}
