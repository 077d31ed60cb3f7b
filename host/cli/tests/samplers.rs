//! Samplers that keep answers to grammars and that propose tokens, served: what they promise, and what a wrong one costs.

mod common;

use common::author::{Author, ask, content, guest};
use common::{Host, MODEL, http};
use serde_json::{Value, json};

const CHOICES: [&str; 3] = ["yes", "no", "cannot say"];

/// A deployment `verdict` of this sampler.
fn verdict(plugin: &str, params: &str, grammar: bool) -> String {
    format!(
        "name = \"verdict\"\nmodel = \"{MODEL}\"\n[sampler]\nplugin = \"{plugin}\"\nparams = {{ {params} }}\n\
         [capabilities]\ngrammar = {grammar}\n"
    )
}

fn choices(host: &Host, author: &Author) {
    let params = format!("choices = {}, temperature = 1.5", json!(CHOICES));
    let said = author.refused(host, &verdict("choices", &params, false));
    assert!(
        said.contains("\"galerne:grammar/grammars@0.1.0\" is not granted (grammar = true)"),
        "{said}"
    );
    author.deploy(host, &verdict("choices", &params, true), &[]);
    for seed in 0..6 {
        let (status, answer) = ask(host, "verdict", "Is water wet?", &json!({"seed": seed}));
        assert_eq!(status, 200, "{answer}");
        assert!(CHOICES.contains(&content(&answer)), "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    }
    let constrained = json!({"response_format": {"type": "json_object"}});
    let (status, answer) = ask(host, "verdict", "Is water wet?", &constrained);
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(
        status == 400 && message.contains("response_format and the like: expected none"),
        "{status}: {answer}"
    );
}

#[test]
fn one_of_the_choices_is_answered_under_both_isolations() {
    for isolation in ["process", "in-process"] {
        let Some(author) = Author::new() else { return };
        let host = Host::start(author.data(), &["--isolation", isolation]);
        choices(&host, &author);
    }
}

#[test]
fn a_sampler_that_misuses_grammars_ends_its_own_requests() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let file = guest("hostile-sampler").display().to_string();
    author.does(&host, &["plugin", "push", &file, "--name", "evil"]);
    for (params, words) in [
        (
            "misbehave = \"unknown\"",
            "grammar must be the id of a grammar that the session holds",
        ),
        ("misbehave = \"stale\"", "has not dropped, got 0"),
        (
            "misbehave = \"fork\"",
            "grammar_held_max, the host's operator can raise it",
        ),
        ("misbehave = \"spin\"", "ran past its limit of 100 ms in plan"),
        (
            "misbehave = \"forced\"",
            "the grammar leaves no way to continue the answer",
        ),
        (
            "misbehave = \"nested\", times = 1000",
            "grammar_nesting_max, the host's operator can raise it",
        ),
    ] {
        author.deploy(&host, &verdict("evil", params, true), &[]);
        let (status, answer) = ask(&host, "verdict", "hi", &json!({"max_tokens": 8}));
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(
            status >= 400 && message.contains(words),
            "{params}: {status}: {answer}"
        );
        let (status, answer) = ask(&host, MODEL, "hi", &json!({"max_tokens": 4}));
        assert_eq!(status, 200, "a neighbour is served: {answer}");
    }
    // A deployment may allow less; then it is the deployment that can allow more.
    for (params, limit, most, host_has) in [
        ("misbehave = \"fork\"", "grammar_held_max", 2, 16),
        (
            "misbehave = \"nested\", times = 30",
            "grammar_nesting_max",
            20,
            128,
        ),
    ] {
        let toml = format!("{}[limits]\n{limit} = {most}\n", verdict("evil", params, true));
        author.deploy(&host, &toml, &[]);
        let (status, answer) = ask(&host, "verdict", "hi", &json!({"max_tokens": 8}));
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        let words = format!(
            "(limits.{limit} of deployment \"verdict\", which can raise it to the host's {host_has})"
        );
        assert!(
            status >= 400 && message.contains(&format!("at most {most} ")) && message.contains(&words),
            "{params}: {status}: {answer}"
        );
    }
    // A guest that does not look whether the request has a format of its own.
    author.deploy(&host, &verdict("evil", "misbehave = \"\"", true), &[]);
    let constrained = json!({"response_format": {"type": "json_object"}});
    let (status, answer) = ask(&host, "verdict", "hi", &constrained);
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    let words = "grammar must be none where the request has its own";
    assert!(status >= 400 && message.contains(words), "{status}: {answer}");
}

#[test]
fn proposals_change_no_token_and_are_counted() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let complete = |more: Value| {
        let mut body = json!({"model": MODEL, "max_tokens": 64, "temperature": 0, "ignore_eos": true,
            "prompt": "one two three four five one two three four five one two three four five one two three"});
        for (name, value) in more.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let (status, text) = http(&host, "POST", "/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{text}");
        serde_json::from_str::<Value>(&text).expect("JSON")
    };
    let plain = complete(json!({}));
    let guessed = complete(json!({"sampler": {"name": "ngram-speculate"}}));
    assert_eq!(plain["choices"], guessed["choices"]);
    let accepted = &guessed["usage"]["completion_tokens_details"]["accepted_prediction_tokens"];
    assert!(accepted.as_u64().is_some_and(|tokens| tokens > 16), "{guessed}");
    // Where tokens are drawn at random too, a seed gives the same text.
    let warm = |params: Value| {
        let sampler = json!({"name": "ngram-speculate", "params": params});
        complete(json!({"seed": 7, "sampler": sampler}))["choices"].clone()
    };
    assert_eq!(
        warm(json!({"temperature": 0.8, "tokens": 8})),
        warm(json!({"temperature": 0.8, "tokens": 1, "shortest": 16, "longest": 16}))
    );
}
