//! A sampler that lets the model answer one of the given texts and nothing else: `{"choices": ["yes", "no"]}`.

use galerne_sdk::grammar::{Grammar, one_of, text};
use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, SequenceInfo, Session, Step, plain_plan};

struct Choices {
    /// Kept as long as the sequence lives: plans name it.
    grammar: Grammar,
    temperature: f32,
}

impl Session for Choices {
    fn create(params: &Value, info: &SequenceInfo) -> Result<Self, String> {
        if info.constrained {
            return Err(
                "response_format and the like: expected none, since params.choices says what is answered"
                    .into(),
            );
        }
        let (choices, temperature) = read(params)?;
        Ok(Self {
            grammar: Grammar::compile(&one_of(&choices)).map_err(text)?,
            temperature,
        })
    }

    /// One plan for the whole answer: the host follows the grammar with every token it draws, and ends where it ends.
    fn plan(&mut self, _: &Step) -> Plan {
        Plan {
            grammar: Some(self.grammar.id()),
            temperature: self.temperature,
            valid_steps: 0,
            ..plain_plan()
        }
    }

    fn choose(&mut self, _: &[Candidate]) -> u32 {
        0
    }
}

galerne_sdk::export_sampler!(Choices);

/// The texts and the temperature, which is 0 if none is given.
fn read(params: &Value) -> Result<(Vec<&str>, f32), String> {
    let known = ["choices", "temperature"];
    let other = params
        .as_object()
        .and_then(|object| object.keys().find(|key| !known.contains(&key.as_str())));
    if let Some(other) = other {
        return Err(format!(
            "params: choices has no \"{other}\"; it has choices, temperature"
        ));
    }
    let choices: Option<Vec<&str>> = params["choices"]
        .as_array()
        .and_then(|list| list.iter().map(Value::as_str).collect());
    let choices = choices
        .filter(|choices| !choices.is_empty() && choices.iter().all(|choice| !choice.is_empty()))
        .ok_or_else(|| {
            let got = &params["choices"];
            format!("params.choices: expected an array of one or more texts, none empty, got {got}")
        })?;
    let temperature = match &params["temperature"] {
        Value::Null => 0.0,
        value => value
            .as_f64()
            .filter(|number| (0.0..=2.0).contains(number))
            .ok_or_else(|| format!("params.temperature: expected a number from 0 to 2, got {value}"))?,
    };
    Ok((choices, temperature as f32))
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    #[test]
    fn parameters_are_read() {
        let params = json!({"choices": ["yes", "no"], "temperature": 0.5});
        assert_eq!(read(&params), Ok((vec!["yes", "no"], 0.5)));
        assert_eq!(read(&json!({"choices": ["yes"]})), Ok((vec!["yes"], 0.0)));
    }

    #[test]
    fn wrong_parameters_are_refused_in_words() {
        for (params, words) in [
            (json!({}), "params.choices: expected an array"),
            (json!({"choices": []}), "one or more texts"),
            (json!({"choices": ["yes", ""]}), "none empty"),
            (json!({"choices": ["yes", 1]}), "got [\"yes\",1]"),
            (json!({"choices": ["yes"], "temperature": 3}), "from 0 to 2"),
            (json!({"choice": ["yes"]}), "has no \"choice\""),
        ] {
            let error = read(&params).expect_err("wrong");
            assert!(error.contains(words), "{error}");
        }
    }
}
