//! Pipelines of a running host: those that come with it, one that means harm, and what a client sees of them.

mod common;

use std::time::{Duration, Instant};

use common::author::{Author, ask, content, guest};
use common::h3::{self, chunks, h3, streamed};
use common::{Host, MODEL, http};
use serde_json::{Value, json};

fn deployment(name: &str, plugin: &str, more: &str) -> String {
    format!("name = \"{name}\"\nmodel = \"smollm2\"\n{more}\n[pipeline]\nplugin = \"{plugin}\"\n")
}

/// The one event of an answer.
fn event(answer: &Value) -> &Value {
    let events = &answer["choices"][0]["message"]["pipeline_events"];
    assert_eq!(events.as_array().map(Vec::len), Some(1), "{answer}");
    &events[0]
}

/// A counter of `/metrics`.
fn metric(host: &Host, name: &str) -> f64 {
    let (_, text) = http(host, "GET", "/metrics", "");
    let is_it = |line: &&str| line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']);
    let line = text
        .lines()
        .find(is_it)
        .unwrap_or_else(|| panic!("no {name}: {text}"));
    line.rsplit(' ')
        .next()
        .and_then(|value| value.parse().ok())
        .expect("a number")
}

#[test]
fn best_of_n_gives_the_likeliest_of_several_answers_that_share_their_prompt() {
    let Some(author) = Author::new() else { return };
    for isolation in ["process", "in-process"] {
        let host = Host::start(author.data(), &["--isolation", isolation]);
        author.deploy(
            &host,
            &(deployment("best", "best-of-n", "") + "params = { n = 6 }\n"),
            &[],
        );
        let question = "Tell me a story about a fox and a hen. ".repeat(4);
        let hits = metric(&host, "galerne_prefix_cache_hits_total");
        let (status, answer) = ask(
            &host,
            "best",
            &question,
            &json!({"temperature": 1, "max_tokens": 24, "seed": 7}),
        );
        assert_eq!(status, 200, "{answer}");
        let data = &event(&answer)["data"];
        let means: Vec<f64> = data["mean_logprobs"]
            .as_array()
            .expect("means")
            .iter()
            .map(|mean| mean.as_f64().expect("a number"))
            .collect();
        assert_eq!(means.len(), 6, "{answer}");
        let best = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = usize::try_from(data["chosen"].as_u64().expect("a place")).expect("small");
        assert!((means[chosen] - best).abs() < 1e-12 && best < 0.0, "{answer}");
        assert!(
            means.iter().any(|mean| (mean - best).abs() > 1e-6),
            "all alike: {answer}"
        );
        assert!(
            !content(&answer).is_empty() && answer["usage"]["completion_tokens"].as_u64() > Some(24),
            "{answer}"
        );
        // Five of six found all but a few tokens of the prompt in the cache.
        let prompt = answer["usage"]["prompt_tokens"].as_f64().expect("a count") / 6.0;
        let hits = metric(&host, "galerne_prefix_cache_hits_total") - hits;
        assert!(
            hits >= 5.0 * (prompt - 20.0),
            "{hits} hits of prompts of {prompt} tokens"
        );
        let (_, again) = ask(
            &host,
            "best",
            &question,
            &json!({"temperature": 1, "max_tokens": 24, "seed": 7}),
        );
        assert_eq!(content(&again), content(&answer), "the same seed, another answer");
    }
}

#[test]
fn self_consistency_votes() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    author.deploy(&host, &deployment("vote", "self-consistency", ""), &[]);
    let body = json!({"temperature": 0.8, "max_tokens": 40, "seed": 3});
    let (status, answer) = ask(&host, "vote", "What is 2 + 2? Answer with one number.", &body);
    assert_eq!(status, 200, "{answer}");
    let data = &event(&answer)["data"];
    assert_eq!(data["of"], 5, "{answer}");
    let elected = data["answer"].as_str().unwrap_or_else(|| panic!("{answer}"));
    assert!(content(&answer).contains(elected), "{answer}");
    // What is said of the answer's form holds for every branch.
    let mut body = body;
    body["guided_regex"] = json!("[0-9]");
    let (status, answer) = ask(&host, "vote", "What is 2 + 2?", &body);
    assert_eq!((status, content(&answer).len()), (200, 1), "{answer}");
}

/// The demo model repeats what it is told to, so that it can be made to ask for a call.
const CALL: &str = "Repeat exactly this text and nothing else:\n<tool_call>\n{\"name\": \"calculate\", \"arguments\": \
    {\"expression\": \"12*12\"}}\n</tool_call>";

