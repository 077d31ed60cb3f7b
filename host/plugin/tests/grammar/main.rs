//! Grammars over a small vocabulary: what they allow, how they end, what is refused, and random schemas whose every
//! answer an independent validator accepts.

mod numbers;
mod schemas;
mod support;

use galerne_core::grammar::{GrammarError, GrammarFactory as _, GrammarSource, Next};
use galerne_core::ids::TokenId;
use galerne_core::limits::GrammarLimits;
use serde_json::{Value, json};

use numbers::numbers;
use schemas::random_schema;
use support::{Answer, END, Walk, grammars, grammars_within, spell, token_of};

fn lark(text: &str) -> GrammarSource {
    GrammarSource::Lark(text.to_owned())
}

/// Every text a small grammar allows, by trying all tokens.
fn all_texts(source: &GrammarSource) -> Vec<String> {
    let (mut texts, mut open) = (Vec::new(), vec![Vec::new()]);
    while let Some(tokens) = open.pop() {
        let mut walk = Walk::new(grammars(), source);
        let next = walk.next(&tokens).expect("a grammar that goes on");
        match next {
            Next::End => texts.push(spell(&tokens)),
            Next::Tokens(mask) => {
                for token in (0..support::vocabulary())
                    .map(TokenId)
                    .filter(|t| mask.allows(*t))
                {
                    if token == END {
                        texts.push(spell(&tokens));
                    } else {
                        open.push([&tokens[..], &[token]].concat());
                    }
                }
            }
        }
    }
    texts.sort();
    texts.dedup();
    texts
}

