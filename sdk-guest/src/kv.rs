//! The capability `galerne:kv`: values that outlive requests.

/// Generated from `wit/kv`.
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
        path: "../wit/kv/0.1.0",
    });
}

pub use bindings::galerne::kv::store::{Error, delete, get, keys, set};

/// What went wrong, in the host's words.
#[must_use]
pub fn reason(error: &Error) -> &str {
    match error {
        Error::Invalid(text) | Error::Limit(text) | Error::Failed(text) => text,
    }
}
