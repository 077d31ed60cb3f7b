//! A pipeline: drafts an answer, lets the model look it over as often as the deployment says, and gives the last version.

use galerne_sdk::json::{Value, json};
use galerne_sdk::pipeline::{
    Context, Delta, Error, Finish, Message, Output, OutputFinish, Pipeline, Refusal, Request, RequestInfo, as_asked,
    collect, emit, emit_event, refusal,
};

struct SecondThoughts;

const CHECK: &str = "Look over your answer. Give it again, with mistakes mended and nothing said about them.";

impl Pipeline for SecondThoughts {
    fn run(params: &Value, _: &RequestInfo, request: Request) -> Result<Finish, Refusal> {
        let checks = checks(params).map_err(|reason| Refusal { status: 500, reason })?;
        let mut messages = request.messages;
        for round in 0..checks {
            let draft = answer(&messages, |_| ()).map_err(refusal)?;
            // The client may show that something happens.
            emit_event("draft", &json!({"round": round}).to_string()).map_err(refusal)?;
            messages.push(message("assistant", &draft.content));
            messages.push(message("user", CHECK));
        }
        let last = answer(&messages, emit).map_err(refusal)?;
        Ok(match last.outcome.finish {
            OutputFinish::Stop => Finish::Stop,
            OutputFinish::Length => Finish::Length,
        })
    }
}

/// The model's answer; `each` sees its parts as they come.
fn answer(messages: &[Message], each: impl FnMut(&Delta)) -> Result<Output, Error> {
    let context = Context::from_messages(messages, &[])?;
    let generation = context.generate(&as_asked())?;
    collect(&generation, each)
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.to_owned(),
        content: content.to_owned(),
        tool_calls: Vec::new(),
        tool_call_id: None,
    }
}

/// How often the model looks its answer over.
fn checks(params: &Value) -> Result<u64, String> {
    let checks = &params["checks"];
    checks
        .as_u64()
        .filter(|checks| (1..=4).contains(checks))
        .ok_or_else(|| format!("params.checks: expected from 1 to 4, got {checks}"))
}

galerne_sdk::export_pipeline!(SecondThoughts);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked() {
        assert_eq!(checks(&json!({"checks": 2})), Ok(2));
        assert!(checks(&json!({})).is_err() && checks(&json!({"checks": 9})).is_err());
    }
}
