//! The capability `galerne:secrets`: values nobody else may see.

/// Generated from `wit/secrets`.
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
        path: "../wit/secrets/0.1.0",
    });
}

pub use bindings::galerne::secrets::vault::{Error, get};

/// What went wrong, in the host's words.
#[must_use]
pub fn reason(error: &Error) -> &str {
    match error {
        Error::Denied(text) | Error::Failed(text) => text,
    }
}
