//! What tools answer, as plain data. Knows no guest runtime and no agent loop.

use crate::guest::GuestError;

/// Bytes of a tool's name, as the common APIs have it.
const NAME_BYTES_MAX: usize = 64;

/// Why a tool's call has no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error, serde::Serialize, serde::Deserialize)]
pub enum ToolError {
    /// The arguments do not fit, in words for the model: it may try again.
    #[error("{0}")]
    Arguments(String),
    /// The tool could not do it, in words for the model.
    #[error("{0}")]
    Failed(String),
    /// The guest broke its contract or a limit.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// Whether a tool may have this name: 1 to 64 of letters, digits, `_` and `-`.
#[must_use]
pub fn is_tool_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_common_apis() {
        for good in ["add", "http-get", "_", "A1", &"x".repeat(64)] {
            assert!(is_tool_name(good), "{good}");
        }
        for bad in ["", "two words", "é", "a.b", "a\n", &"x".repeat(65)] {
            assert!(!is_tool_name(bad), "{bad}");
        }
    }
}
