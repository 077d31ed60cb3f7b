//! Independent clients against a running host: aioquic over HTTP/3, the OpenAI SDK over plain HTTP.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::{Host, MODEL, data, root};
use serde_json::Value;

/// The Python with the clients, or `None` with a visible note: `cargo xtask test` makes it.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("GALERNE_TEST_PYTHON")
        .map_or_else(|| root().join("target/python-clients/bin/python"), PathBuf::from);
    if python.exists() {
        return Some(python);
    }
    eprintln!(
        "SKIPPED: no Python clients at {}; `cargo xtask test` installs them",
        python.display()
    );
    None
}

fn client(python: &PathBuf, script: &str, args: &[&str]) -> Value {
    let output = Command::new(python)
        .arg(root().join("tests/clients").join(script))
        .args(args)
        .output()
        .expect("start the client");
    assert!(
        output.status.success(),
        "{script} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("the client prints JSON")
}

#[test]
fn aioquic_streams_a_chat_over_http3() {
    let (Some(python), Some(data)) = (python(), data()) else {
        return;
    };
    let host = Host::start(data, &[]);
    let port = host.https.rsplit(':').next().expect("a port").to_owned();
    let ca = data.join("tls/cert.pem");
    let seen = client(
        &python,
        "h3_chat.py",
        &[&port, ca.to_str().expect("a plain path"), MODEL],
    );
    assert_eq!(seen["status"], "200");
    assert!(seen["text"].as_str().expect("a text").contains("Paris"), "{seen}");
    let ids = seen["ids"].as_array().expect("ids");
    assert_eq!(
        ids.len() as u64,
        seen["events"].as_u64().expect("a count"),
        "every event has an id"
    );
}

#[test]
fn openai_sdk_streams_and_completes_over_plain_http() {
    let (Some(python), Some(data)) = (python(), data()) else {
        return;
    };
    let host = Host::start(data, &[]);
    let seen = client(&python, "openai_chat.py", &[&host.http, MODEL]);
    assert!(seen["text"].as_str().expect("a text").contains("Paris"), "{seen}");
    assert_eq!(seen["finish"], "stop");
    assert!(
        seen["chunks"].as_u64().expect("a count") > 3,
        "it streamed: {seen}"
    );
}
