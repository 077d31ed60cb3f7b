//! Lines of guests' logs as plain data. Keeps none.

use serde::{Deserialize, Serialize};

/// How much a log line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// For whoever looks for a mistake.
    Debug,
    /// Worth knowing.
    Info,
    /// Something that should not be.
    Warn,
    /// Something failed.
    Error,
}

impl std::fmt::Display for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        })
    }
}

/// A line of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// From 1, in the order in which the guests of a deployment wrote since the host started. What is missing in between was
    /// dropped, because too many came within a second, or is no longer kept.
    pub number: u64,
    /// When it was written, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// How much it matters.
    pub level: LogLevel,
    /// Which guest wrote it.
    pub guest: String,
    /// For which request.
    pub request: String,
    /// One line, escaped and cut: nothing in it moves a terminal's cursor or passes for another line.
    pub text: String,
}

/// The newest lines of a deployment's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogTail {
    /// Oldest first.
    pub lines: Vec<LogLine>,
    /// The number of the last line that was written, kept or not; 0 if none was.
    pub last: u64,
}
