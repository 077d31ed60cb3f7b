//! A pipeline that draws several answers beside each other and gives one of those that most agree on
//! (Wang et al. 2022, arXiv 2203.11171).
//!
//! Parameters: `n`, from 2 to 16 answers, 5 if left out; `answer`, what is compared: `number` (the last number, the default),
//! `line` (the last line) or `whole`; `temperature`, instead of what the client asked.

mod answer;

use galerne_sdk::json::{Value, json};
use galerne_sdk::pipeline::{
    Context, Delta, Finish, Options, Output, OutputFinish, Pipeline, Refusal, Request, RequestInfo, as_asked,
    at_temperature, emit, emit_event, refusal, sample,
};

use answer::Part;

struct SelfConsistency;

impl Pipeline for SelfConsistency {
    fn run(params: &Value, _: &RequestInfo, request: Request) -> Result<Finish, Refusal> {
        let params = Params::read(params).map_err(|reason| Refusal { status: 500, reason })?;
        let context = Context::from_messages(&request.messages, &[]).map_err(refusal)?;
        let options = Options {
            plan: params.temperature.map(at_temperature),
            logprobs: true,
            ..as_asked()
        };
        let outputs = sample(&context, params.n, &options).map_err(refusal)?;
        let answers: Vec<Option<String>> = outputs
            .iter()
            .map(|output| params.part.of(&output.content))
            .collect();
        let scores: Vec<f64> = outputs.iter().map(Output::mean_logprob).collect();
        let (chosen, votes) = elect(&answers, &scores);
        let event = json!({"answer": answers[chosen], "votes": votes, "of": outputs.len()});
        // A client that does not know the event loses nothing.
        let _ = emit_event("self-consistency", &event.to_string());
        emit(&Delta::Content(outputs[chosen].content.clone()));
        Ok(match outputs[chosen].outcome.finish {
            OutputFinish::Stop => Finish::Stop,
            OutputFinish::Length => Finish::Length,
        })
    }
}

galerne_sdk::export_pipeline!(SelfConsistency);

/// The place of an answer with the most votes, and how many it has. Among equals the likeliest wins; an output without an
/// answer has no vote, and is chosen only where no output has one.
fn elect(answers: &[Option<String>], scores: &[f64]) -> (usize, usize) {
    let votes = |answer: &Option<String>| match answer {
        None => 0,
        Some(_) => answers.iter().filter(|other| *other == answer).count(),
    };
    let mut chosen = (0, votes(&answers[0]));
    for (place, answer) in answers.iter().enumerate().skip(1) {
        let got = votes(answer);
        if got > chosen.1 || (got == chosen.1 && scores[place] > scores[chosen.0]) {
            chosen = (place, got);
        }
    }
    chosen
}

#[derive(Debug, PartialEq)]
struct Params {
    n: u32,
    part: Part,
    temperature: Option<f32>,
}

impl Params {
    fn read(params: &Value) -> Result<Self, String> {
        let known = ["n", "answer", "temperature"];
        let fields = params.as_object().ok_or("params: expected an object")?;
        if let Some(field) = fields.keys().find(|field| !known.contains(&field.as_str())) {
            let known = known.join(", ");
            return Err(format!(
                "params: self-consistency has no \"{field}\"; it has {known}"
            ));
        }
        let mut read = Self {
            n: 5,
            part: Part::Number,
            temperature: None,
        };
        if let Some(n) = fields.get("n") {
            let in_range = n.as_u64().and_then(|n| u32::try_from(n).ok());
            read.n = in_range
                .filter(|n| (2..=16).contains(n))
                .ok_or_else(|| format!("params.n: expected from 2 to 16, got {n}"))?;
        }
        if let Some(part) = fields.get("answer") {
            read.part = part
                .as_str()
                .and_then(Part::named)
                .ok_or_else(|| format!("params.answer: expected number, line or whole, got {part}"))?;
        }
        if let Some(value) = fields.get("temperature") {
            let in_range = value.as_f64().filter(|t| (0.0..=2.0).contains(t));
            let t =
                in_range.ok_or_else(|| format!("params.temperature: expected from 0 to 2, got {value}"))?;
            read.temperature = Some(t as f32);
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(answers: &[&str]) -> Vec<Option<String>> {
        let answer = |text: &&str| (!text.is_empty()).then(|| (*text).to_owned());
        answers.iter().map(answer).collect()
    }

    #[test]
    fn the_majority_wins_and_its_likeliest_output_is_given() {
        let scores = [-1.0, -3.0, -2.0, -0.1];
        assert_eq!(elect(&answers(&["7", "8", "8", "9"]), &scores), (2, 2));
        assert_eq!(elect(&answers(&["7", "8", "9", "6"]), &scores), (3, 1));
        assert_eq!(elect(&answers(&["", "8", "", ""]), &scores), (1, 1));
        assert_eq!(elect(&answers(&["", "", "", ""]), &scores), (3, 0));
    }

    #[test]
    fn parameters_are_checked() {
        let read = Params::read(&json!({"n": 3, "answer": "line", "temperature": 1}));
        let expected = Params {
            n: 3,
            part: Part::Line,
            temperature: Some(1.0),
        };
        assert_eq!(read, Ok(expected));
        for bad in [
            json!({"n": 17}),
            json!({"answer": "word"}),
            json!({"k": 1}),
            json!({"temperature": -1}),
        ] {
            assert!(Params::read(&bad).is_err(), "{bad}");
        }
    }
}
