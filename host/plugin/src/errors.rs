//! Errors of this crate, and how the runtime's errors become a [`GuestError`]. The only place that reads them.

use std::path::PathBuf;
use std::time::Duration;

use galerne_core::guest::GuestError;
use galerne_core::limits::Allowance;
use wasmtime::{PoolConcurrencyLimitError, Trap};

use crate::capability::asking::OverLimit;
use crate::limiter::Denied;

/// Bytes of a reason kept: enough for any message of the runtime, and no more of what a guest can influence.
const REASON_BYTES_MAX: usize = 400;

/// Why the plugin host cannot start.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The runtime refused its settings, or the address space for the instance pool could not be reserved.
    #[error(
        "start the guest runtime with {instances_max} instances: {reason}; lower instances_max if memory cannot be reserved"
    )]
    Runtime {
        /// Instances the pool was to hold.
        instances_max: u32,
        /// The runtime's description.
        reason: String,
    },
    /// The operating system refused a thread.
    #[error("start a guest thread: {0}")]
    Thread(#[from] std::io::Error),
    /// Processes for guests need a program to run in them.
    #[error("plugin options: isolation in processes needs worker, the program to start")]
    NoWorker,
    /// What a cell counts does not reach this process.
    #[error(
        "plugin options: fuel is counted in this process only; with count_fuel, isolation must be in-process"
    )]
    FuelInCells,
    /// The folder of compiled guests cannot be used.
    #[error("use the folder of compiled guests {}: {source}", .folder.display())]
    Artifacts {
        /// The folder.
        folder: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Others may read or write the folder of compiled guests, whose files are run.
    #[error(
        "the folder of compiled guests {} must belong to this user alone, its mode is {mode:o}; chmod 700 it or remove it",
        .folder.display()
    )]
    ArtifactsOpen {
        /// The folder.
        folder: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// An option outside its range.
    #[error("plugin options: {option} must be {expected}, got {got}")]
    Option {
        /// The field.
        option: &'static str,
        /// What is accepted.
        expected: &'static str,
        /// What came.
        got: usize,
    },
}

/// What was being done when the runtime failed: everything an error message needs.
pub(crate) struct CallContext<'a> {
    /// The guest's name.
    pub(crate) guest: &'a str,
    /// The called function.
    pub(crate) call: &'static str,
    /// The deadline the call had.
    pub(crate) limit: Duration,
    /// The limits the call had.
    pub(crate) allowance: &'a Allowance,
    /// A growth that was denied during the call.
    pub(crate) denied: Option<Denied>,
}

impl CallContext<'_> {
    /// The typed error for a failed call.
    pub(crate) fn error(&self, error: &wasmtime::Error) -> GuestError {
        if matches!(error.downcast_ref::<Trap>(), Some(Trap::Interrupt)) {
            return GuestError::Deadline {
                guest: self.guest.to_owned(),
                call: self.call.into(),
                limit_ms: u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX),
                raise: self.allowance.who(deadline_name(self.call)),
            };
        }
        match self.exceeded(error) {
            Some(limit) => GuestError::Limit {
                guest: self.guest.to_owned(),
                call: self.call.into(),
                limit,
            },
            None => GuestError::Trap {
                guest: self.guest.to_owned(),
                call: self.call.into(),
                reason: reason(error),
            },
        }
    }

    /// Which limit stands behind the error, if one does.
    fn exceeded(&self, error: &wasmtime::Error) -> Option<String> {
        if let Some(denied) = &self.denied {
            return Some(format!("{denied} ({})", self.allowance.who(denied.name())));
        }
        if let Some(OverLimit(limit)) = error.downcast_ref() {
            return Some(limit.clone());
        }
        if error.downcast_ref::<PoolConcurrencyLimitError>().is_some() {
            return Some(format!(
                "all instances of this host are in use ({}); try again later",
                reason(error)
            ));
        }
        // These errors have no public type; their words are pinned by tests in tests/hostile.rs.
        let text = error.root_cause().to_string();
        if text.contains("fuel allocated for hostcalls has been exhausted") {
            return Some(format!(
                "a call may pass at most {} bytes to the host ({})",
                self.allowance.limits.guest.call_alloc_bytes_max,
                self.allowance.who("call_alloc_bytes_max")
            ));
        }
        if text.contains("store handle limit exceeded") {
            return Some(format!(
                "at most {} live resource handles ({})",
                self.allowance.limits.guest.handles_max,
                self.allowance.who("handles_max")
            ));
        }
        text.starts_with("resource limit exceeded").then_some(text)
    }
}

/// The limit on a call's time, by the call's name.
pub(crate) fn deadline_name(call: &str) -> &'static str {
    match call {
        "plan" | "choose" | "push" | "on-text" | "finish" => "step_ms_max",
        "call" => "tool_ms_max",
        "run" => "pipeline_ms_max",
        "build" => "build_deadline",
        _ => "request_ms_max",
    }
}

/// The cause in one bounded line, without a backtrace.
pub(crate) fn reason(error: &wasmtime::Error) -> String {
    let text = match error.downcast_ref::<Trap>() {
        // Guests carry no messages of their panics out.
        Some(Trap::UnreachableCodeReached) => {
            format!(
                "{}; a panic in the guest looks like this",
                Trap::UnreachableCodeReached
            )
        }
        Some(trap) => trap.to_string(),
        None => error.root_cause().to_string(),
    };
    bounded(&text)
}

/// All causes in one bounded line: for linking, where the outer messages name the import or export.
pub(crate) fn reasons(error: &wasmtime::Error) -> String {
    bounded(
        &error
            .chain()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(": "),
    )
}

/// `text` as one line of bounded length.
pub(crate) fn bounded(text: &str) -> String {
    let mut line = text.replace(['\n', '\r'], " ");
    if line.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX)
            .rev()
            .find(|&end| line.is_char_boundary(end))
            .unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_bounded_line() {
        let long = bounded(&"é\n".repeat(1_000));
        assert!(long.len() <= REASON_BYTES_MAX + '…'.len_utf8());
        assert!(!long.contains('\n'));
    }
}
