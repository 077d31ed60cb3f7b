//! A sampler: draws carefully at first and more freely later, by a temperature that rises with the answer's length.

use galerne_sdk::json::Value;
use galerne_sdk::sampling::{Candidate, Plan, SequenceInfo, Session, Step, plain_plan};

/// The state of one sequence.
struct Thaw {
    from: f32,
    to: f32,
    /// Tokens until the temperature has risen.
    over: f32,
}

impl Session for Thaw {
    /// `params` is the table `params` of the sampler in `deployment.toml`, or of `sampler` in the request.
    fn create(params: &Value, _: &SequenceInfo) -> Result<Self, String> {
        let number = |name: &str, default: f64| match &params[name] {
            Value::Null => Ok(default as f32),
            value => match value.as_f64() {
                Some(number) if (0.0..=10_000.0).contains(&number) => Ok(number as f32),
                _ => Err(format!("params.{name}: expected a number from 0 to 10000, got {value}")),
            },
        };
        Ok(Self {
            from: number("from", 0.2)?,
            to: number("to", 1.0)?,
            over: number("over", 64.0)?.max(1.0),
        })
    }

    /// Runs while the model computes. The host draws by the plan, which may also name a grammar (feature `grammar` of
    /// galerne-sdk) and propose tokens: see the guide's page on samplers.
    fn plan(&mut self, step: &Step) -> Plan {
        Plan {
            temperature: self.temperature(step.position),
            top_p: 0.95,
            ..plain_plan()
        }
    }

    /// Only called where a plan asks for candidates, which this one never does.
    fn choose(&mut self, _: &[Candidate]) -> u32 {
        0
    }
}

impl Thaw {
    fn temperature(&self, position: u32) -> f32 {
        let part = (position as f32 / self.over).min(1.0);
        self.from + (self.to - self.from) * part
    }
}

galerne_sdk::export_sampler!(Thaw);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_temperature_rises_and_stays() {
        let thaw = Thaw {
            from: 0.0,
            to: 1.0,
            over: 10.0,
        };
        assert_eq!([0, 5, 10, 99].map(|position| thaw.temperature(position)), [0.0, 0.5, 1.0, 1.0]);
    }
}
