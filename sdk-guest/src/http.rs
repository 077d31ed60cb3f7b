//! The capability `galerne:http`: calls of granted servers.

/// Generated from `wit/http`.
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
        path: "../wit/http/0.1.0",
    });
}

pub use bindings::galerne::http::client::{Error, Request, Response, send};

/// A request without a body.
///
/// # Errors
/// See [`Error`].
pub fn get(url: &str, headers: &[(&str, &str)]) -> Result<Response, Error> {
    let header = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    send(&Request {
        method: "GET".to_owned(),
        url: url.to_owned(),
        headers: headers.iter().map(header).collect(),
        body: Vec::new(),
    })
}

/// What went wrong, in the host's words.
#[must_use]
pub fn reason(error: &Error) -> &str {
    match error {
        Error::Denied(text)
        | Error::Invalid(text)
        | Error::Limit(text)
        | Error::Timeout(text)
        | Error::Failed(text) => text,
    }
}
