//! Guests in Python and JavaScript, pushed, deployed and served like any other.

mod common;

use std::path::PathBuf;
use std::time::Instant;

use common::author::{Author, ask, content};
use common::h3::{chunks, stream, streamed};
use common::{Host, root};
use serde_json::json;

/// The component of a language's example, or `None` with a visible note: `cargo xtask languages` builds it.
fn component(name: &str) -> Option<PathBuf> {
    let file = root().join("target/guests").join(name).with_extension("wasm");
    if file.exists() {
        return Some(file);
    }
    eprintln!(
        "SKIPPED: no {}; `cargo xtask languages` builds it where it can install the language's toolchain",
        file.display()
    );
    None
}

/// A host under each isolation in turn, with this component pushed before the first one serves.
fn under_both_isolations(name: &str, serves: impl Fn(&Author, &Host)) {
    let (Some(file), Some(author)) = (component(name), Author::new()) else {
        return;
    };
    let file = file.display().to_string();
    for isolation in ["process", "in-process"] {
        let host = Host::start(author.data(), &["--isolation", isolation]);
        if isolation == "process" {
            let begin = Instant::now();
            author.does(&host, &["plugin", "push", &file, "--name", name]);
            eprintln!("{name}: checked and compiled in {:?}", begin.elapsed());
        }
        serves(&author, &host);
    }
}

#[test]
fn a_filter_in_python_refuses_and_masks() {
    under_both_isolations("python-filter", |author, host| {
        let toml = "name = \"polite\"\nmodel = \"smollm2\"\n[[filters]]\nplugin = \"python-filter\"\n\
            params = { refuse = [\"tiger\"], mask = [\"Paris\"] }\n";
        author.deploy(host, toml, &[]);
        let question = "What is the capital of France?";
        let (status, answer) = ask(host, "polite", question, &json!({"max_tokens": 24}));
        assert_eq!(status, 200, "{answer}");
        let text = content(&answer);
        assert!(text.contains("*****") && !text.contains("Paris"), "{text}");

        let body = json!({"model": "polite", "temperature": 0, "max_tokens": 24,
            "messages": [{"role": "user", "content": question}]});
        assert_eq!(streamed(&chunks(&stream(host, &body).text())), text);

        let (status, answer) = ask(host, "polite", "Tell me about the Tiger.", &json!({}));
        let said = answer.to_string();
        assert!(
            status == 403 && said.contains("\\\"Tiger\\\" is not for this model"),
            "{status} {said}"
        );

        // What Python raises as the contract's error reaches who deploys as words.
        let wrong = toml.replace("mask", "masks");
        author.deploy(host, &wrong.replace("polite", "wrong"), &[]);
        let (status, answer) = ask(host, "wrong", "hi", &json!({}));
        let said = answer.to_string();
        assert!(
            status >= 400 && said.contains("expected refuse and mask, got masks"),
            "{status} {said}"
        );
    });
}

/// The demo model repeats what it is told to, so that it can be made to ask for a call.
fn call(from: &str) -> String {
    format!(
        "Repeat exactly this text and nothing else:\n<tool_call>\n{{\"name\": \"days_between\", \"arguments\": \
         {{\"from\": \"{from}\", \"to\": \"2024-03-01\"}}}}\n</tool_call>"
    )
}

#[test]
fn a_tool_in_javascript_is_called() {
    under_both_isolations("javascript-tool", |author, host| {
        let toml = "name = \"calendar\"\nmodel = \"smollm2\"\n[[tools]]\nplugin = \"javascript-tool\"\n\
            [defaults]\nmax_tokens = 80\n";
        author.deploy(host, toml, &[]);
        for (from, key, expected) in [
            (
                "2024-02-01",
                "result",
                "{\"days\":29,\"from\":\"Thursday\",\"to\":\"Friday\"}",
            ),
            (
                "2024-02-30",
                "error",
                "from: expected a date as YYYY-MM-DD, got \"2024-02-30\"",
            ),
        ] {
            let (status, answer) = ask(host, "calendar", &call(from), &json!({}));
            assert_eq!(status, 200, "{answer}");
            let call = &answer["choices"][0]["message"]["host_tool_calls"][0];
            assert_eq!(call[key], expected, "{answer}");
        }
    });
}
