//! Reads a chat request's fields. Runs no guest.

use galerne_core::chat::{Message, ToolCall, ToolSpec};
use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::fields::{Fields, short};
use super::super::params::Params;
use super::super::state::{ApiState, Target};

/// A chat request, checked.
pub(super) struct ChatRequest {
    pub(super) params: Params,
    pub(super) messages: Vec<Message>,
    pub(super) tools: Vec<ToolSpec>,
    pub(super) logprobs: Option<u32>,
}

/// Checks every field, and that they go together with each other and with the deployment.
pub(super) fn read(fields: &Fields<'_>, state: &ApiState, target: &Target) -> Result<ChatRequest, ApiError> {
    let params = Params::read(fields, state, target)?;
    let list = fields
        .list("messages")?
        .ok_or_else(|| ApiError::field("messages", "an array", "nothing"))?;
    if list.is_empty() || list.len() > state.limits().messages_max {
        let expected = format!("from 1 to {} messages", state.limits().messages_max);
        return Err(ApiError::field("messages", &expected, list.len()));
    }
    let messages = list
        .iter()
        .enumerate()
        .map(|(index, value)| message(value, &format!("messages[{index}]")))
        .collect::<Result<_, _>>()?;
    let logprobs = match (fields.flag("logprobs")?, fields.integer("top_logprobs", 0, 20)?) {
        (true, top) => Some(u32::try_from(top.unwrap_or(0)).unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::field(
                "top_logprobs",
                "logprobs to be true with it",
                "false",
            ));
        }
    };
    let request = ChatRequest {
        params,
        messages,
        tools: tools(fields)?,
        logprobs,
    };
    let brings_tools = target.live.as_ref().is_some_and(|live| !live.tools.is_empty());
    let format = request.params.format.as_ref();
    if let Some(format) = format.filter(|_| brings_tools || !request.tools.is_empty()) {
        return Err(ApiError::field(
            format.param(),
            "no tools with it, or tool_choice none (an answer that may call tools cannot be kept to a format yet)",
            "both",
        ));
    }
    fits_deployment(&request, target)?;
    Ok(request)
}

/// What a deployment's guests do leaves no place for these fields.
fn fits_deployment(request: &ChatRequest, target: &Target) -> Result<(), ApiError> {
    let Some(live) = &target.live else {
        return Ok(());
    };
    let refuse = |param: &str, why: &str| Err(ApiError::field(param, &format!("nothing ({why})"), "a value"));
    if !live.tools.is_empty() && !request.tools.is_empty() {
        return refuse("tools", "this deployment brings its own tools");
    }
    let written = "this deployment's pipeline writes the answer, from outputs of its own";
    if live.pipeline.is_some() && request.logprobs.is_some() {
        return refuse("logprobs", written);
    }
    if live.pipeline.is_some() && request.params.return_token_ids {
        return refuse("return_token_ids", written);
    }
    // Tokens and their probabilities would show the text that a filter changes or holds back.
    let shown = "this deployment filters its answers, and tokens would show them unfiltered";
    if !live.filters.is_empty() && request.logprobs.is_some() {
        return refuse("logprobs", shown);
    }
    if !live.filters.is_empty() && request.params.return_token_ids {
        return refuse("return_token_ids", shown);
    }
    Ok(())
}

fn message(value: &Value, path: &str) -> Result<Message, ApiError> {
    let fields = Fields::of(value, path)?;
    let role = match fields.required_text("role")? {
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            let expected = "system, developer, user, assistant or tool";
            return Err(ApiError::field(
                format!("{path}.role"),
                expected,
                format!("\"{other}\""),
            ));
        }
    };
    let calls = match fields.list("tool_calls")? {
        None => Vec::new(),
        Some(calls) => calls
            .iter()
            .map(|call| tool_call(call, path))
            .collect::<Result<_, _>>()?,
    };
    let content = match fields.value("content") {
        Some(content) => text_of(content, &format!("{path}.content"))?,
        None if role == "assistant" => String::new(),
        None => return Err(ApiError::field(format!("{path}.content"), "a string", "nothing")),
    };
    Ok(Message {
        role: role.to_owned(),
        content,
        tool_calls: calls,
        tool_call_id: fields.text("tool_call_id")?.map(str::to_owned),
    })
}

/// A string, or parts of which all are text.
fn text_of(content: &Value, path: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text),
                _ => Err(ApiError::field(path, "text parts only", short(&part["type"]))),
            })
            .collect(),
        other => Err(ApiError::field(
            path,
            "a string or an array of text parts",
            short(other),
        )),
    }
}

fn tool_call(value: &Value, path: &str) -> Result<ToolCall, ApiError> {
    let path = format!("{path}.tool_calls");
    let call = Fields::of(value, &path)?;
    let inner = call.value("function").unwrap_or(&Value::Null);
    let path = format!("{path}.function");
    let function = Fields::of(inner, &path)?;
    Ok(ToolCall {
        id: call.text("id")?.unwrap_or_default().to_owned(),
        name: function.required_text("name")?.to_owned(),
        arguments_json: function.text("arguments")?.unwrap_or("{}").to_owned(),
    })
}

fn tools(fields: &Fields<'_>) -> Result<Vec<ToolSpec>, ApiError> {
    let choice = match fields.value("tool_choice") {
        None => "auto",
        Some(Value::String(choice)) if choice == "auto" || choice == "none" => choice,
        Some(other) => {
            return Err(ApiError::field(
                "tool_choice",
                "auto or none (forced calls are not supported yet)",
                short(other),
            ));
        }
    };
    let list = match fields.list("tools")? {
        Some(list) if choice == "auto" => list,
        _ => return Ok(Vec::new()),
    };
    list.iter()
        .map(|tool| {
            let tool = Fields::of(&tool["function"], "tools.function")?;
            let parameters = tool
                .value("parameters")
                .map_or_else(|| json!({"type": "object"}).to_string(), Value::to_string);
            Ok(ToolSpec {
                name: tool.required_text("name")?.to_owned(),
                description: tool.text("description")?.unwrap_or_default().to_owned(),
                parameters_json: parameters,
            })
        })
        .collect()
}
