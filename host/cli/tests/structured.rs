//! Answers of a running host that must match something: JSON schemas at temperature 1, checked by an independent
//! validator, regular expressions, choices, Lark grammars; and what is refused.

mod common;

use common::{Host, MODEL, data, http};
use serde_json::{Value, json};

fn post(host: &Host, path: &str, body: &Value) -> (u16, Value) {
    let (status, text) = http(host, "POST", path, &body.to_string());
    (
        status,
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")),
    )
}

fn chat(content: &str, extra: &Value) -> Value {
    let mut body = json!({"model": MODEL, "temperature": 1, "max_tokens": 400,
        "messages": [{"role": "user", "content": content}]});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// The text of an answer that was not cut.
fn answer(host: &Host, body: &Value) -> String {
    let (status, answer) = post(host, "/v1/chat/completions", body);
    assert_eq!(status, 200, "{body}: {answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop", "{body}: {answer}");
    choice["message"]["content"]
        .as_str()
        .expect("a content")
        .to_owned()
}

fn response_format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "strict": true, "schema": schema}})
}

/// Bounded everywhere, so that no answer needs more tokens than it gets.
fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "tags", "kind"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 30},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
                "kind": {"enum": ["cat", "dog", null]}}}),
        json!({"type": "array", "minItems": 2, "maxItems": 3, "items": {"$ref": "#/$defs/point"},
            "$defs": {"point": {"type": "object", "additionalProperties": false, "required": ["x", "y"],
                "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "y": {"type": "boolean"}}}}}),
        json!({"anyOf": [{"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}, {"const": {"none": true}}]}),
    ]
}

#[test]
fn answers_at_temperature_one_are_valid_for_their_schema_every_time() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    for schema in schemas() {
        let validator = jsonschema::validator_for(&schema).expect("a schema");
        for seed in 0..6 {
            let body = chat(
                "Describe a pet or a place as JSON.",
                &json!({"seed": seed, "response_format": response_format(&schema)}),
            );
            let text = answer(&host, &body);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            validator
                .validate(&value)
                .unwrap_or_else(|error| panic!("{error}: {text}"));
            if seed == 0 {
                assert_eq!(answer(&host, &body), text, "one seed, one answer");
            }
        }
    }
}

#[test]
fn many_sequences_under_grammars_and_without_share_a_batch() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let schema = &schemas()[0];
    let validator = jsonschema::validator_for(schema).expect("a schema");
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (host, validator) = (&host, &validator);
            scope.spawn(move || {
                let constrained = json!({"seed": seed, "response_format": response_format(schema)});
                let text = answer(host, &chat("Describe a pet.", &constrained));
                let value: Value = serde_json::from_str(&text).expect("JSON");
                assert!(validator.is_valid(&value), "{text}");
            });
            scope.spawn(move || {
                let free = json!({"temperature": 0, "max_tokens": 12, "ignore_eos": true});
                let (status, answer) = post(
                    host,
                    "/v1/chat/completions",
                    &chat("What is the capital of France?", &free),
                );
                assert_eq!(status, 200, "{answer}");
                let text = answer["choices"][0]["message"]["content"]
                    .as_str()
                    .expect("a content");
                assert!(text.contains("Paris"), "{text}");
            });
        }
    });
}

#[test]
fn regular_expressions_choices_and_grammars_hold_in_chat_and_completions() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let is_date = |text: &str| {
        let parts: Vec<_> = text
            .split('-')
            .map(|part| (part.len(), part.parse::<u32>().is_ok()))
            .collect();
        parts == [(4, true), (2, true), (2, true)]
    };
    for seed in 0..4 {
        let date = json!({"seed": seed, "guided_regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"});
        let text = answer(&host, &chat("When was the revolution?", &date));
        assert!(is_date(&text), "{text}");
        let choice = json!({"seed": seed, "structured_outputs": {"choice": ["yes", "no", "\"maybe\""]}});
        let text = answer(&host, &chat("Is the sea blue?", &choice));
        assert!(["yes", "no", "\"maybe\""].contains(&text.as_str()), "{text}");
        let sum = json!({"model": MODEL, "prompt": "2 + 2 =", "max_tokens": 40, "seed": seed,
            "guided_grammar": "start: \" \" NUMBER (\" + \" NUMBER)~1..2\nNUMBER: /[0-9]{1,3}/"});
        let (status, answer) = post(&host, "/v1/completions", &sum);
        assert_eq!(
            (status, &answer["choices"][0]["finish_reason"]),
            (200, &json!("stop")),
            "{answer}"
        );
        let text = answer["choices"][0]["text"].as_str().expect("a text");
        let is_number = |part: &str| (1..4).contains(&part.len()) && part.parse::<u32>().is_ok();
        let numbers: Vec<_> = text.trim_start().split(" + ").collect();
        assert!(
            (2..4).contains(&numbers.len()) && numbers.iter().all(|n| is_number(n)),
            "{text}"
        );
    }
    // Any object: the model decides its length, so that one may be cut; what came must begin one.
    let object = json!({"seed": 3, "max_tokens": 60, "response_format": {"type": "json_object"}});
    let (status, answer) = post(
        &host,
        "/v1/chat/completions",
        &chat("Describe a pet as JSON.", &object),
    );
    let text = answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_default();
    assert!(status == 200 && text.starts_with('{'), "{answer}");
}

