//! Conversations between the bindings of `galerne:chat` and core.

use galerne_core::chat::{ChatOptions, Delta, Message, Segment, ToolCall, ToolSpec};

use crate::bindings::chat::exports::galerne::chat::format as wit;

/// To the guest.
pub(crate) fn messages(messages: &[Message]) -> Vec<wit::Message> {
    messages
        .iter()
        .map(|message| wit::Message {
            role: message.role.clone(),
            content: message.content.clone(),
            tool_calls: message.tool_calls.iter().map(tool_call).collect(),
            tool_call_id: message.tool_call_id.clone(),
        })
        .collect()
}

fn tool_call(call: &ToolCall) -> wit::ToolCall {
    wit::ToolCall {
        id: call.id.clone(),
        name: call.name.clone(),
        arguments_json: call.arguments_json.clone(),
    }
}

/// To the guest.
pub(crate) fn tools(tools: &[ToolSpec]) -> Vec<wit::Tool> {
    tools
        .iter()
        .map(|tool| wit::Tool {
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters_json: tool.parameters_json.clone(),
        })
        .collect()
}

/// To the guest.
pub(crate) fn options(options: &ChatOptions) -> wit::Options {
    wit::Options {
        add_generation_prompt: options.add_generation_prompt,
        template: options.template.clone(),
    }
}

/// From the guest.
pub(crate) fn segments(segments: Vec<wit::Segment>) -> Vec<Segment> {
    segments
        .into_iter()
        .map(|segment| match segment {
            wit::Segment::Text(text) => Segment::Text(text),
            wit::Segment::Special(name) => Segment::Special(name),
        })
        .collect()
}

/// From the guest.
pub(crate) fn deltas(deltas: Vec<wit::Delta>) -> Vec<Delta> {
    deltas
        .into_iter()
        .map(|delta| match delta {
            wit::Delta::Content(text) => Delta::Content(text),
            wit::Delta::Reasoning(text) => Delta::Reasoning(text),
            wit::Delta::ToolCall(call) => Delta::ToolCall {
                name: call.name,
                arguments_json: call.arguments_json,
            },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_message_is_lost() {
        let message = Message {
            role: "assistant".to_owned(),
            content: "hello".to_owned(),
            tool_calls: vec![ToolCall {
                id: "1".to_owned(),
                name: "add".to_owned(),
                arguments_json: "{\"a\":1}".to_owned(),
            }],
            tool_call_id: Some("0".to_owned()),
        };
        let converted = messages(std::slice::from_ref(&message)).remove(0);
        assert_eq!(
            (converted.role, converted.content),
            (message.role, message.content)
        );
        assert_eq!(converted.tool_call_id, message.tool_call_id);
        let (got, expected) = (&converted.tool_calls[0], &message.tool_calls[0]);
        assert_eq!(
            (&got.id, &got.name, &got.arguments_json),
            (&expected.id, &expected.name, &expected.arguments_json)
        );
    }

    #[test]
    fn text_and_special_stay_apart() {
        let converted = segments(vec![
            wit::Segment::Text("<|x|>".to_owned()),
            wit::Segment::Special("<|x|>".to_owned()),
        ]);
        assert_eq!(
            converted,
            [
                Segment::Text("<|x|>".to_owned()),
                Segment::Special("<|x|>".to_owned())
            ]
        );
    }

    #[test]
    fn deltas_keep_their_kind() {
        let call = wit::CalledTool {
            name: "add".to_owned(),
            arguments_json: "{}".to_owned(),
        };
        let converted = deltas(vec![
            wit::Delta::Content("a".to_owned()),
            wit::Delta::Reasoning("b".to_owned()),
            wit::Delta::ToolCall(call),
        ]);
        assert_eq!(
            converted,
            [
                Delta::Content("a".to_owned()),
                Delta::Reasoning("b".to_owned()),
                Delta::ToolCall {
                    name: "add".to_owned(),
                    arguments_json: "{}".to_owned()
                },
            ]
        );
    }
}
