//! A marked answer of a running host is found by who has the key, and by nobody else.

mod common;

use std::io::Write as _;
use std::process::{Command, Stdio};

use common::author::{Author, ask, content};
use common::{Host, MODEL};
use serde_json::{Value, json};

const KEY: &str = "8d4f1c27a9b360e5d2715b9ec0863fa4";
const OTHER_KEY: &str = "8d4f1c27a9b360e5d2715b9ec0863fa5";

/// What `galerne watermark` says of a text.
fn detect(author: &Author, key: &str, text: &str) -> (f64, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_galerne"))
        .args(["watermark", "-m", MODEL, "--data"])
        .arg(author.data())
        .env("GALERNE_WATERMARK_KEY", key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run galerne watermark");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(text.as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success() && !said.contains(key), "{said}");
    let z = said.lines().find_map(|line| line.strip_prefix("z "));
    let z = z.and_then(|z| z.trim().parse().ok());
    (z.unwrap_or_else(|| panic!("{said}")), said)
}

#[test]
fn a_marked_answer_is_found_with_its_key_alone() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let toml = format!(
        "name = \"marked\"\nmodel = \"smollm2\"\n[sampler]\nplugin = \"watermark\"\n\
         params = {{ key = \"{KEY}\", delta = 3.0, top_p = 0.95 }}\n"
    );
    author.deploy(&host, &toml, &[]);
    let long = |seed: u64| json!({"temperature": 1, "top_p": 0.95, "max_tokens": 150, "ignore_eos": true, "seed": seed});
    let story = |model: &str, seed: u64| {
        let (status, answer): (u16, Value) = ask(&host, model, "Tell me a story about the sea.", &long(seed));
        assert_eq!(status, 200, "{answer}");
        content(&answer).to_owned()
    };
    let marked = story("marked", 1);
    let (z, said) = detect(&author, KEY, &marked);
    assert!(
        z > 4.0 && said.contains("verdict   marked with this key"),
        "{said}\n{marked}"
    );
    let (z, said) = detect(&author, OTHER_KEY, &marked);
    assert!(z < 4.0 && said.contains("no mark"), "{said}");
    let (z, said) = detect(&author, KEY, &story(MODEL, 1));
    assert!(z < 4.0, "{said}");
    assert_eq!(marked, story("marked", 1), "the same seed, another answer");

    let wrong = toml.replace(KEY, "secret");
    author.deploy(&host, &wrong, &[]);
    let (status, answer) = ask(&host, "marked", "hi", &json!({"max_tokens": 1}));
    assert!(
        status == 400 && answer.to_string().contains("32 hexadecimal digits"),
        "{answer}"
    );
}
