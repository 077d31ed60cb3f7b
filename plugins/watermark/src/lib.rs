//! A sampler that marks what it writes: behind each token a keyed part of all tokens is green, and green ones are made
//! likelier. A reader sees nothing; who has the key counts more green tokens than chance gives (`galerne watermark`).
//!
//! Parameters: `key`, 32 hexadecimal digits; `gamma`, the green part, 0.25 if left out; `delta`, what is added to the
//! logits of green tokens, 2 if left out; `temperature` and `top_p`, 1 if left out.

mod green;

use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, Random, SequenceInfo, Session, Step, plain_plan};

use green::Green;

/// Candidates asked for. What lies beyond is unlikely enough.
const CANDIDATES: u32 = 64;

struct Watermark {
    green: Green,
    delta: f64,
    temperature: f32,
    top_p: f32,
    /// The last token of the output; nothing before the first is known.
    before: Option<u32>,
    random: Random,
}

impl Session for Watermark {
    fn create(params: &Value, info: &SequenceInfo) -> Result<Self, String> {
        let fields = params.as_object().ok_or("params: expected an object")?;
        let known = ["key", "gamma", "delta", "temperature", "top_p"];
        if let Some(field) = fields.keys().find(|field| !known.contains(&field.as_str())) {
            return Err(format!(
                "params: watermark has no \"{field}\"; it has {}",
                known.join(", ")
            ));
        }
        let number = |name: &str, default: f64, low: f64, high: f64| match fields.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| (low..=high).contains(number))
                .ok_or_else(|| format!("params.{name}: expected from {low} to {high}, got {value}")),
        };
        let key = fields.get("key").and_then(Value::as_str).unwrap_or_default();
        Ok(Self {
            green: Green::new(key, number("gamma", 0.25, 0.01, 0.99)?)
                .map_err(|error| format!("params.{error}"))?,
            delta: number("delta", 2.0, 0.0, 20.0)?,
            temperature: number("temperature", 1.0, 0.01, 10.0)? as f32,
            top_p: number("top_p", 1.0, 0.0, 1.0)? as f32,
            before: None,
            random: Random::new(info.seed),
        })
    }

    fn plan(&mut self, step: &Step) -> Plan {
        self.before = step.accepted.last().copied().or(self.before);
        Plan {
            temperature: self.temperature,
            top_p: self.top_p,
            candidates: CANDIDATES,
            valid_steps: 1,
            ..plain_plan()
        }
    }

    fn choose(&mut self, candidates: &[Candidate]) -> u32 {
        let weights: Vec<f64> = candidates
            .iter()
            .map(|candidate| self.weight(candidate))
            .collect();
        self.random.pick(&weights) as u32
    }
}

impl Watermark {
    /// A candidate's probability, not normalised, with its color.
    fn weight(&self, candidate: &Candidate) -> f64 {
        let is_green = self
            .before
            .is_some_and(|before| self.green.is_green(before, candidate.token));
        // The bias is on logits before the temperature divides them.
        let bias = if is_green {
            self.delta / f64::from(self.temperature)
        } else {
            0.0
        };
        (f64::from(candidate.logprob) + bias).exp()
    }
}

galerne_sdk::export_sampler!(Watermark);

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f";

    fn session(params: &Value, seed: u64) -> Result<Watermark, String> {
        let info = SequenceInfo {
            params_json: params.to_string(),
            vocabulary: 1_000,
            prompt: Vec::new(),
            constrained: false,
            seed,
        };
        Watermark::create(params, &info)
    }

    /// How many of 2,000 draws among 20 equal candidates are green.
    fn green_draws(delta: f64) -> usize {
        let mut session = session(&json!({"key": KEY, "delta": delta}), 1).expect("parameters");
        let candidates: Vec<Candidate> = (0..20).map(|token| Candidate { token, logprob: -3.0 }).collect();
        let green = session.green;
        let mut count = 0;
        for position in 0..2_000 {
            let before = position % 997;
            session.plan(&Step {
                position,
                accepted: vec![before],
            });
            let token = candidates[session.choose(&candidates) as usize].token;
            count += usize::from(green.is_green(before, token));
        }
        count
    }

    #[test]
    fn green_tokens_come_more_often_and_by_how_much_delta_says() {
        let (none, some) = (green_draws(0.0), green_draws(2.0));
        assert!((430..570).contains(&none), "{none}");
        // e^2 / (e^2 + 3) = 0.71 of all.
        assert!((1_330..1_500).contains(&some), "{some}");
    }

    #[test]
    fn equal_seeds_draw_equally() {
        let draws = |seed| {
            let mut session = session(&json!({"key": KEY}), seed).expect("parameters");
            let candidates: Vec<Candidate> = (0..9).map(|token| Candidate { token, logprob: -2.0 }).collect();
            let mut draw = |position| {
                session.plan(&Step {
                    position,
                    accepted: vec![position],
                });
                session.choose(&candidates)
            };
            (0..50).map(&mut draw).collect::<Vec<u32>>()
        };
        assert_eq!(draws(5), draws(5));
        assert_ne!(draws(5), draws(6));
    }

    #[test]
    fn parameters_are_checked() {
        for bad in [
            json!({}),
            json!({"key": "secret"}),
            json!({"key": KEY, "gamma": 1}),
            json!({"key": KEY, "delta": "much"}),
            json!({"key": KEY, "top_k": 5}),
        ] {
            let error = session(&bad, 0).err().expect("it is wrong");
            assert!(
                error.starts_with("params") && !error.contains("secret"),
                "{error}"
            );
        }
    }
}
