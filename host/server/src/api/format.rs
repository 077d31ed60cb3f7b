//! What an answer must match: OpenAI's `response_format` and vLLM's `structured_outputs` and `guided_*`.
//! Knows no grammar's language.

use galerne_core::chat::{ChatError, Delta};
use galerne_core::grammar::{GrammarError, GrammarSession, GrammarSource, GrammarText};
use galerne_core::guest::ChatParser;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, kind, short};
use super::state::ServedModel;

/// A grammar and the field it came from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Format {
    source: GrammarSource,
    param: String,
}

impl Format {
    /// The format a request asks for, if it does.
    pub(super) fn read(fields: &Fields<'_>) -> Result<Option<Self>, ApiError> {
        let mut formats = Vec::new();
        formats.extend(response_format(fields)?);
        if let Some(value) = fields.value("structured_outputs") {
            let outputs = Fields::of(value, "structured_outputs")?;
            if outputs.flag("json_object")? {
                formats.push(any_object("structured_outputs.json_object"));
            }
            formats.extend(constraints(&outputs, "structured_outputs.", "")?);
        }
        formats.extend(constraints(fields, "", "guided_")?);
        match &formats[..] {
            [] | [_] => Ok(formats.pop()),
            [first, second, ..] => Err(ApiError::field(
                &second.param,
                &format!("nothing beside {}", first.param),
                "both",
            )),
        }
    }

    /// The format a pipeline asks for.
    pub(super) fn of_pipeline(grammar: GrammarText) -> Result<Self, GrammarError> {
        Ok(Self {
            source: grammar.source()?,
            param: "grammar".to_owned(),
        })
    }

    /// The field it came from.
    pub(super) fn param(&self) -> &str {
        &self.param
    }

    /// A grammar for one answer. Blocks while it is compiled.
    pub(super) fn session(&self, model: &ServedModel) -> Result<Box<dyn GrammarSession>, ApiError> {
        model
            .grammars
            .session(&self.source, model.engine.waker())
            .map_err(|error| {
                let is_ours = matches!(error, GrammarError::Host { .. });
                let mut error = ApiError::from(error);
                if !is_ours {
                    error.message = format!("{}: {}", self.param, error.message);
                    error.param = Some(self.param.clone());
                }
                error
            })
    }
}

fn any_object(param: &str) -> Format {
    Format {
        source: GrammarSource::JsonSchema(json!({"type": "object"})),
        param: param.to_owned(),
    }
}

fn response_format(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    let Some(value) = fields.value("response_format") else {
        return Ok(None);
    };
    let format = Fields::of(value, "response_format")?;
    match format.required_text("type")? {
        "text" => Ok(None),
        "json_object" => Ok(Some(any_object("response_format"))),
        "json_schema" => {
            let value = format.value("json_schema").unwrap_or(&Value::Null);
            let inner = Fields::of(value, "response_format.json_schema")?;
            let param = "response_format.json_schema.schema";
            let schema = inner.value("schema");
            let schema = schema.ok_or_else(|| ApiError::field(param, "a JSON schema", "nothing"))?;
            Ok(Some(Format {
                source: GrammarSource::JsonSchema(schema_of(schema, param)?),
                param: param.to_owned(),
            }))
        }
        other => Err(ApiError::field(
            "response_format.type",
            "text, json_object or json_schema",
            format!("\"{other}\""),
        )),
    }
}

