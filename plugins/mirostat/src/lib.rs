//! Mirostat 2 as a guest (Basu et al. 2021): holds the surprise of the drawn tokens at a target, by a bound that
//! follows the observed error.

use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, SequenceInfo, Session, Step, plain_plan};

/// Candidates asked for. The bound rarely lets more pass; what lies beyond is unlikely enough.
const CANDIDATES: u32 = 128;

struct Mirostat {
    /// Target surprise, bits.
    tau: f64,
    /// Learning rate.
    eta: f64,
    temperature: f32,
    /// Bound of a token's surprise, bits.
    mu: f64,
    random: SplitMix64,
}

impl Session for Mirostat {
    fn create(params: &Value, info: &SequenceInfo) -> Result<Self, String> {
        let params = Params(params);
        params.only(&["tau", "eta", "temperature"])?;
        let tau = params.number("tau", 5.0, 0.01, 20.0)?;
        Ok(Self {
            tau,
            eta: params.number("eta", 0.1, 0.0001, 1.0)?,
            temperature: params.number("temperature", 1.0, 0.01, 10.0)? as f32,
            mu: 2.0 * tau,
            random: SplitMix64(info.seed),
        })
    }

    fn plan(&mut self, _: &Step) -> Plan {
        // One plan serves for ever: what changes is in `choose`.
        Plan {
            temperature: self.temperature,
            candidates: CANDIDATES,
            valid_steps: 0,
            ..plain_plan()
        }
    }

    fn choose(&mut self, candidates: &[Candidate]) -> u32 {
        let surprise = |candidate: &Candidate| -f64::from(candidate.logprob) / std::f64::consts::LN_2;
        // Most likely first: those within the bound are a prefix, of which at least one is kept.
        let kept = candidates
            .iter()
            .take_while(|candidate| surprise(candidate) <= self.mu)
            .count()
            .max(1);
        let kept = &candidates[..kept.min(candidates.len())];
        let total: f64 = kept
            .iter()
            .map(|candidate| f64::from(candidate.logprob).exp())
            .sum();
        let mut left = self.random.uniform() * total;
        let mut chosen = 0;
        for (index, candidate) in kept.iter().enumerate() {
            chosen = index;
            left -= f64::from(candidate.logprob).exp();
            if left < 0.0 {
                break;
            }
        }
        // The error is of the truncated, renormalised distribution, as in the paper.
        let observed = kept.get(chosen).map_or(self.tau, |candidate| {
            -(f64::from(candidate.logprob).exp() / total).log2()
        });
        if observed.is_finite() {
            self.mu -= self.eta * (observed - self.tau);
        }
        chosen as u32
    }
}

galerne_sdk::export_sampler!(Mirostat);

/// The request's parameters, with errors in the client's words.
struct Params<'a>(&'a Value);

impl Params<'_> {
    fn only(&self, known: &[&str]) -> Result<(), String> {
        let Some(object) = self.0.as_object() else {
            return Err(format!("params: expected an object, got {}", self.0));
        };
        match object.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(format!(
                "params: mirostat has no \"{key}\"; it has {}",
                known.join(", ")
            )),
        }
    }

    fn number(&self, name: &str, default: f64, low: f64, high: f64) -> Result<f64, String> {
        match &self.0[name] {
            Value::Null => Ok(default),
            value => value
                .as_f64()
                .filter(|number| (low..=high).contains(number))
                .ok_or_else(|| format!("params.{name}: expected a number from {low} to {high}, got {value}")),
        }
    }
}

/// A small generator of good quality (Steele et al. 2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    fn session(params: &Value, seed: u64) -> Result<Mirostat, String> {
        Mirostat::create(
            params,
            &SequenceInfo {
                params_json: String::new(),
                vocabulary: 50_000,
                seed,
            },
        )
    }

    /// The best candidates of a Zipf distribution over 50,000 tokens.
    fn zipf() -> Vec<Candidate> {
        let total: f64 = (1..=50_000).map(|rank| 1.0 / f64::from(rank)).sum();
        let logprob = |rank: u32| (1.0 / f64::from(rank) / total).ln() as f32;
        (1..=CANDIDATES)
            .map(|rank| Candidate {
                token: rank,
                logprob: logprob(rank),
            })
            .collect()
    }

    #[test]
    fn mean_surprise_converges_to_the_target() {
        let candidates = zipf();
        for tau in [1.5, 2.5, 4.0] {
            let mut session = session(&json!({"tau": tau}), 11).expect("a session");
            let mut sum = 0.0;
            for step in 0..6_000 {
                let before = session.mu;
                session.choose(&candidates);
                if step >= 1_000 {
                    // The update tells what was observed: mu falls by eta times the error.
                    sum += (before - session.mu) / session.eta + tau;
                }
            }
            let mean = sum / 5_000.0;
            assert!((mean - tau).abs() < 0.1, "target {tau}: mean surprise {mean}");
        }
    }

    #[test]
    fn one_seed_gives_one_sequence_of_choices() {
        let candidates = zipf();
        let draw = |seed| {
            let mut session = session(&json!({}), seed).expect("a session");
            (0..50).map(|_| session.choose(&candidates)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn a_low_bound_still_keeps_the_best() {
        let mut session = session(&json!({"tau": 0.01}), 1).expect("a session");
        session.mu = -5.0;
        assert_eq!(session.choose(&zipf()), 0);
    }

    #[test]
    fn senseless_parameters_are_named() {
        for (params, word) in [
            (json!({"tau": -1}), "tau"),
            (json!({"eta": "fast"}), "eta"),
            (json!({"tua": 3}), "tua"),
            (json!([]), "object"),
        ] {
            let Err(text) = session(&params, 1) else {
                panic!("{params} was accepted")
            };
            assert!(text.contains(word), "{text}");
        }
    }
}