#[test]
fn an_answer_under_a_grammar_is_content_whatever_markers_it_spells() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let marker = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call><think>";
    let body = chat(
        "Say it.",
        &json!({"structured_outputs": {"choice": [marker]}, "logprobs": true, "ignore_eos": true}),
    );
    assert_eq!(answer(&host, &body), marker);
    let mut stream = body;
    stream["stream"] = json!(true);
    let (status, text) = http(&host, "POST", "/v1/chat/completions", &stream.to_string());
    assert_eq!(status, 200);
    let streamed: String = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
        .filter_map(|chunk| {
            chunk["choices"][0]["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(streamed, marker);
}

#[test]
fn a_sampling_guest_chooses_among_what_the_grammar_allows() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let schema = &schemas()[0];
    let validator = jsonschema::validator_for(schema).expect("a schema");
    let extra = json!({"seed": 5, "response_format": response_format(schema),
        "sampler": {"name": "mirostat", "params": {"tau": 5.0}}});
    let text = answer(&host, &chat("Describe a pet.", &extra));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert!(validator.is_valid(&value), "{text}");
}

#[test]
fn wrong_formats_are_refused_with_the_field() {
    let Some(data) = data() else { return };
    let host = Host::start(data, &[]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let schema = "response_format.json_schema.schema";
    let cases = [
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format.type",
            "json_schema",
        ),
        (
            json!({"response_format": response_format(&json!({"type": "strin"}))}),
            schema,
            "strin",
        ),
        (
            json!({"response_format": response_format(&json!({"type": "integer", "minimum": 3, "maximum": 1}))}),
            schema,
            "minimum",
        ),
        (
            json!({"response_format": response_format(&json!({"enum": ["x".repeat(300_000)]}))}),
            schema,
            "at most",
        ),
        (
            json!({"guided_regex": "a("}),
            "guided_regex",
            "regular expression",
        ),
        (
            json!({"guided_grammar": "start: other"}),
            "guided_grammar",
            "other",
        ),
        (
            json!({"response_format": {"type": "json_object"}, "tools": tool}),
            "response_format",
            "tools",
        ),
    ];
    for (extra, param, word) in cases {
        let (status, body) = post(&host, "/v1/chat/completions", &chat("hi", &extra));
        let error = &body["error"];
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}");
        assert!(
            error["message"].as_str().expect("a message").contains(word),
            "{body}"
        );
    }
}