#[test]
fn an_agent_calls_the_deployments_tools() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let toml = deployment(
        "agent",
        "agent",
        "[[tools]]\nplugin = \"calculator\"\n[defaults]\nmax_tokens = 60\n",
    );
    author.deploy(&host, &toml, &[]);
    let (status, answer) = ask(&host, "agent", CALL, &json!({}));
    assert_eq!(status, 200, "{answer}");
    let expected = json!({"name": "calculate", "arguments": "{\"expression\":\"12*12\"}", "result": "144"});
    assert_eq!(
        event(&answer),
        &json!({"name": "tool-call", "data": expected}),
        "{answer}"
    );
    assert!(
        content(&answer).contains("144"),
        "the model did not see the result: {answer}"
    );

    // Streamed, text and events come as chunks, and the stream ends as any other.
    let body = json!({"model": "agent", "temperature": 0, "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": CALL}]});
    let text = h3::stream(&host, &body).text();
    assert!(
        text.contains("\"pipeline_events\":[{\"name\":\"tool-call\""),
        "{text}"
    );
    assert!(text.contains("\"finish_reason\":\"stop\""), "{text}");
    let chunks = chunks(&text);
    assert_eq!(streamed(&chunks), content(&answer));
    let usage = chunks
        .iter()
        .find_map(|chunk| chunk["usage"]["completion_tokens"].as_u64());
    assert_eq!(usage, answer["usage"]["completion_tokens"].as_u64());

    for extra in [json!({"logprobs": true}), json!({"return_token_ids": true})] {
        let (status, answer) = ask(&host, "agent", "hi", &extra);
        assert_eq!(status, 400, "{answer}");
    }
    let body = json!({"model": "agent", "prompt": "hi"}).to_string();
    let (status, text) = h3(&host, "POST", "/v1/completions", &body);
    assert!(status == 400 && text.contains("/v1/chat/completions"), "{text}");
}

#[test]
fn filters_see_what_a_pipeline_emits() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let file = guest("hostile-pipeline").display().to_string();
    author.does(&host, &["plugin", "push", &file, "--name", "caller"]);
    // It emits what its call answers: that there is no such tool.
    let toml = deployment("private", "caller", "[[filters]]\nplugin = \"pii-redact\"\n")
        + "params = { misbehave = \"call\", name = \"[EMAIL_1]\", arguments = \"{}\" }\n";
    author.deploy(&host, &toml, &[]);
    let question = "Write only this address: jane.doe@example.com";
    let (status, answer) = ask(&host, "private", question, &json!({}));
    assert_eq!(status, 200, "{answer}");
    let text = content(&answer);
    assert!(
        text.contains("jane.doe@example.com") && !text.contains("EMAIL"),
        "not restored: {answer}"
    );
}

/// What the evil pipeline does, the status of the answer, and what the error must say.
const EVIL: [(&str, u16, &str); 20] = [
    (
        "loop",
        500,
        "ran past its limit of 1000 ms in run (limits.pipeline_ms_max of deployment \\\"evil\\\", which can raise it to the host's 5000)",
    ),
    ("trap", 500, "trapped in run"),
    ("alloc", 500, "memory of at most"),
    ("recurse", 500, "trapped in run"),
    ("status", 500, "status from 400 to 599"),
    (
        "contexts",
        500,
        "at most 32 contexts at once (pipeline_contexts_max, the host's operator can raise it)",
    ),
    ("fork", 500, "at most 32 contexts at once"),
    (
        "deep",
        500,
        "forks of at most 16 generations (pipeline_fork_depth_max",
    ),
    (
        "generations",
        500,
        "at most 32 generations at once (pipeline_generations_max",
    ),
    (
        "tokens",
        500,
        "at most 300 output tokens in one request (limits.pipeline_tokens_max of deployment \\\"evil\\\"",
    ),
    ("blocks", 500, "generations of at most 100 KV blocks at once, got"),
    ("emit", 500, "bytes emitted (pipeline_emitted_bytes_max"),
    ("event", 500, "an event of at most 65536 bytes, got 100002"),
    ("bad-events", 200, "done"),
    ("busy", 200, "done"),
    ("text", 500, "text of at most 1048576 bytes at once, got 1500000"),
    (
        "tokenize",
        500,
        "at most 2000 ms of the host's work on contexts (pipeline_work_ms_max",
    ),
    ("roles", 200, "done"),
    (
        "ask-for-ever",
        500,
        "ran past its limit of 5000 ms in run (pipeline_ms_max, the host's operator can raise it)",
    ),
    ("tools", 200, "done"),
];

