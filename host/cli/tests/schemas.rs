//! Answers of a running host to random JSON schemas at temperature 1, each checked by an independent validator.
//! `cargo xtask bench plugins` runs it with a thousand.
#![expect(clippy::print_stdout, reason = "the bench reads the figures")]

mod common;
#[path = "../../plugin/tests/grammar/numbers.rs"]
mod numbers;
#[path = "../../plugin/tests/grammar/schemas.rs"]
mod schemas;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Host, MODEL, data, http};
use numbers::numbers;
use serde_json::{Value, json};

/// How many whole answers to check, if not this many.
const COUNT: &str = "GALERNE_TEST_SCHEMAS";
const COUNT_DEFAULT: u64 = 30;
/// Schemas tried for each whole answer, at most.
const TRIES: u64 = 3;
/// Requests at once.
const CLIENTS: usize = 8;
/// Some schemas allow answers of any length.
const TOKENS_MAX: u32 = 400;

/// How an answer came out.
enum Outcome {
    Valid,
    /// It met the request's limit of tokens.
    Cut,
    /// The host says at once that it cannot keep to this schema.
    Refused,
}

/// How many came out so.
#[derive(Default)]
struct Tally {
    valid: u64,
    cut: u64,
    refused: u64,
}

#[test]
fn answers_to_random_schemas_are_valid() {
    let Some(data) = data() else { return };
    let count =
        std::env::var(COUNT).map_or(COUNT_DEFAULT, |count| count.parse().expect("a number of schemas"));
    let host = Host::start(data, &[]);
    let (seeds, tally) = (AtomicU64::new(0), Mutex::new(Tally::default()));
    let client = || {
        while tally.lock().expect("no client failed").valid < count {
            let seed = seeds.fetch_add(1, Ordering::Relaxed);
            assert!(seed < count * TRIES, "too few answers are whole");
            let outcome = answer(&host, seed);
            let mut tally = tally.lock().expect("no client failed");
            match outcome {
                Outcome::Valid => tally.valid += 1,
                Outcome::Cut => tally.cut += 1,
                Outcome::Refused => tally.refused += 1,
            }
        }
    };
    std::thread::scope(|scope| (0..CLIENTS).for_each(|_| drop(scope.spawn(client))));
    let Tally { valid, cut, refused } = tally.into_inner().expect("no client failed");
    println!(
        "figures {}",
        json!({"valid": valid, "cut": cut, "refused": refused})
    );
}

/// Asks for an answer to the schema of this seed. Panics if it is not valid.
fn answer(host: &Host, seed: u64) -> Outcome {
    let schema = schemas::random_schema(&mut numbers(seed));
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let body = json!({"model": MODEL, "temperature": 1, "seed": seed, "max_tokens": TOKENS_MAX,
        "messages": [{"role": "user", "content": "Invent some JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "random", "schema": schema}}});
    let (status, text) = http(host, "POST", "/v1/chat/completions", &body.to_string());
    let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    if status == 400 && answer["error"]["param"] == "response_format.json_schema.schema" {
        return Outcome::Refused;
    }
    assert_eq!(status, 200, "{schema}: {answer}");
    let choice = &answer["choices"][0];
    if choice["finish_reason"] == "length" {
        return Outcome::Cut;
    }
    let content = choice["message"]["content"].as_str().expect("a content");
    let value: Value =
        serde_json::from_str(content).unwrap_or_else(|error| panic!("{schema}: {error}: {content}"));
    if let Err(error) = validator.validate(&value) {
        panic!("{schema}: {error}: {content}");
    }
    Outcome::Valid
}
