//! Messages, options, deltas and outcomes between the bindings of `galerne:pipeline` and core. Checks nothing: whoever
//! answers a pipeline's questions does.

use galerne_core::chat::{Delta, Message, ToolCall, ToolSpec};
use galerne_core::grammar::GrammarText;
use galerne_core::pipeline::{GenerateOptions, Outcome, OutputFinish, PipelineFinish};
use galerne_core::sampling::SamplingPlan;

use crate::bindings::pipeline::exports::galerne::pipeline::pipelines;
use crate::bindings::pipeline::galerne::pipeline::inference as wit;

/// To the guest.
pub(crate) fn message_to_guest(message: Message) -> wit::Message {
    let call = |call: ToolCall| wit::ToolCall {
        id: call.id,
        name: call.name,
        arguments_json: call.arguments_json,
    };
    wit::Message {
        role: message.role,
        content: message.content,
        tool_calls: message.tool_calls.into_iter().map(call).collect(),
        tool_call_id: message.tool_call_id,
    }
}

/// From the guest.
pub(crate) fn message_from_guest(message: wit::Message) -> Message {
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
pub(crate) fn tool_to_guest(tool: ToolSpec) -> wit::Tool {
    wit::Tool {
        name: tool.name,
        description: tool.description,
        parameters_json: tool.parameters_json,
    }
}

/// From the guest.
pub(crate) fn tool_from_guest(tool: wit::Tool) -> ToolSpec {
    ToolSpec {
        name: tool.name,
        description: tool.description,
        parameters_json: tool.parameters_json,
    }
}

/// From the guest.
pub(crate) fn options_from_guest(options: wit::Options) -> GenerateOptions {
    let plan = |plan: wit::Plan| SamplingPlan {
        temperature: plan.temperature,
        top_k: plan.top_k,
        top_p: plan.top_p,
        min_p: plan.min_p,
        repetition_penalty: plan.repetition_penalty,
        frequency_penalty: plan.frequency_penalty,
        presence_penalty: plan.presence_penalty,
        ..SamplingPlan::default()
    };
    GenerateOptions {
        tokens_max: options.tokens_max,
        stop: options.stop,
        plan: options.plan.map(plan),
        grammar: options.grammar.map(|grammar| match grammar {
            wit::Grammar::JsonSchema(text) => GrammarText::JsonSchema(text),
            wit::Grammar::Regex(text) => GrammarText::Regex(text),
            wit::Grammar::Lark(text) => GrammarText::Lark(text),
        }),
        seed: options.seed,
        logprobs: options.logprobs,
    }
}

/// To the guest.
pub(crate) fn delta_to_guest(delta: Delta) -> wit::Delta {
    match delta {
        Delta::Content(text) => wit::Delta::Content(text),
        Delta::Reasoning(text) => wit::Delta::Reasoning(text),
        Delta::ToolCall { name, arguments_json } => {
            wit::Delta::Call(wit::FunctionCall { name, arguments_json })
        }
    }
}

/// From the guest.
pub(crate) fn delta_from_guest(delta: wit::Delta) -> Delta {
    match delta {
        wit::Delta::Content(text) => Delta::Content(text),
        wit::Delta::Reasoning(text) => Delta::Reasoning(text),
        wit::Delta::Call(wit::FunctionCall { name, arguments_json }) => {
            Delta::ToolCall { name, arguments_json }
        }
    }
}

/// To the guest.
pub(crate) fn outcome_to_guest(outcome: &Outcome) -> wit::Outcome {
    wit::Outcome {
        finish: match outcome.finish {
            OutputFinish::Stop => wit::Finish::Stop,
            OutputFinish::Length => wit::Finish::Length,
        },
        tokens: outcome.tokens,
        logprob: outcome.logprob,
    }
}

/// From the guest.
pub(crate) fn finish_from_guest(finish: pipelines::Finish) -> PipelineFinish {
    match finish {
        pipelines::Finish::Stop => PipelineFinish::Stop,
        pipelines::Finish::Length => PipelineFinish::Length,
        pipelines::Finish::ToolCalls => PipelineFinish::ToolCalls,
    }
}
