//! Proposes what came before after the same tokens (prompt lookup, Saxena 2023): where an answer repeats its prompt or itself,
//! one step gives several tokens. What is drawn is the same as without proposals.

mod lookup;

use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, SequenceInfo, Session, Step, plain_plan};
use lookup::Lookup;

/// Parameters, and what they are if they are not given.
const KNOWN: [&str; 4] = ["longest", "shortest", "tokens", "temperature"];

struct Speculate {
    lookup: Lookup,
    /// Most tokens to propose.
    count: usize,
    temperature: f32,
}

impl Session for Speculate {
    fn create(params: &Value, info: &SequenceInfo) -> Result<Self, String> {
        if let Some(object) = params.as_object()
            && let Some(other) = object.keys().find(|key| !KNOWN.contains(&key.as_str()))
        {
            let known = KNOWN.join(", ");
            return Err(format!(
                "params: ngram-speculate has no \"{other}\"; it has {known}"
            ));
        }
        let longest = number(params, "longest", 4.0, 1.0, 16.0)? as usize;
        let shortest = number(params, "shortest", 2.0, 1.0, 16.0)? as usize;
        if shortest > longest {
            return Err(format!(
                "params.shortest: expected at most params.longest, which is {longest}, got {shortest}"
            ));
        }
        Ok(Self {
            lookup: Lookup::new(shortest, longest, info.prompt.clone()),
            count: number(params, "tokens", 8.0, 1.0, 64.0)? as usize,
            temperature: number(params, "temperature", 0.0, 0.0, 2.0)? as f32,
        })
    }

    fn plan(&mut self, step: &Step) -> Plan {
        self.lookup.extend(&step.accepted);
        let proposed = self.lookup.continuation(self.count);
        Plan {
            temperature: self.temperature,
            // One more token is drawn than is proposed, if all are right.
            valid_steps: proposed.len() as u32 + 1,
            proposed,
            ..plain_plan()
        }
    }

    fn choose(&mut self, _: &[Candidate]) -> u32 {
        0
    }
}

galerne_sdk::export_sampler!(Speculate);

fn number(params: &Value, name: &str, default: f64, low: f64, high: f64) -> Result<f64, String> {
    match &params[name] {
        Value::Null => Ok(default),
        value => value
            .as_f64()
            .filter(|number| (low..=high).contains(number))
            .ok_or_else(|| format!("params.{name}: expected a number from {low} to {high}, got {value}")),
    }
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    fn session(params: &Value, prompt: &[u32]) -> Result<Speculate, String> {
        Speculate::create(
            params,
            &SequenceInfo {
                params_json: String::new(),
                vocabulary: 100,
                prompt: prompt.to_vec(),
                constrained: false,
                seed: 0,
            },
        )
    }

    fn plan(session: &mut Speculate, position: u32, accepted: &[u32]) -> Plan {
        session.plan(&Step {
            position,
            accepted: accepted.to_vec(),
        })
    }

    #[test]
    fn it_proposes_from_the_prompt_and_from_what_was_accepted() {
        let mut session = session(&json!({"tokens": 3}), &[1, 2, 3, 4, 5, 9]).expect("parameters");
        let nothing = plan(&mut session, 0, &[]);
        assert_eq!((nothing.proposed.len(), nothing.valid_steps), (0, 1));
        let from_prompt = plan(&mut session, 2, &[1, 2]);
        assert_eq!(
            (from_prompt.proposed, from_prompt.valid_steps),
            (vec![3, 4, 5], 4)
        );
        let from_output = plan(&mut session, 7, &[3, 7, 7, 1, 2]);
        assert_eq!(from_output.proposed, [3, 7, 7]);
        assert_eq!(from_output.temperature, 0.0);
    }

    #[test]
    fn wrong_parameters_are_refused_in_words() {
        for (params, words) in [
            (json!({"n": 3}), "has no \"n\""),
            (
                json!({"tokens": 0}),
                "params.tokens: expected a number from 1 to 64",
            ),
            (
                json!({"longest": 2, "shortest": 3}),
                "at most params.longest, which is 2",
            ),
            (json!({"temperature": "warm"}), "params.temperature"),
        ] {
            let error = session(&params, &[]).err().expect("wrong");
            assert!(error.contains(words), "{error}");
        }
    }
}
