//! `galerne bench serve` against a running host: what it counts, and what it says when nothing can be measured.

mod common;

use std::net::TcpListener;
use std::process::{Command, Output};

use common::{Host, MODEL, data};
use serde_json::Value;

fn bench(url: &str, model: &str, extra: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_galerne"))
        .args(["bench", "serve", "--url", url, "--model", model])
        .args(extra)
        .output()
        .expect("run galerne bench serve")
}

#[test]
fn a_burst_is_counted_to_the_token() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let extra = [
        "--clients",
        "4",
        "--requests",
        "6",
        "--prompt-tokens",
        "100",
        "--max-tokens",
        "8",
        "--json",
    ];
    let output = bench(&host.http, MODEL, &extra);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_str(&text).expect(&text);
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no number in {text}"));
    assert_eq!(
        (&report["clients"], &report["requests"]),
        (&4.into(), &6.into()),
        "{text}"
    );
    // The demo model ends its answers before that unless the server honours ignore_eos.
    assert_eq!(
        (&report["output_tokens"], &report["errors"]),
        (&48.into(), &0.into()),
        "{text}"
    );
    let prompt = number(&report["prompt_tokens"]);
    assert!(
        (95.0..=105.0).contains(&prompt),
        "expected about 100 prompt tokens: {text}"
    );
    let (ttft, itl) = (&report["ttft_ms"], &report["itl_ms"]);
    assert!(
        number(&ttft["p50"]) > 0.0 && number(&ttft["p99"]) >= number(&ttft["p50"]),
        "{text}"
    );
    assert!(
        number(&itl["p50"]) > 0.0 && number(&itl["p99"]) >= number(&itl["p50"]),
        "{text}"
    );
    let rate = 48.0 / number(&report["wall_s"]);
    assert!(
        (number(&report["output_tokens_per_s"]) / rate - 1.0).abs() < 1e-6,
        "{text}"
    );
}

#[test]
fn a_refusal_is_shown_as_the_server_said_it() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let output = bench(&host.http, "nosuch", &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        text.contains("404") && text.contains("nosuch") && text.contains(MODEL),
        "{text}"
    );
}

#[test]
fn nobody_listening_is_said_with_the_address() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let output = bench(&format!("http://127.0.0.1:{port}"), MODEL, &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        text.contains(&format!("127.0.0.1:{port}")) && text.contains("refused"),
        "{text}"
    );
}
