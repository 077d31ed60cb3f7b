//! From a grammar's source to the library's, within limits on its size. Knows no tokens.

use galerne_core::grammar::{GrammarError, GrammarSource};
use galerne_core::limits::Allowance;
use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

/// Where the library reads how a schema is to be compiled.
const OPTIONS: &str = "x-guidance";
/// White space between the parts of a JSON text: what a model that writes JSON writes, a space or a line's end with some
/// indentation. Without a bound a model may fill its answer with line ends, which is valid and useless.
const WHITE_SPACE: &str = r"\x20|\x0A(\x20{0,32}|\x09{0,16})";

/// Refuses what is larger or nested deeper than is allowed.
pub(super) fn check_size(source: &GrammarSource, allowance: &Allowance) -> Result<(), GrammarError> {
    let limits = &allowance.limits.grammar;
    let text = match source {
        GrammarSource::JsonSchema(schema) => &schema.to_string(),
        GrammarSource::Regex(text) | GrammarSource::Lark(text) => text,
    };
    let check = |unit, name, limit, got| {
        if got <= limit {
            return Ok(());
        }
        Err(GrammarError::TooLarge {
            kind: source.kind(),
            unit,
            who: allowance.who(name),
            limit,
            got,
        })
    };
    let bytes_max = limits.source_bytes_max;
    check("bytes", "grammar_source_bytes_max", bytes_max, text.len())?;
    check(
        "nested brackets",
        "grammar_nesting_max",
        limits.nesting_max,
        nesting(text),
    )
}

/// The largest number of brackets open at once. Those in strings and character classes count too: it is a bound on how
/// deep a parser of any of these languages goes, not a parser.
fn nesting(text: &str) -> usize {
    let (mut open, mut largest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        largest = largest.max(open);
    }
    largest
}

/// The grammar as the library takes it.
pub(super) fn top_level(source: &GrammarSource) -> TopLevelGrammar {
    match source {
        GrammarSource::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_options(schema)),
        GrammarSource::Regex(text) => TopLevelGrammar::from_regex(text),
        GrammarSource::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
    }
}

/// The schema with our options, unless it brings its own.
fn with_options(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(object) = schema.as_object_mut()
        && !object.contains_key(OPTIONS)
    {
        object.insert(OPTIONS.to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

#[cfg(test)]
mod tests {
    use galerne_core::limits::HostLimits;

    use super::*;

    #[test]
    fn nesting_is_the_deepest_place() {
        for (text, expected) in [("", 0), ("a(b)c(d)", 1), ("{[()]}()", 3), (")))((", 2)] {
            assert_eq!(nesting(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_too_large_or_too_deep_is_refused() {
        let mut limits = HostLimits::default();
        (limits.grammar.source_bytes_max, limits.grammar.nesting_max) = (10, 2);
        let limits = Allowance::of_host(limits);
        let error = |source| check_size(&source, &limits).expect_err("too much").to_string();
        assert_eq!(
            error(GrammarSource::Regex("a".repeat(11))),
            "regular expression: expected at most 10 bytes (grammar_source_bytes_max, the host's operator can raise it), got 11; \
             simplify it"
        );
        assert_eq!(
            error(GrammarSource::JsonSchema(json!([[[]]]))),
            "JSON schema: expected at most 2 nested brackets (grammar_nesting_max, the host's operator can raise it), got 3; \
             simplify it"
        );
        assert_eq!(
            check_size(&GrammarSource::Lark("(())".to_owned()), &limits),
            Ok(())
        );
    }
}
