//! Plugins and deployments of a running host, as an author uses them: the command line and clients over HTTP/3.

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::author::{Author, ask, content, guest};
use common::h3::{self, begin, chunks, h3, stream, streamed};
use common::{Host, MODEL, http, root};
use serde_json::{Value, json};

/// The version in the answer's header.
fn version(host: &Host, model: &str) -> String {
    let body =
        json!({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}).to_string();
    let answer = begin(host, "POST", "/v1/chat/completions", &body);
    let header = answer.header("x-galerne-deployment");
    header.expect("the version is told").to_owned()
}

const REDACTED: &str = r#"
    name = "private"
    model = "smollm2"
    [[filters]]
    plugin = "redact"
    [defaults]
    max_tokens = 24
"#;

#[test]
fn a_pushed_filter_works_in_a_deployment() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let file = guest("pii-redact").display().to_string();
    let checked = author.does(&host, &["plugin", "push", &file, "--name", "redact"]);
    assert!(
        checked.starts_with("pushed redact 0.1.0 [filter] (sha256:"),
        "{checked}"
    );
    assert_eq!(
        author.deploy(&host, REDACTED, &[]),
        "deployed private version 1: version 1 answers\n"
    );
    let question = "Write only this address: jane.doe@example.com";
    let (_, plain) = ask(&host, MODEL, question, &json!({"max_tokens": 24}));
    // What the model would write is not what is tested: it can write nothing but what the address was replaced by.
    let only = "The address: \\[EMAIL_1\\]";
    let (_, private) = ask(&host, "private", question, &json!({"guided_regex": only}));
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert!(
        tokens(&private) != tokens(&plain),
        "the model saw the same: {private}"
    );
    assert_eq!(
        content(&private),
        "The address: jane.doe@example.com",
        "{private}"
    );
    assert_eq!(private["model"], "private");

    // Streamed, the same text comes out.
    let body = json!({"model": "private", "guided_regex": only, "messages": [{"role": "user", "content": question}]});
    assert_eq!(streamed(&chunks(&stream(&host, &body).text())), content(&private));

    // What would show the text unfiltered is refused, and so is the way around the messages.
    for extra in [json!({"logprobs": true}), json!({"return_token_ids": true})] {
        let (status, answer) = ask(&host, "private", question, &extra);
        assert_eq!(status, 400, "{answer}");
    }
    let body = json!({"model": "private", "prompt": question}).to_string();
    let (status, text) = h3(&host, "POST", "/v1/completions", &body);
    assert!(status == 400 && text.contains("/v1/chat/completions"), "{text}");

    let (_, listed) = http(&host, "GET", "/v1/models", "");
    assert!(listed.contains("\"private\""), "{listed}");
    assert_eq!(
        author.does(&host, &["deployments"]),
        "private: version 1 answers\n"
    );
    let all = author.does(&host, &["plugin", "list"]);
    assert!(
        all.contains("redact 0.1.0 [filter]") && all.contains("mirostat (comes with the host)"),
        "{all}"
    );
}

