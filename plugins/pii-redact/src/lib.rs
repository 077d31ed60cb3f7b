//! Keeps personal data from the model: addresses, account, card, telephone and social security numbers become
//! placeholders like `[EMAIL_1]` on the way in, and the placeholders become what they stood for on the way out.
//!
//! Parameters: `kinds`, a list of `email`, `iban`, `nir`, `card` and `phone` (all, if left out), and `restore`, whether
//! the answer has the values again (true, if left out). Messages are redacted, with the arguments of tool calls in them;
//! tools' descriptions are not, because their author writes them and no user.

mod email;
mod find;
mod numbers;
mod phone;
mod vault;

use find::Kind;
use galerne_sdk::filter::{
    Channel, Message, Passage, Refusal, Request, RequestInfo, Session, Verdict, all_of, instead_of,
};
use galerne_sdk::json::{self, Value};
use vault::Vault;

struct PiiRedact {
    kinds: Vec<Kind>,
    restore: bool,
    vault: Vault,
}

impl Session for PiiRedact {
    fn create(params: &Value, _: &RequestInfo) -> Result<Self, String> {
        let Some(object) = params.as_object() else {
            return Err(format!("params: expected an object, got {params}"));
        };
        if let Some(key) = object
            .keys()
            .find(|key| !["kinds", "restore"].contains(&key.as_str()))
        {
            return Err(format!(
                "params: pii-redact has no \"{key}\"; it has kinds, restore"
            ));
        }
        let restore = match object.get("restore") {
            None => true,
            Some(Value::Bool(restore)) => *restore,
            Some(other) => return Err(format!("params.restore: expected true or false, got {other}")),
        };
        Ok(Self {
            kinds: kinds(object.get("kinds"))?,
            restore,
            vault: Vault::default(),
        })
    }

    fn on_request(&mut self, request: Request) -> Verdict {
        for message in &request.messages {
            self.vault.reserve(&message.content);
            for call in &message.tool_calls {
                self.vault.reserve(&call.arguments_json);
            }
        }
        let messages = request
            .messages
            .into_iter()
            .map(|message| self.redact_message(message))
            .collect();
        if self.vault.is_empty() {
            return Verdict::Pass;
        }
        Verdict::Rewrite(Request { messages, ..request })
    }

    fn on_text(&mut self, _: Channel, text: &str) -> Result<Passage, Refusal> {
        if !self.restore {
            return Ok(all_of(text));
        }
        // What is put in has no quotes or backslashes (see `find`): arguments stay the JSON they were.
        let (restored, taken) = self.vault.restore(text);
        Ok(instead_of(&text[..taken], restored))
    }
}

galerne_sdk::export_filter!(PiiRedact);

/// The kinds a parameter names; all, if there is none.
fn kinds(param: Option<&Value>) -> Result<Vec<Kind>, String> {
    let Some(param) = param else {
        return Ok(Kind::ALL.to_vec());
    };
    let names = || Kind::ALL.map(Kind::name).join(", ");
    let wrong = |got: &Value| format!("params.kinds: expected a list of {}, got {got}", names());
    let list = param.as_array().ok_or_else(|| wrong(param))?;
    if let Some(unknown) = list
        .iter()
        .find(|name| !Kind::ALL.iter().any(|kind| name.as_str() == Some(kind.name())))
    {
        return Err(wrong(unknown));
    }
    // In the order in which they are looked for, whatever the order in the list.
    let asked = |kind: &Kind| list.iter().any(|name| name.as_str() == Some(kind.name()));
    Ok(Kind::ALL.into_iter().filter(asked).collect())
}

impl PiiRedact {
    fn redact_message(&mut self, mut message: Message) -> Message {
        message.content = self.redact(message.content);
        for call in &mut message.tool_calls {
            call.arguments_json = self.redact_json(std::mem::take(&mut call.arguments_json));
        }
        message
    }

    fn redact(&mut self, text: String) -> String {
        self.vault.redact(&text, &self.kinds).unwrap_or(text)
    }

    /// Value by value, because escapes hide where a word begins. Text without personal data stays as it is spelled.
    fn redact_json(&mut self, text: String) -> String {
        let Ok(value) = json::from_str::<Value>(&text) else {
            return self.redact(text);
        };
        let redacted = self.redact_value(value.clone());
        if redacted == value {
            return text;
        }
        redacted.to_string()
    }

    fn redact_value(&mut self, value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.redact(text)),
            Value::Array(values) => values.into_iter().map(|value| self.redact_value(value)).collect(),
            Value::Object(fields) => fields
                .into_iter()
                .map(|(name, value)| (self.redact(name), self.redact_value(value)))
                .collect(),
            // A card number need not be in quotes; its placeholder is.
            Value::Number(number) => match self.vault.redact(&number.to_string(), &self.kinds) {
                Some(placeholder) => Value::String(placeholder),
                None => Value::Number(number),
            },
            Value::Null | Value::Bool(_) => value,
        }
    }
}

#[cfg(test)]
mod tests;
