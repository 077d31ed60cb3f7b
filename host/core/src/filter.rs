//! What filters see and say, as plain data: requests, verdicts, the channels of an answer. Knows no guest runtime.

use serde::{Deserialize, Serialize};

use crate::chat::{Message, ToolSpec};
use crate::guest::GuestError;

/// The roles a message may have.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// What a filter's session knows of the request it serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestInfo {
    /// The request's id, as the client sees it in the answer.
    pub id: String,
    /// The name of the model, or deployment, the client asked for.
    pub model: String,
}

/// What the model is to see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterRequest {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// Functions the model may call.
    pub tools: Vec<ToolSpec>,
}

/// A request from a guest that cannot go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It has no messages.
    #[error("a request without messages")]
    Empty,
    /// A message has a role nobody knows.
    #[error("a message with the role \"{0}\"")]
    Role(String),
}

impl RequestError {
    /// What a request must be instead.
    pub const EXPECTED: &str = "at least one message, each with the role system, user, assistant or tool";
}

impl FilterRequest {
    /// Whether it can be rendered as well as one from a client.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self) -> Result<(), RequestError> {
        if self.messages.is_empty() {
            return Err(RequestError::Empty);
        }
        let unknown = |message: &&Message| !ROLES.contains(&message.role.as_str());
        match self.messages.iter().find(unknown) {
            Some(message) => Err(RequestError::Role(message.role.clone())),
            None => Ok(()),
        }
    }
}

/// What becomes of a request that is not refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It goes on as it is.
    Pass,
    /// This goes on in its place; it has a message at least, and each has a known role.
    Rewrite(FilterRequest),
}

/// A filter's or pipeline's refusal of a request or of an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("guest \"{guest}\" refused with status {status}: {reason}")]
pub struct Refusal {
    /// The guest's name.
    pub guest: String,
    /// The HTTP status, [`STATUS_MIN`](Self::STATUS_MIN) to [`STATUS_MAX`](Self::STATUS_MAX).
    pub status: u16,
    /// In the guest's words, one bounded line.
    pub reason: String,
}

impl Refusal {
    /// The lowest status a refusal may have.
    pub const STATUS_MIN: u16 = 400;
    /// The highest status a refusal may have.
    pub const STATUS_MAX: u16 = 599;
}

/// A stream of text within an answer. Channels advance independently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// Text for the reader.
    Content,
    /// Text of the model's reasoning.
    Reasoning,
    /// The arguments of one tool call, JSON as text; the first call of an answer is 0.
    ToolArguments(u32),
}

/// Why a request or its answer cannot go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
pub enum FilterError {
    /// The filter does not let it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The filter failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
}