/// The fields of vLLM that each set a grammar, under `prefix`; `path` stands before their names in messages.
fn constraints(fields: &Fields<'_>, path: &str, prefix: &str) -> Result<Vec<Format>, ApiError> {
    let mut formats = Vec::new();
    let mut push = |name: String, source| {
        formats.push(Format {
            source,
            param: format!("{path}{name}"),
        });
    };
    let name = |field: &str| format!("{prefix}{field}");
    if let Some(schema) = fields.value(&name("json")) {
        let schema = schema_of(schema, &format!("{path}{}", name("json")))?;
        push(name("json"), GrammarSource::JsonSchema(schema));
    }
    if let Some(text) = fields.text(&name("regex"))? {
        push(name("regex"), GrammarSource::Regex(text.to_owned()));
    }
    if let Some(text) = fields.text(&name("grammar"))? {
        push(name("grammar"), GrammarSource::Lark(text.to_owned()));
    }
    if let Some(list) = fields.list(&name("choice"))? {
        let texts: Option<Vec<String>> = list
            .iter()
            .map(|text| text.is_string().then(|| text.to_string()))
            .collect();
        let expected = "an array of one or more strings";
        let texts = texts.filter(|texts| !texts.is_empty()).ok_or_else(|| {
            ApiError::field(format!("{path}{}", name("choice")), expected, "something else")
        })?;
        // Lark's strings are written as JSON's are.
        let rule = format!("start: {}", texts.join(" | "));
        push(name("choice"), GrammarSource::Lark(rule));
    }
    Ok(formats)
}

/// A schema as it is, or as text, which vLLM takes too.
fn schema_of(value: &Value, param: &str) -> Result<Value, ApiError> {
    let parsed = match value {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| ApiError::field(param, "a JSON schema", format!("no JSON: {error}")))?,
        other => other.clone(),
    };
    if parsed.is_object() {
        return Ok(parsed);
    }
    let got = if parsed.is_boolean() {
        short(&parsed)
    } else {
        kind(&parsed).to_owned()
    };
    Err(ApiError::field(param, "a JSON schema that is an object", got))
}

/// Takes an answer as it is: what matches a grammar is no chat format's text, whatever markers a string in it spells.
pub(super) struct Verbatim;

impl ChatParser for Verbatim {
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ChatError> {
        Ok(vec![Delta::Content(text.to_owned())])
    }

    fn finish(&mut self) -> Result<Vec<Delta>, ChatError> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Option<Format>, ApiError> {
        Format::read(&Fields::of(body, "")?)
    }

    #[test]
    fn every_spelling_gives_its_grammar() {
        let schema = || GrammarSource::JsonSchema(json!({"type": "integer"}));
        let object = || GrammarSource::JsonSchema(json!({"type": "object"}));
        let lark = |text: &str| GrammarSource::Lark(text.to_owned());
        let cases = [
            (
                json!({"response_format": {"type": "json_object"}}),
                object(),
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_schema",
                    "json_schema": {"name": "n", "strict": true, "schema": {"type": "integer"}}}}),
                schema(),
                "response_format.json_schema.schema",
            ),
            (
                json!({"structured_outputs": {"json": "{\"type\": \"integer\"}"}}),
                schema(),
                "structured_outputs.json",
            ),
            (
                json!({"structured_outputs": {"json_object": true}}),
                object(),
                "structured_outputs.json_object",
            ),
            (
                json!({"guided_json": {"type": "integer"}}),
                schema(),
                "guided_json",
            ),
            (
                json!({"guided_regex": "a+"}),
                GrammarSource::Regex("a+".to_owned()),
                "guided_regex",
            ),
            (
                json!({"guided_grammar": "start: A"}),
                lark("start: A"),
                "guided_grammar",
            ),
            (
                json!({"structured_outputs": {"choice": ["yes", "\"no\""]}}),
                lark(r#"start: "yes" | "\"no\"""#),
                "structured_outputs.choice",
            ),
        ];
        for (body, source, param) in cases {
            let param = param.to_owned();
            assert_eq!(read(&body), Ok(Some(Format { source, param })), "{body}");
        }
        for body in [
            json!({}),
            json!({"response_format": null}),
            json!({"response_format": {"type": "text"}}),
            json!({"structured_outputs": {"json_object": false}}),
        ] {
            assert_eq!(read(&body), Ok(None), "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (
                json!({"response_format": {"type": "yaml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": true}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_choice": []}), "guided_choice"),
            (
                json!({"structured_outputs": {"choice": [1]}}),
                "structured_outputs.choice",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
                "guided_regex",
            ),
        ] {
            let error = read(&body).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error:?}");
        }
    }
}
