//! Typed access to a request's JSON with errors that name the field. Unknown fields are ignored, as OpenAI does;
//! `null` counts as absent.

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of an object found at `path` (empty for the body itself).
    pub(super) fn of(value: &'a Value, path: &'a str) -> Result<Self, ApiError> {
        match value.as_object() {
            Some(object) => Ok(Self { object, path }),
            None if path.is_empty() => Err(ApiError::invalid(format!(
                "body: expected a JSON object, got {}",
                kind(value)
            ))),
            None => Err(ApiError::field(path, "an object", kind(value))),
        }
    }

    fn name(&self, field: &str) -> String {
        if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        }
    }

    /// The value, unless it is absent or null.
    pub(super) fn value(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        field: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .ok_or_else(|| ApiError::field(self.name(field), expected, short(value)))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(super) fn required_text(&self, field: &str) -> Result<&'a str, ApiError> {
        self.text(field)?
            .ok_or_else(|| ApiError::field(self.name(field), "a string", "nothing"))
    }

    pub(super) fn flag(&self, field: &str) -> Result<bool, ApiError> {
        Ok(self
            .typed(field, "true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    pub(super) fn list(&self, field: &str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.typed(field, "an array", Value::as_array)
    }

    pub(super) fn integer(&self, field: &str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
        let expected = format!("an integer from {low} to {high}");
        self.typed(field, &expected, |value| {
            value.as_u64().filter(|number| (low..=high).contains(number))
        })
    }

    pub(super) fn number(&self, field: &str, low: f32, high: f32, default: f32) -> Result<f32, ApiError> {
        let expected = format!("a number from {low} to {high}");
        let read = |value: &Value| {
            value
                .as_f64()
                .map(|number| number as f32)
                .filter(|number| (low..=high).contains(number))
        };
        Ok(self.typed(field, &expected, read)?.unwrap_or(default))
    }
}

/// What kind of value it is.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The value if it is short, else its kind: an error does not repeat a prompt.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 40 {
        text
    } else {
        kind(value).to_owned()
    }
}