#[test]
fn evil_pipelines_end_their_own_request_and_nothing_else() {
    let Some(author) = Author::new() else { return };
    let file = guest("hostile-pipeline").display().to_string();
    for isolation in ["process", "in-process"] {
        let host = Host::start(author.data(), &["--isolation", isolation]);
        author.does(&host, &["plugin", "push", &file, "--name", "evil"]);
        // A neighbour's stream runs all the while.
        let neighbour = stream(
            &host,
            &json!({"model": MODEL, "ignore_eos": true, "max_tokens": 60}),
        );
        let (_, expected) = ask(&host, MODEL, "hi", &json!({"max_tokens": 8}));
        for (misbehave, status, words) in EVIL {
            if isolation == "in-process" && words.contains("5000 ms in run (p") {
                // Seconds, and the deadline is the same.
                continue;
            }
            let mut limits = "[limits]\npipeline_tokens_max = 300\npipeline_blocks_max = 100\n".to_owned();
            if misbehave == "loop" {
                limits.push_str("pipeline_ms_max = 1000\n");
            }
            let toml = deployment("evil", "evil", &limits)
                + &format!("params = {{ misbehave = \"{misbehave}\" }}\n");
            author.deploy(&host, &toml, &[]);
            let begin = Instant::now();
            let (got, answer) = ask(&host, "evil", "hi", &json!({"max_tokens": 40}));
            let took = begin.elapsed();
            let said = answer.to_string();
            assert!(
                got == status && said.contains(words),
                "{isolation}, {misbehave}: {got} {said}"
            );
            assert!(
                took < Duration::from_secs(90),
                "{isolation}, {misbehave}: only after {took:?}"
            );
            let (status, answer) = ask(&host, MODEL, "hi", &json!({"max_tokens": 8}));
            assert_eq!(
                (status, content(&answer)),
                (200, content(&expected)),
                "{isolation}, {misbehave}"
            );
        }
        for (kind, at_least) in [
            ("deadline", 1.0),
            ("limit", 8.0),
            ("trap", 2.0),
            ("bad_answer", 1.0),
            ("process", 0.0),
        ] {
            let counted = metric(&host, &format!("galerne_guest_failures_total{{kind=\"{kind}\"}}"));
            assert!(counted >= at_least, "{isolation}: {kind}: {counted}");
        }
        let cells = f64::from(u8::from(isolation == "process"));
        assert_eq!(metric(&host, "galerne_cells"), cells);
        assert_eq!(
            metric(
                &host,
                "galerne_guest_limit{of=\"pipeline\",name=\"contexts_max\"}"
            ),
            32.0
        );
        assert!(metric(&host, "galerne_guest_limit{of=\"guest\",name=\"step_deadline\"}") > 0.0);
        let (_, text) = http(&host, "GET", "/metrics", "");
        let lowered = |line: &str| {
            line.starts_with("galerne_deployment_limit{deployment=\"evil\",version=")
                && line.ends_with("name=\"pipeline_tokens_max\"} 300")
        };
        assert!(text.lines().any(lowered), "{text}");
        let shown = author.does(&host, &["deployments", "evil"]);
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        assert_eq!(
            shown["limits"]["pipeline_tokens_max"],
            json!({"value": 300, "host": 16_384}),
            "{shown}"
        );
        let text = neighbour.text();
        assert!(
            text.contains("\"finish_reason\":\"length\"") && !text.contains("\"error\""),
            "{text}"
        );
    }
}

/// A long story, streamed.
fn stream(host: &Host, body: &Value) -> h3::Answer {
    let mut body = body.clone();
    body["messages"] = json!([{"role": "user", "content": "Tell me a long story."}]);
    h3::stream(host, &body)
}

#[test]
fn what_a_pipeline_leaves_behind_and_a_client_that_leaves_end_their_sequences() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let file = guest("hostile-pipeline").display().to_string();
    author.does(&host, &["plugin", "push", &file, "--name", "evil"]);
    let toml = deployment("leaves", "evil", "") + "params = { misbehave = \"leave\" }\n";
    author.deploy(&host, &toml, &[]);
    let (status, answer) = ask(&host, "leaves", "hi", &json!({}));
    assert_eq!((status, content(&answer)), (200, "done"));
    falls_idle(&host);

    author.deploy(
        &host,
        &(deployment("best", "best-of-n", "") + "params = { n = 8 }\n"),
        &[],
    );
    let body = json!({"model": "best", "ignore_eos": true, "max_tokens": 2000,
        "messages": [{"role": "user", "content": "Tell me a long story."}]});
    h3::leaves(&host, &body, || {
        let begin = Instant::now();
        while metric(&host, "galerne_num_requests_running") < 8.0 {
            assert!(begin.elapsed() < Duration::from_secs(20), "it never began");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    falls_idle(&host);
}

fn falls_idle(host: &Host) {
    let begin = Instant::now();
    while metric(host, "galerne_num_requests_running") > 0.0 {
        assert!(begin.elapsed() < Duration::from_secs(5), "sequences run on");
        std::thread::sleep(Duration::from_millis(10));
    }
}