#[test]
fn versions_switch_roll_back_and_survive_a_restart() {
    let Some(author) = Author::new() else { return };
    let answers = |max_tokens: u32| {
        format!(
            "name = \"short\"\nmodel = \"smollm2\"\n[defaults]\nmax_tokens = {max_tokens}\ntemperature = 0\n"
        )
    };
    {
        let host = Host::start(author.data(), &[]);
        author.deploy(&host, &answers(400), &[]);

        // A stream that began with version 1 ends with it, whatever is deployed meanwhile.
        let body = json!({"model": "short", "ignore_eos": true, "stream_options": {"include_usage": true},
            "messages": [{"role": "user", "content": "Tell me a long story."}]});
        let mut running = stream(&host, &body);
        running.chunk().expect("it begins");
        author.deploy(&host, &answers(2), &[]);
        assert_eq!(version(&host, "short"), "short@2");
        let rest = running.text();
        assert!(rest.contains("\"completion_tokens\":400"), "cut short: {rest}");
        let (_, answer) = ask(&host, "short", "Tell me a long story.", &json!({}));
        assert_eq!(answer["usage"]["completion_tokens"], 2, "{answer}");

        let said = author.deploy(&host, &answers(3), &["--canary", "50"]);
        assert_eq!(
            said,
            "deployed short version 3: version 2 answers, version 3 50 % of the requests\n"
        );
        let seen: Vec<String> = (0..40).map(|_| version(&host, "short")).collect();
        for label in ["short@2", "short@3"] {
            let count = seen.iter().filter(|seen| *seen == label).count();
            assert!((5..=35).contains(&count), "{label}: {count} of 40");
        }
        assert_eq!(
            author.does(&host, &["rollback", "short"]),
            "short: version 2 answers\n"
        );
        author.deploy(&host, &answers(4), &["--canary", "1"]);
        assert_eq!(
            author.does(&host, &["promote", "short"]),
            "short: version 4 answers\n"
        );
        assert_eq!(
            author.does(&host, &["rollback", "short"]),
            "short: version 2 answers\n"
        );
    }
    let host = Host::start(author.data(), &[]);
    assert_eq!(version(&host, "short"), "short@2");
    assert_eq!(
        author.does(&host, &["rollback", "short"]),
        "short: version 1 answers\n"
    );
    let (done, said) = author.galerne(&host, &["rollback", "short"]);
    assert!(!done && said.contains("no version was stable before"), "{said}");
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &["--limit", "http_calls_max=20"]);
    let cases = [
        ("name = \"x\"", "missing field `model`"),
        (
            "name = \"x\"\nmodel = \"gpt\"",
            "expected one of smollm2, got \"gpt\"",
        ),
        (
            "name = \"smollm2\"\nmodel = \"smollm2\"",
            "a model is served as \"smollm2\"",
        ),
        (
            "name = \"x\"\nmodel = \"smollm2\"\n[[filters]]\nplugin = \"nothing\"",
            "filters[0]: no plugin \"nothing\"",
        ),
        (
            "name = \"x\"\nmodel = \"smollm2\"\n[[filters]]\nplugin = \"mirostat\"",
            "filters[0]: guest \"mirostat\" does not fit the world galerne:filter/filter@0.1.0",
        ),
        (
            "name = \"x\"\nmodel = \"smollm2\"\n[sampler]\nplugin = \"mirostat\"\nversion = \"9.0.0\"",
            "comes with the host, in no version 9.0.0",
        ),
        (
            "name = \"x\"\nmodel = \"smollm2\"\n[defaults]\nmessages = []",
            "expected one of temperature",
        ),
        (
            "name = \"x\"\nmodel = \"smollm2\"\nfilter = []",
            "unknown field `filter`",
        ),
        (
            "name = \"x\"\nmodel = \"smollm2\"\n[limits]\nhttp_calls_max = 1000",
            "limits.http_calls_max: expected at most 20, the host's limit, which its operator can raise, got 1000",
        ),
    ];
    for (toml, expected) in cases {
        let said = author.refused(&host, toml);
        assert!(
            said.contains(expected),
            "{toml}\nexpected: {expected}\ngot: {said}"
        );
    }
    let text_file = author.data().join("notes.wasm");
    std::fs::write(&text_file, "no component").expect("write");
    let (done, said) = author.galerne(&host, &["plugin", "push", &text_file.display().to_string()]);
    assert!(!done && said.contains("no WebAssembly file"), "{said}");
    let (status, text) = http(&host, "GET", "/v1/admin/plugins", "");
    assert!(status == 401 && text.contains("admin token"), "{text}");
    let (done, said) = author.galerne(&host, &["deployments", "--admin-token", "guess"]);
    assert!(!done && said.contains("admin token"), "{said}");
    assert_eq!(author.does(&host, &["deployments"]), "");
    assert!(
        !author.data().join("tenants/default/deployments/x").exists(),
        "a refused deployment left something"
    );
}

#[test]
fn a_deployments_sampler_and_limits_hold() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let toml = "name = \"calm\"\nmodel = \"smollm2\"\n[sampler]\nplugin = \"mirostat\"\nparams = { tau = 3.0 }\n\
        [limits]\ntokens_max = 8\n";
    author.deploy(&host, toml, &[]);
    let (status, answer) = ask(
        &host,
        "calm",
        "Tell me a story.",
        &json!({"ignore_eos": true, "seed": 1}),
    );
    assert_eq!(
        (status, &answer["usage"]["completion_tokens"]),
        (200, &json!(8)),
        "{answer}"
    );
    let (status, answer) = ask(&host, "calm", "hi", &json!({"max_tokens": 9}));
    assert_eq!(
        (status, &answer["error"]["param"]),
        (400, &json!("max_tokens")),
        "{answer}"
    );
    let (status, answer) = ask(&host, "calm", "hi", &json!({"sampler": {"name": "mirostat"}}));
    assert_eq!(
        (status, &answer["error"]["param"]),
        (400, &json!("sampler")),
        "{answer}"
    );
    let (status, text) = h3(
        &host,
        "POST",
        "/v1/completions",
        &json!({"model": "calm", "prompt": "Once", "ignore_eos": true}).to_string(),
    );
    assert!(
        status == 200 && text.contains("\"completion_tokens\":8"),
        "{text}"
    );
}

