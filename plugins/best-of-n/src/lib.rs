//! A pipeline that draws several answers beside each other and gives the one the model itself finds likeliest, by the mean
//! log-probability of its tokens.
//!
//! Parameters: `n`, from 2 to 16 answers, 4 if left out; `temperature`, instead of what the client asked.

use galerne_sdk::json::{Value, json};
use galerne_sdk::pipeline::{
    Context, Delta, Finish, Options, Output, OutputFinish, Pipeline, Refusal, Request, RequestInfo, as_asked,
    at_temperature, emit, emit_event, refusal, sample,
};

struct BestOfN;

impl Pipeline for BestOfN {
    fn run(params: &Value, _: &RequestInfo, request: Request) -> Result<Finish, Refusal> {
        let (n, temperature) = read(params).map_err(|reason| Refusal { status: 500, reason })?;
        let context = Context::from_messages(&request.messages, &request.tools).map_err(refusal)?;
        let options = Options {
            plan: temperature.map(at_temperature),
            logprobs: true,
            ..as_asked()
        };
        let outputs = sample(&context, n, &options).map_err(refusal)?;
        let scores: Vec<f64> = outputs.iter().map(Output::mean_logprob).collect();
        let best = best(&scores);
        // A client that does not know the event loses nothing.
        let _ = emit_event(
            "best-of-n",
            &json!({"chosen": best, "mean_logprobs": scores}).to_string(),
        );
        let chosen = &outputs[best];
        if !chosen.reasoning.is_empty() {
            emit(&Delta::Reasoning(chosen.reasoning.clone()));
        }
        emit(&Delta::Content(chosen.content.clone()));
        for call in &chosen.calls {
            emit(&Delta::Call(call.clone()));
        }
        Ok(match (chosen.calls.is_empty(), chosen.outcome.finish) {
            (false, _) => Finish::ToolCalls,
            (true, OutputFinish::Stop) => Finish::Stop,
            (true, OutputFinish::Length) => Finish::Length,
        })
    }
}

galerne_sdk::export_pipeline!(BestOfN);

/// The place of the highest score, the first of equals.
fn best(scores: &[f64]) -> usize {
    let mut best = 0;
    for (place, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = place;
        }
    }
    best
}

/// How many answers, and at which temperature if not as the client asked.
fn read(params: &Value) -> Result<(u32, Option<f32>), String> {
    let known = ["n", "temperature"];
    let fields = params.as_object().ok_or("params: expected an object")?;
    if let Some(field) = fields.keys().find(|field| !known.contains(&field.as_str())) {
        return Err(format!(
            "params: best-of-n has no \"{field}\"; it has {}",
            known.join(", ")
        ));
    }
    let n = match fields.get("n") {
        None => 4,
        Some(n) => n
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| (2..=16).contains(n))
            .ok_or_else(|| format!("params.n: expected from 2 to 16, got {n}"))?,
    };
    let temperature = match fields.get("temperature") {
        None => None,
        Some(value) => {
            let in_range = value.as_f64().filter(|t| (0.0..=2.0).contains(t));
            let t =
                in_range.ok_or_else(|| format!("params.temperature: expected from 0 to 2, got {value}"))?;
            Some(t as f32)
        }
    };
    Ok((n, temperature))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_best_is_chosen() {
        assert_eq!(best(&[-2.0, -1.0, -1.0]), 1);
        assert_eq!(best(&[f64::NEG_INFINITY, -9.0]), 1);
        assert_eq!(best(&[f64::NEG_INFINITY]), 0);
    }

    #[test]
    fn parameters_are_checked() {
        assert_eq!(read(&json!({})), Ok((4, None)));
        assert_eq!(read(&json!({"n": 2, "temperature": 0.5})), Ok((2, Some(0.5))));
        for bad in [
            json!({"n": 1}),
            json!({"n": "4"}),
            json!({"m": 4}),
            json!({"temperature": 3}),
            json!([]),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
