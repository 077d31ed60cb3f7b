//! A pipeline that lets the model call the deployment's tools until it has an answer, and shows its text as it comes.
//!
//! Parameters: `steps`, how often the model may answer, from 1 to 32, 8 if left out; `system`, a message before the
//! client's own.

use galerne_sdk::json::{Value, json};
use galerne_sdk::pipeline::Delta;
use galerne_sdk::pipeline::{
    Context, Finish, Message, Output, OutputFinish, Pipeline, Refusal, Request, RequestInfo, ToolCall,
    as_asked, call_tool, collect, emit, emit_event, refusal,
};

struct Agent;

impl Pipeline for Agent {
    fn run(params: &Value, info: &RequestInfo, request: Request) -> Result<Finish, Refusal> {
        let (steps, system) = read(params).map_err(|reason| Refusal { status: 500, reason })?;
        let mut messages = request.messages;
        if let Some(system) = system {
            messages.insert(0, message("system", system));
        }
        for step in 0..steps {
            // The beginning is the same each time, and found in the cache.
            let context = Context::from_messages(&messages, &request.tools).map_err(refusal)?;
            let generation = context.generate(&as_asked()).map_err(refusal)?;
            let output = collect(&generation, |delta| {
                if !matches!(delta, Delta::Call(_)) {
                    emit(delta);
                }
            })
            .map_err(refusal)?;
            match output.outcome.finish {
                OutputFinish::Length => return Ok(Finish::Length),
                OutputFinish::Stop if output.calls.is_empty() => return Ok(Finish::Stop),
                OutputFinish::Stop => call_all(&mut messages, output, &format!("{}-{step}", info.id)),
            }
        }
        Err(Refusal {
            status: 500,
            reason: format!(
                "the model still asks for tools after {steps} answers (params.steps of the pipeline)"
            ),
        })
    }
}

galerne_sdk::export_pipeline!(Agent);

fn message(role: &str, content: String) -> Message {
    Message {
        role: role.to_owned(),
        content,
        tool_calls: Vec::new(),
        tool_call_id: None,
    }
}

/// Makes the calls, and adds them and what came of them to the conversation.
fn call_all(messages: &mut Vec<Message>, output: Output, id: &str) {
    let ids = (0..).map(|number| format!("{id}-{number}"));
    let calls: Vec<ToolCall> = output
        .calls
        .into_iter()
        .zip(ids)
        .map(|(call, id)| ToolCall {
            id,
            name: call.name,
            arguments_json: call.arguments_json,
        })
        .collect();
    messages.push(Message {
        tool_calls: calls.clone(),
        ..message("assistant", output.content)
    });
    for call in calls {
        let result = call_tool(&call.name, &call.arguments_json);
        let mut event = json!({"name": call.name, "arguments": call.arguments_json});
        let content = match result {
            Ok(text) => {
                event["result"] = json!(text);
                text
            }
            Err(text) => {
                event["error"] = json!(text);
                format!("error: {text}")
            }
        };
        // A long result makes a long event, which may be refused: the answer goes on all the same.
        let _ = emit_event("tool-call", &event.to_string());
        messages.push(Message {
            tool_call_id: Some(call.id),
            ..message("tool", content)
        });
    }
}

/// How many answers, and what is said first.
fn read(params: &Value) -> Result<(u32, Option<String>), String> {
    let known = ["steps", "system"];
    let fields = params.as_object().ok_or("params: expected an object")?;
    if let Some(field) = fields.keys().find(|field| !known.contains(&field.as_str())) {
        return Err(format!(
            "params: agent has no \"{field}\"; it has {}",
            known.join(", ")
        ));
    }
    let steps = match fields.get("steps") {
        None => 8,
        Some(steps) => steps
            .as_u64()
            .and_then(|steps| u32::try_from(steps).ok())
            .filter(|steps| (1..=32).contains(steps))
            .ok_or_else(|| format!("params.steps: expected from 1 to 32, got {steps}"))?,
    };
    let system = match fields.get("system") {
        None => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(other) => return Err(format!("params.system: expected a text, got {other}")),
    };
    Ok((steps, system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked() {
        assert_eq!(read(&json!({})), Ok((8, None)));
        let read_both = read(&json!({"steps": 2, "system": "be brief"}));
        assert_eq!(read_both, Ok((2, Some("be brief".to_owned()))));
        for bad in [
            json!({"steps": 0}),
            json!({"system": 1}),
            json!({"step": 1}),
            json!(null),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