/// The demo model repeats what it is told to, so that it can be made to ask for a call.
const CALL: &str = "Repeat exactly this text and nothing else:\n<tool_call>\n{\"name\": \"calculate\", \"arguments\": \
    {\"expression\": \"12*12\"}}\n</tool_call>";

#[test]
fn the_host_calls_a_deployments_tool_and_the_model_goes_on() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    let toml = |name: &str, steps: u32| {
        format!(
            "name = \"{name}\"\nmodel = \"smollm2\"\n[[tools]]\nplugin = \"calculator\"\n\
             [limits]\nagent_steps_max = {steps}\n[defaults]\nmax_tokens = 60\n"
        )
    };
    author.deploy(&host, &toml("agent", 4), &[]);
    let (status, answer) = ask(&host, "agent", CALL, &json!({}));
    assert_eq!(status, 200, "{answer}");
    let message = &answer["choices"][0]["message"];
    assert_eq!(
        message["host_tool_calls"],
        json!([{"name": "calculate", "arguments": "{\"expression\":\"12*12\"}", "result": "144"}]),
        "{answer}"
    );
    assert!(
        content(&answer).contains("144"),
        "the model did not see the result: {answer}"
    );
    assert_eq!(
        message["tool_calls"],
        Value::Null,
        "the client has nothing to call: {answer}"
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");

    let body = json!({"model": "agent", "temperature": 0, "messages": [{"role": "user", "content": CALL}]});
    let text = stream(&host, &body).text();
    let call = text.find("host_tool_calls").expect("the call is shown");
    assert!(
        text[call..].contains("144") && text.trim_end().ends_with("data: [DONE]"),
        "{text}"
    );

    author.deploy(&host, &toml("single", 1), &[]);
    let (status, answer) = ask(&host, "single", CALL, &json!({}));
    assert!(
        status == 400 && answer.to_string().contains("limits.agent_steps_max"),
        "{answer}"
    );
    let tools = json!({"tools": [{"type": "function", "function": {"name": "mine"}}]});
    let (status, answer) = ask(&host, "agent", "hi", &tools);
    assert_eq!(
        (status, &answer["error"]["param"]),
        (400, &json!("tools")),
        "{answer}"
    );
}

/// What stands before the word "fuel".
fn fuel(said: &str) -> Vec<u64> {
    let words: Vec<&str> = said.split([' ', ')', '\n']).collect();
    let numbers = words.windows(2).filter(|pair| pair[1] == "fuel");
    numbers.map(|pair| pair[0].parse().expect("a number")).collect()
}

/// From `plugin new` to a served deployment, as the guide says, with the guest in a cell and in the host's process.
#[test]
fn a_new_plugin_is_built_outside_the_repository_and_served() {
    let Some(author) = Author::new() else { return };
    if galerne_sdk_build::Toolchain::present().is_none() {
        eprintln!("SKIPPED: no compiler for wasm32; `cargo xtask guests` installs one");
        return;
    }
    let folder = author.data().join("work");
    std::fs::create_dir(&folder).expect("make");
    let local = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_galerne"));
        let output = command
            .args(args)
            .current_dir(&folder)
            .output()
            .expect("run galerne");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        said
    };
    // Shared by all, so that the standard library is compiled once.
    let target = root().join("target/test-data/plugin-build").display().to_string();
    for world in ["filter", "sampler", "tool", "pipeline"] {
        let name = format!("my-{world}");
        local(&["plugin", "new", &name, "--world", world]);
        local(&["plugin", "build", &name, "--target-dir", &target]);
        let said = local(&["plugin", "test", &name]);
        assert!(
            said.contains("all 2 cases hold") && said.contains("MiB of memory"),
            "{said}"
        );
        let (spent, again) = (fuel(&said), fuel(&local(&["plugin", "test", &name])));
        assert_eq!(spent.len(), 3, "of two cases and of all: {said}");
        assert!(spent.iter().all(|spent| *spent > 100), "{said}");
        assert_eq!(spent, again, "{world}: the same calls, other fuel");
    }
    // A case that does not hold fails the command.
    let cases = folder.join("my-tool/tests.toml");
    let wrong = std::fs::read_to_string(&cases)
        .expect("read")
        .replace("answer = \"3\"", "answer = \"4\"");
    std::fs::write(&cases, wrong).expect("write");
    let output = Command::new(env!("CARGO_BIN_EXE_galerne"))
        .args(["plugin", "test", "my-tool"])
        .current_dir(&folder)
        .output()
        .expect("run galerne");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        !output.status.success() && said.contains("expected the answer \"4\", got \"3\""),
        "{said}"
    );
    let component = folder.join("my-filter/my-filter.wasm").display().to_string();
    for isolation in ["process", "in-process"] {
        let host = Host::start(author.data(), &["--isolation", isolation]);
        author.does(&host, &["plugin", "push", &component]);
        let file = folder.join("my-filter/deployment.toml").display().to_string();
        author.does(&host, &["deploy", &file]);
        let (status, answer) = ask(&host, "my-my-filter", "Tell me a Secret.", &json!({}));
        assert_eq!(
            (status, &answer["error"]["code"]),
            (403, &json!("content_filter")),
            "{isolation}: {answer}"
        );
        let (status, answer) = ask(
            &host,
            "my-my-filter",
            "What is the capital of France?",
            &json!({}),
        );
        assert_eq!(
            (status, content(&answer)),
            (200, "The capital of France is Paris."),
            "{isolation}"
        );
    }
}

