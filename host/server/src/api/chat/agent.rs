//! The agent loop of a deployment with tools: the model asks, the host calls, the model goes on. Calls block.

use std::sync::Arc;

use galerne_core::chat::{Delta, Message, ToolCall};
use galerne_core::filter::RequestInfo;
use serde_json::{Value, json};

use super::super::error::ApiError;
use super::tools::ToolCalls;
use crate::deployments::Live;

/// One call of a tool by the host, as the client is told.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HostCall {
    name: String,
    arguments_json: String,
    outcome: Result<String, String>,
}

impl HostCall {
    pub(super) fn to_json(&self) -> Value {
        let mut value = json!({"name": self.name, "arguments": self.arguments_json});
        match &self.outcome {
            Ok(result) => value["result"] = json!(result),
            Err(error) => value["error"] = json!(error),
        }
        value
    }
}

/// A call the model asked for in the turn that runs.
struct Wanted {
    /// As the model wrote it: it goes back to the model so.
    call: ToolCall,
    /// With the arguments the filters let out.
    arguments_json: String,
}

/// The conversation between model and tools within one request.
pub(super) struct Agent {
    tools: ToolCalls,
    messages: Vec<Message>,
    /// What the model says in the turn that runs.
    said: String,
    wanted: Vec<Wanted>,
    /// Turns that began.
    turns: u32,
}

impl Agent {
    /// The loop for a deployment with tools; `messages` are what the model sees first.
    pub(super) fn new(live: &Arc<Live>, info: RequestInfo, messages: Vec<Message>) -> Option<Self> {
        (!live.tools.is_empty()).then(|| Self {
            tools: ToolCalls::new(live, info),
            messages,
            said: String::new(),
            wanted: Vec::new(),
            turns: 1,
        })
    }

    /// Notes what the model said, before any filter.
    pub(super) fn hear(&mut self, delta: &Delta) {
        match delta {
            Delta::Content(text) => self.said.push_str(text),
            Delta::Reasoning(_) => {}
            Delta::ToolCall { name, arguments_json } => self.wanted.push(Wanted {
                call: ToolCall {
                    id: format!("{}-{}-{}", self.tools.request_id(), self.turns, self.wanted.len()),
                    name: name.clone(),
                    arguments_json: arguments_json.clone(),
                },
                arguments_json: String::new(),
            }),
        }
    }

    /// The last call heard is to be made with these arguments.
    pub(super) fn filtered(&mut self, arguments_json: String) {
        if let Some(wanted) = self.wanted.last_mut() {
            wanted.arguments_json = arguments_json;
        }
    }

    /// Whether the turn that ended asks for calls.
    pub(super) fn is_asked(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// Makes the calls and adds them to the conversation, which the model goes on with.
    ///
    /// # Errors
    /// The model may not answer once more in this request.
    pub(super) fn call(&mut self) -> Result<Vec<HostCall>, ApiError> {
        let limit = self.tools.live().published.deployment.limits.agent_steps_max;
        if self.turns >= limit {
            return Err(ApiError::invalid(format!(
                "the model still asks for tools after {limit} answers; limits.agent_steps_max of deployment \
                 \"{}\" can be raised by whoever deploys it",
                self.tools.live().published.deployment.name
            )));
        }
        self.turns += 1;
        let wanted = std::mem::take(&mut self.wanted);
        self.messages.push(Message {
            role: "assistant".to_owned(),
            content: std::mem::take(&mut self.said),
            tool_calls: wanted.iter().map(|wanted| wanted.call.clone()).collect(),
            tool_call_id: None,
        });
        let mut calls = Vec::new();
        for wanted in wanted {
            let outcome = self.tools.call(&wanted.call.name, &wanted.arguments_json);
            let content = match &outcome {
                Ok(result) => result.clone(),
                Err(error) => format!("error: {error}"),
            };
            self.messages.push(Message {
                role: "tool".to_owned(),
                content,
                tool_calls: Vec::new(),
                tool_call_id: Some(wanted.call.id),
            });
            calls.push(HostCall {
                name: wanted.call.name,
                arguments_json: wanted.arguments_json,
                outcome,
            });
        }
        Ok(calls)
    }

    /// What the model sees next.
    pub(super) fn messages(&self) -> &[Message] {
        &self.messages
    }
}