#[test]
fn a_grammar_allows_its_texts_and_no_others() {
    assert_eq!(
        all_texts(&lark(r#"start: "yes" | "no" | "no way""#)),
        ["no", "no way", "yes"]
    );
    assert_eq!(all_texts(&lark("start: \"a\\\"b\" | \"é\"")), ["a\"b", "é"]);
    assert_eq!(
        all_texts(&GrammarSource::Regex("[ab]{2}|c/d".to_owned())),
        ["aa", "ab", "ba", "bb", "c/d"]
    );
    let schema = json!({"enum": ["x", 7, null]});
    assert_eq!(
        all_texts(&GrammarSource::JsonSchema(schema)),
        ["\"x\"", "7", "null"]
    );
}

#[test]
fn the_end_is_allowed_where_the_text_may_end_and_comes_by_itself_where_it_must() {
    let mut walk = Walk::new(grammars(), &GrammarSource::Regex("a{1,2}".to_owned()));
    let a = token_of(b"a");
    let mask = |next| match next {
        Ok(Next::Tokens(mask)) => mask,
        other => panic!("expected a mask, got {other:?}"),
    };
    let first = mask(walk.next(&[]));
    assert!(first.allows(a) && !first.allows(END));
    let second = mask(walk.next(&[a]));
    assert!(second.allows(a) && second.allows(END));
    assert_eq!(walk.next(&[a]), Ok(Next::End));
}

#[test]
fn control_tokens_and_padding_are_never_allowed_by_a_text() {
    let mut walk = Walk::new(grammars(), &GrammarSource::Regex("(?s:.)*".to_owned()));
    let Ok(Next::Tokens(mask)) = walk.next(&[]) else {
        panic!("expected a mask")
    };
    let forbidden: Vec<u32> = (0..support::vocabulary())
        .filter(|t| !mask.allows(TokenId(*t)))
        .collect();
    // Bytes that begin no character, the other control token, and what is past the tokenizer's vocabulary.
    assert!(mask.allows(END) && mask.allows(token_of("é".as_bytes())));
    assert!(forbidden.contains(&support::CONTROL.0) && forbidden.contains(&(support::vocabulary() - 1)));
}

#[test]
fn a_token_outside_the_grammar_ends_the_answer_and_stays_ended() {
    let mut walk = Walk::new(grammars(), &lark(r#"start: "yes""#));
    for _ in 0..2 {
        let error = walk.next(&[token_of(b"n")]).expect_err("not in the grammar");
        assert!(matches!(error, GrammarError::Stuck { .. }), "{error}");
    }
}

#[test]
fn what_is_wrong_with_a_grammar_is_said() {
    let schema = GrammarSource::JsonSchema;
    let cases = [
        (schema(json!({"type": "strin"})), "strin"),
        (schema(json!({"type": "object", "properties": 5})), "properties"),
        (schema(json!({"$ref": "#/$defs/missing"})), "missing"),
        (schema(json!({"$ref": "https://example.com/schema.json"})), "$ref"),
        (
            schema(json!({"type": "integer", "minimum": 5, "maximum": 1})),
            "minimum",
        ),
        (
            schema(json!({"type": "string", "pattern": "("})),
            "unclosed group",
        ),
        (schema(json!({"$ref": "#"})), "no text matches"),
        (schema(json!({"not": {"type": "string"}})), "not"),
        (lark("start: rule"), "rule"),
        (lark("begin: \"a\""), "start"),
        (lark("start: \"a"), "lexer error"),
        (GrammarSource::Regex("a(".to_owned()), "regex"),
    ];
    for (source, word) in cases {
        let error = grammars().session(&source, support::no_waker()).err();
        let text = error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(
            matches!(error, Some(GrammarError::Source { .. })),
            "{source:?}: {text}"
        );
        assert!(
            text.to_lowercase().contains(&word.to_lowercase()),
            "{source:?}: {text}"
        );
        assert!(!text.contains(['\n', '<']), "one clean line: {text}");
    }
}

/// Grammars that would take long or much: each is refused, or goes on within its limits.
#[test]
fn what_costs_too_much_is_bounded() {
    let any_of = |n: usize| json!({"anyOf": (0..n).map(|i| json!({"properties": {format!("p{i}"): {"type": "string"}}})).collect::<Vec<_>>()});
    let mut deep = json!({"type": "string"});
    for _ in 0..60 {
        deep = json!({"items": deep});
    }
    let sources = [
        GrammarSource::Regex("(a{1,1000}){1,1000}".to_owned()),
        GrammarSource::Regex("(.*a){20}.{500}".to_owned()),
        GrammarSource::Regex(format!("{}a{}", "(".repeat(120), ")*".repeat(120))),
        lark(&format!("start: {}\"a\"{}", "(".repeat(120), ")".repeat(120))),
        lark("start: a\na: a a | \"x\" |"),
        GrammarSource::JsonSchema(json!({"allOf": (0..12).map(|_| any_of(12)).collect::<Vec<_>>()})),
        GrammarSource::JsonSchema(deep),
        GrammarSource::JsonSchema(json!({"type": "string", "maxLength": 1_000_000_000})),
        GrammarSource::JsonSchema(json!({"type": "array", "minItems": 1_000_000, "maxItems": 2_000_000})),
        // Without brackets: long chains of operators, of rules, and of plain text.
        GrammarSource::Regex(format!("a{}", "?".repeat(100_000))),
        GrammarSource::Regex("ab?".repeat(40_000)),
        GrammarSource::Regex((0..20_000).map(|n| format!("{n}|")).collect()),
        lark(&format!("start: \"a\"{}", "*".repeat(100_000))),
        lark(&format!("start: A\nA: {}\"a\"", "~".repeat(100_000))),
        lark(&format!(
            "start: r0\n{}r8000: \"a\"",
            (0..8_000)
                .map(|n| format!("r{n}: r{}\n", n + 1))
                .collect::<String>()
        )),
        lark(&format!(
            "start: A0\n{}A8000: \"a\"",
            (0..8_000)
                .map(|n| format!("A{n}: A{}\n", n + 1))
                .collect::<String>()
        )),
        GrammarSource::JsonSchema(json!({"const": "x".repeat(100_000)})),
        GrammarSource::JsonSchema(json!({"enum": (0..10_000).map(|n| n.to_string()).collect::<Vec<_>>()})),
        GrammarSource::JsonSchema(json!({"$ref": "#/$defs/0", "$defs": (0..3_000).map(|n|
            (n.to_string(), json!({"$ref": format!("#/$defs/{}", n + 1)}))).collect::<serde_json::Map<_, _>>()})),
    ];
    for source in sources {
        let begin = std::time::Instant::now();
        let mut outcome = "went on";
        // As a request does, on a thread with the usual stack.
        match grammars().session(&source, support::no_waker()) {
            Err(GrammarError::Source { .. } | GrammarError::TooLarge { .. }) => outcome = "was refused",
            Err(other) => panic!("{other}"),
            Ok(_) => {
                let mut walk = Walk::new(grammars(), &source);
                let mut random = numbers(1);
                for _ in 0..30 {
                    match walk.draw(&mut random) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(GrammarError::TooComplex { .. }) => outcome = "was stopped",
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        }
        let took = begin.elapsed();
        let source: String = format!("{source:?}").chars().take(80).collect();
        assert!(took.as_secs() < 5, "{source} {outcome} after {took:?}");
    }
}

#[test]
fn limits_are_the_hosts() {
    let narrow = grammars_within(GrammarLimits {
        start_fuel: 10,
        ..GrammarLimits::default()
    });
    let source = GrammarSource::Regex("[a-z]{3,50}[0-9]+".to_owned());
    assert!(narrow.session(&source, support::no_waker()).is_err());
    assert!(grammars().session(&source, support::no_waker()).is_ok());
}

/// The promise: whatever is drawn, what comes out is valid. Drawing evenly among the allowed tokens is far more
/// inventive than any model.
#[test]
fn a_thousand_answers_to_random_schemas_are_valid() {
    let (mut complete, mut refused, mut infinite) = (0, 0, 0);
    for seed in 0..1_000 {
        let schema = random_schema(&mut numbers(seed));
        let validator = jsonschema::validator_for(&schema).expect("a schema");
        let source = GrammarSource::JsonSchema(schema.clone());
        let walk = match grammars().session(&source, support::no_waker()) {
            Ok(_) => Walk::new(grammars(), &source),
            // Said at once, not found out later.
            Err(GrammarError::Source { .. }) => {
                refused += 1;
                continue;
            }
            Err(other) => panic!("{schema}: {other}"),
        };
        match walk.finish(&mut numbers(seed + 10_000), 3_000) {
            Answer::Complete(text) => {
                let value: Value = match serde_json::from_str(&text) {
                    Ok(value) => value,
                    // 1e999 is JSON, and more than this reader can hold.
                    Err(error) if error.to_string().starts_with("number out of range") => {
                        infinite += 1;
                        continue;
                    }
                    Err(error) => panic!("{schema}: {error}: {text}"),
                };
                if let Err(error) = validator.validate(&value) {
                    panic!("{schema}: {error}: {text}");
                }
                complete += 1;
            }
            Answer::Cut => {}
            Answer::Failed(error) => panic!("{schema}: {error}"),
        }
    }
    assert!(
        complete + infinite >= 900,
        "{complete} complete, {infinite} with numbers beyond a double, {refused} schemas refused"
    );
}
