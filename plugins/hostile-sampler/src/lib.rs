//! A sampler that does with grammars what a hostile or careless author might, by the word `misbehave` in its parameters: for
//! tests of the host.

use galerne_sdk::grammar::{Grammar, Source, text};
use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, SequenceInfo, Session, Step, plain_plan};

/// A grammar of single letters, which all tokens of letters fit.
const LETTERS: &str = "[a-z]*";

struct Hostile {
    misbehave: String,
    /// Tokens a plan is valid for.
    valid: u32,
    held: Vec<Grammar>,
}

impl Session for Hostile {
    fn create(params: &Value, _: &SequenceInfo) -> Result<Self, String> {
        let misbehave = params["misbehave"].as_str().unwrap_or_default().to_owned();
        let mut held = vec![compile(params["regex"].as_str().unwrap_or(LETTERS))?];
        match misbehave.as_str() {
            // What was wrong comes back as the refusal.
            "bomb" => drop(compile(
                &params["source"]
                    .as_str()
                    .unwrap_or_default()
                    .repeat(times(params)),
            )?),
            "nested" => drop(compile(&"(".repeat(times(params)))?),
            "compile" => loop {
                drop(compile(LETTERS)?);
            },
            "fork" => loop {
                let fork = held[0].fork().map_err(text)?;
                held.push(fork);
            },
            "leak" => loop {
                std::mem::forget(held[0].fork().map_err(text)?);
            },
            "rollback" => held[0].rollback(1).map_err(text)?,
            "accept" => drop(held[0].accept(&vec![b'a'.into(); times(params)]).map_err(text)?),
            _ => {}
        }
        let valid = params["valid"].as_u64().unwrap_or(1) as u32;
        Ok(Self {
            misbehave,
            valid,
            held,
        })
    }

    fn plan(&mut self, step: &Step) -> Plan {
        let plan = Plan {
            grammar: Some(self.held[0].id()),
            valid_steps: self.valid,
            ..plain_plan()
        };
        match self.misbehave.as_str() {
            "stale" if step.position > 0 => self.held.clear(),
            "late" => {
                // The refusal in words, as the trap's reason.
                if let Err(error) = compile(LETTERS) {
                    panic!("{error}");
                }
            }
            "unknown" => {
                return Plan {
                    grammar: Some(4_000),
                    ..plan
                };
            }
            "spin" => loop {
                // A question to the host each time, so that not only the guest's own code is bounded.
                let _ = std::hint::black_box(self.held[0].status());
            },
            "forced" => {
                return Plan {
                    forced: vec![b'9'.into()],
                    ..plan
                };
            }
            // Tokens the sequence never had, and fewer than it had.
            "ahead" => drop(self.held[0].accept(&[b'a'.into(); 3])),
            "behind" => drop(self.held[0].rollback(step.accepted.len() as u32)),
            _ => {}
        }
        plan
    }

    fn choose(&mut self, _: &[Candidate]) -> u32 {
        0
    }
}

galerne_sdk::export_sampler!(Hostile);

fn compile(regex: &str) -> Result<Grammar, String> {
    Grammar::compile(&Source::Regex(regex.to_owned())).map_err(text)
}

fn times(params: &Value) -> usize {
    params["times"].as_u64().unwrap_or(1) as usize
}
