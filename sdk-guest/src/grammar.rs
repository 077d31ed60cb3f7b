//! The capability `galerne:grammar`: grammars that a sampler's plans name.
//!
//! A [`Grammar`] has an `id`, which goes into [`Plan::grammar`](crate::sampling::Plan). Keep it in the session: a grammar that
//! is dropped has no `id` any more, and a plan that names it ends the request.

/// Generated from `wit/grammar`.
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
        path: "../wit/grammar/0.1.0",
    });
}

pub use bindings::galerne::grammar::grammars::{Error, Grammar, Source, Status};

/// An error in words, for a client or an author.
#[must_use]
pub fn text(error: Error) -> String {
    match error {
        Error::Invalid(text) | Error::Limit(text) | Error::Failed(text) => text,
    }
}

/// What matches one of these texts and nothing else.
#[must_use]
pub fn one_of(texts: &[&str]) -> Source {
    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
    Source::Lark(format!("start: {}", texts.join(" | ")))
}

/// A text as a Lark string: JSON's escapes are among Lark's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
