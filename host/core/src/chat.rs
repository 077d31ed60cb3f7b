//! Conversations as plain data: messages in, segments to tokenize, deltas out.

use serde::{Deserialize, Serialize};

use crate::guest::GuestError;

/// A tool call the model made, or made earlier in the conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The caller's id for it.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// A JSON object.
    pub arguments_json: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Plain text.
    pub content: String,
    /// Calls an assistant message made.
    pub tool_calls: Vec<ToolCall>,
    /// The call a tool message answers.
    pub tool_call_id: Option<String>,
}

/// A function the model may call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolSpec {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: String,
    /// A JSON schema of its arguments.
    pub parameters_json: String,
}

/// What a chat format needs to know beside the messages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatOptions {
    /// Whether the prompt ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// The model's own template text, from its tokenizer configuration; formats may read defaults from it.
    pub template: Option<String>,
}

/// A piece of a rendered prompt. Text never becomes a special token, whatever it spells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Segment {
    /// Tokenized as ordinary text.
    Text(String),
    /// One special token by its exact name, for example `<|im_start|>`.
    Special(String),
}

/// A piece of a parsed answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Delta {
    /// Text for the reader.
    Content(String),
    /// Text of the model's reasoning.
    Reasoning(String),
    /// A complete tool call.
    ToolCall {
        /// The function's name.
        name: String,
        /// A JSON object.
        arguments_json: String,
    },
}

/// Why a chat format failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
pub enum ChatError {
    /// The messages cannot be rendered: the caller's mistake.
    #[error("messages cannot be rendered: {0}")]
    Messages(String),
    /// The guest failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
}
