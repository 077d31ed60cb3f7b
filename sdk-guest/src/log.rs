//! The capability `galerne:log`: lines for the log of the deployment.

/// Generated from `wit/log`.
#[allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod bindings {
    wit_bindgen::generate!({
        world: "imports",
        path: "../wit/log/0.1.0",
    });
}

pub use bindings::galerne::log::logging::Level;

use bindings::galerne::log::logging::log;

/// A line for whoever looks for a mistake.
pub fn debug(message: &str) {
    log(Level::Debug, message);
}

/// A line worth knowing.
pub fn info(message: &str) {
    log(Level::Info, message);
}

/// A line about something that should not be.
pub fn warn(message: &str) {
    log(Level::Warn, message);
}

/// A line about something that failed.
pub fn error(message: &str) {
    log(Level::Error, message);
}
