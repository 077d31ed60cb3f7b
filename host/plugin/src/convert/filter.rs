//! Requests, verdicts and channels between the bindings of `galerne:filter` and core.

use galerne_core::chat::{Message, ToolCall, ToolSpec};
use galerne_core::filter::{Channel, FilterRequest, RequestError};

use crate::bindings::filter::exports::galerne::filter::filtering as wit;

/// To the guest.
pub(crate) fn to_guest(request: &FilterRequest) -> wit::Request {
    wit::Request {
        messages: request.messages.iter().map(message_to_guest).collect(),
        tools: request.tools.iter().map(tool_to_guest).collect(),
    }
}

fn message_to_guest(message: &Message) -> wit::Message {
    let call = |call: &ToolCall| wit::ToolCall {
        id: call.id.clone(),
        name: call.name.clone(),
        arguments_json: call.arguments_json.clone(),
    };
    wit::Message {
        role: message.role.clone(),
        content: message.content.clone(),
        tool_calls: message.tool_calls.iter().map(call).collect(),
        tool_call_id: message.tool_call_id.clone(),
    }
}

fn tool_to_guest(tool: &ToolSpec) -> wit::Tool {
    wit::Tool {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters_json: tool.parameters_json.clone(),
    }
}

/// From the guest: a request that can be rendered as well as one from a client.
pub(crate) fn from_guest(request: wit::Request) -> Result<FilterRequest, RequestError> {
    let tool = |tool: wit::Tool| ToolSpec {
        name: tool.name,
        description: tool.description,
        parameters_json: tool.parameters_json,
    };
    let request = FilterRequest {
        messages: request.messages.into_iter().map(message_from_guest).collect(),
        tools: request.tools.into_iter().map(tool).collect(),
    };
    request.check()?;
    Ok(request)
}

fn message_from_guest(message: wit::Message) -> Message {
    let call = |call: wit::ToolCall| ToolCall {
        id: call.id,
        name: call.name,
        arguments_json: call.arguments_json,
    };
    Message {
        role: message.role,
        content: message.content,
        tool_calls: message.tool_calls.into_iter().map(call).collect(),
        tool_call_id: message.tool_call_id,
    }
}

/// To the guest.
pub(crate) fn channel(channel: Channel) -> wit::Channel {
    match channel {
        Channel::Content => wit::Channel::Content,
        Channel::Reasoning => wit::Channel::Reasoning,
        Channel::ToolArguments(call) => wit::Channel::ToolArguments(call),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> FilterRequest {
        let call = ToolCall {
            id: "1".to_owned(),
            name: "add".to_owned(),
            arguments_json: "{\"a\":1}".to_owned(),
        };
        FilterRequest {
            messages: vec![Message {
                role: "assistant".to_owned(),
                content: "hello".to_owned(),
                tool_calls: vec![call],
                tool_call_id: Some("0".to_owned()),
            }],
            tools: vec![ToolSpec {
                name: "add".to_owned(),
                description: "adds".to_owned(),
                parameters_json: "{}".to_owned(),
            }],
        }
    }

    #[test]
    fn nothing_of_a_request_is_lost_on_the_way_in_and_out() {
        assert_eq!(from_guest(to_guest(&request())), Ok(request()));
    }

    #[test]
    fn a_request_without_messages_is_refused() {
        let empty = FilterRequest {
            messages: Vec::new(),
            ..request()
        };
        assert_eq!(from_guest(to_guest(&empty)), Err(RequestError::Empty));
    }

    #[test]
    fn an_unknown_role_is_refused() {
        let mut request = request();
        request.messages[0].role = "root".to_owned();
        assert_eq!(
            from_guest(to_guest(&request)),
            Err(RequestError::Role("root".to_owned()))
        );
    }
}