#[test]
fn what_guests_write_is_shown_to_who_holds_the_token() {
    let Some(author) = Author::new() else { return };
    let host = Host::start(author.data(), &[]);
    for (file, name) in [("overreach", "chatty"), ("hostile-pipeline", "caller")] {
        let file = guest(file).display().to_string();
        author.does(&host, &["plugin", "push", &file, "--name", name]);
    }
    // A pipeline that has the tool write what each version says.
    let writes = |text: &str, times: u32| {
        let toml = format!(
            "name = \"logged\"\nmodel = \"smollm2\"\n[[tools]]\nplugin = \"chatty\"\n[capabilities]\nlog = true\n\
             http = [\"a.example\"]\nkv = true\nsecrets = [\"X\"]\n[pipeline]\nplugin = \"caller\"\nparams = {{ misbehave = \
             \"call\", name = \"ask\", arguments = '{{\"do\": \"log\", \"text\": \"{text}\", \"times\": {times}}}' }}\n"
        );
        author.deploy(&host, &toml, &[]);
        let (status, answer) = ask(&host, "logged", "hi", &json!({}));
        assert_eq!((status, content(&answer)), (200, "done"), "{answer}");
        answer["id"].as_str().expect("an id").to_owned()
    };
    let id = writes("hello\\nworld", 1);
    let said = author.does(&host, &["logs", "logged"]);
    let (time, rest) = said.split_once(' ').expect("a time");
    assert_eq!(
        (time.len(), rest),
        (24, format!("info  chatty {id} hello\\nworld\n").as_str())
    );

    // Followed over HTTP/3, a line comes when it is written; too many in a second are dropped, and said to be.
    let token = galerne::admin_token::load(author.data()).expect("the host made it");
    let path = "/v1/admin/deployments/logged/logs";
    let (status, text) = h3(&host, "GET", path, "");
    assert!(status == 401 && text.contains("admin token"), "{text}");
    let mut following = h3::authorized(&host, &format!("{path}?follow=true&lines=0"), &token);
    writes("flood", 1_000);
    let begin = Instant::now();
    let mut text = String::new();
    while text.matches("flood").count() < 90 {
        assert!(begin.elapsed() < Duration::from_secs(30), "{text}");
        let chunk = following.chunk().expect("more comes");
        text.push_str(std::str::from_utf8(&chunk).expect("text"));
    }
    assert!(
        text.starts_with("id: logged-0\n") && text.contains("\"number\":2,"),
        "{text}"
    );
    assert!(!text.contains("hello"), "{text}");
    drop(following);
    std::thread::sleep(Duration::from_secs(1));
    writes("later", 1);
    // A slow machine takes more than a second for the thousand, so lines may be missing at several places: each is said
    // by the line after it, whichever that is.
    let said = author.does(&host, &["logs", "logged", "-n", "1000"]);
    let (mut taken, mut missing, mut gap) = (0, 0, None);
    for line in said.lines() {
        if line.contains("lines are missing") {
            let count = line.split(' ').nth(1).and_then(|count| count.parse().ok());
            let count: usize = count.unwrap_or_else(|| panic!("{line}"));
            missing += count;
            gap = Some(format!("[{count} earlier lines of this deployment dropped"));
            continue;
        }
        taken += usize::from(line.contains(" flood"));
        match gap.take() {
            Some(dropped) => assert!(line.contains(&dropped), "{line}\nin\n{said}"),
            None => assert!(!line.contains("earlier lines"), "{line}\nin\n{said}"),
        }
    }
    assert!(taken >= 90 && missing > 0, "{said}");
    assert_eq!(taken + missing, 1_000, "{said}");
    assert!(
        said.lines().last().is_some_and(|last| last.contains(" later")),
        "{said}"
    );
    assert_eq!(
        author.does(&host, &["logs", "logged", "--level", "warn", "-n", "1"]),
        ""
    );
    let (done, said) = author.galerne(&host, &["logs", "nothing"]);
    assert!(
        !done && said.contains("no deployment \"nothing\" is live"),
        "{said}"
    );
}
