//! Mirostat 2 as a guest (Basu et al. 2021): holds the surprise of the drawn tokens at a target, by a bound that
//! follows the observed error.

use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, Random, SequenceInfo, Session, Step, plain_plan};

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
    random: Random,
    /// What the last choice was made from, until the host says which token came.
    shown: Option<Shown>,
}

/// Candidates, and the logarithm of the probability that passed the bound, in bits.
struct Shown {
    candidates: Vec<Candidate>,
    kept_log2: f64,
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
            random: Random::new(info.seed),
            shown: None,
        })
    }

    fn plan(&mut self, step: &Step) -> Plan {
        self.learn(&step.accepted);
        // Asked again at every step, because that is how the feedback comes; it costs nothing while the device computes.
        Plan {
            temperature: self.temperature,
            candidates: CANDIDATES,
            valid_steps: 1,
            ..plain_plan()
        }
    }

    fn choose(&mut self, candidates: &[Candidate]) -> u32 {
        // Most likely first: those within the bound are a prefix, of which at least one is kept.
        let kept = candidates
            .iter()
            .take_while(|candidate| -log2(candidate) <= self.mu)
            .count()
            .max(1);
        let kept = &candidates[..kept.min(candidates.len())];
        let weights: Vec<f64> = kept
            .iter()
            .map(|candidate| f64::from(candidate.logprob).exp())
            .collect();
        let chosen = self.random.pick(&weights);
        self.shown = Some(Shown {
            candidates: candidates.to_vec(),
            kept_log2: weights.iter().sum::<f64>().log2(),
        });
        chosen as u32
    }
}

impl Mirostat {
    /// Moves the bound by the error of the token that came, in the truncated, renormalised distribution, as in the
    /// paper. It is the accepted token that counts and not the chosen one: the text goes on from what came. A token
    /// that was not among the candidates (forced, say) has no surprise to learn from.
    fn learn(&mut self, accepted: &[u32]) {
        let (Some(shown), Some(token)) = (self.shown.take(), accepted.first()) else {
            return;
        };
        let came = shown
            .candidates
            .iter()
            .find(|candidate| candidate.token == *token);
        let observed = came.map(|candidate| shown.kept_log2 - log2(candidate));
        if let Some(observed) = observed.filter(|observed| observed.is_finite()) {
            self.mu -= self.eta * (observed - self.tau);
        }
    }
}

/// A candidate's log-probability in bits.
fn log2(candidate: &Candidate) -> f64 {
    f64::from(candidate.logprob) * std::f64::consts::LOG2_E
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
                prompt: Vec::new(),
                constrained: false,
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

    /// One step as the host makes it: the plan brings the token that came before.
    fn draw(session: &mut Mirostat, candidates: &[Candidate]) -> u32 {
        let token = candidates[session.choose(candidates) as usize].token;
        accept(session, &[token]);
        token
    }

    fn accept(session: &mut Mirostat, tokens: &[u32]) {
        session.plan(&Step {
            position: 1,
            accepted: tokens.to_vec(),
        });
    }

    #[test]
    fn the_bound_follows_the_token_that_came_and_not_the_choice() {
        let candidates = zipf();
        let after = |accepted: &[u32]| {
            let mut session = session(&json!({"tau": 3.0}), 5).expect("a session");
            session.choose(&candidates);
            accept(&mut session, accepted);
            session.mu
        };
        let start = 6.0;
        assert!(after(&[1]) > start, "a dull token raises the bound");
        assert!(after(&[128]) < start, "a surprising one lowers it");
        assert_eq!(after(&[40_000]), start, "one that was not shown does neither");
        assert_eq!(after(&[]), start, "nor does none");
        // With tau 3 the bound is 6 bits: of p = 1 / (rank * h), h = 11.397, ranks 1 to 5 pass, together
        // 2.28333 / h. Rank 1 then has log2(2.28333) bits.
        assert!((after(&[1]) - (start - 0.1 * (2.283_333_f64.log2() - 3.0))).abs() < 1e-5);
    }

    #[test]
    fn a_token_is_learnt_from_once() {
        let mut session = session(&json!({}), 5).expect("a session");
        session.choose(&zipf());
        accept(&mut session, &[1]);
        let once = session.mu;
        accept(&mut session, &[1]);
        assert_eq!(session.mu, once);
    }

    #[test]
    fn mean_surprise_converges_to_the_target() {
        let candidates = zipf();
        for tau in [1.5, 2.5, 4.0] {
            let mut session = session(&json!({"tau": tau}), 11).expect("a session");
            let mut sum = 0.0;
            for step in 0..6_000 {
                let before = session.mu;
                draw(&mut session, &candidates);
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
        let drawn = |seed| {
            let mut session = session(&json!({}), seed).expect("a session");
            (0..50)
                .map(|_| draw(&mut session, &candidates))
                .collect::<Vec<_>>()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
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
