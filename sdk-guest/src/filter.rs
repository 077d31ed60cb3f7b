//! The world `galerne:filter/filter`: what a request and its answer pass through.

use serde_json::Value;

/// Generated from `wit/filter`.
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
        world: "filter",
        path: "../wit/filter/0.1.0",
        pub_export_macro: true,
        default_bindings_module: "galerne_sdk::filter::bindings",
    });
}

pub use bindings::exports::galerne::filter::filtering::{
    Channel, Message, Passage, Refusal, Request, RequestInfo, Tool, ToolCall, Verdict,
};

/// The state of one request and its answer. What is not implemented lets everything pass.
pub trait Session: Sized {
    /// A session for a request; `params` are the deployment's for this filter, an empty object if it gives none.
    ///
    /// # Errors
    /// Parameters that make no sense, in words for the client.
    fn create(params: &Value, info: &RequestInfo) -> Result<Self, String>;

    /// Decides on the request.
    fn on_request(&mut self, request: Request) -> Verdict {
        let _ = request;
        Verdict::Pass
    }

    /// Decides on a channel's text: what was held back, and what came since. Never empty.
    ///
    /// # Errors
    /// The answer must not go on.
    fn on_text(&mut self, channel: Channel, text: &str) -> Result<Passage, Refusal> {
        let _ = channel;
        Ok(all_of(text))
    }

    /// What is let out at the end of a channel, in place of what was held back.
    ///
    /// # Errors
    /// The answer must not end like this.
    fn finish(&mut self, channel: Channel, held: &str) -> Result<String, Refusal> {
        let _ = channel;
        Ok(held.to_owned())
    }
}

/// Lets out the text as it is and holds nothing back.
#[must_use]
pub fn all_of(text: &str) -> Passage {
    instead_of(text, text.to_owned())
}

/// Lets out `out` in the place of `taken`, which must be the beginning of the text shown; the rest is held back.
#[must_use]
pub fn instead_of(taken: &str, out: String) -> Passage {
    Passage {
        text: out,
        // A guest's memory ends before u32 does.
        taken_bytes: u32::try_from(taken.len()).unwrap_or(u32::MAX),
    }
}

/// Parses the parameters and creates; what the exported function does.
///
/// # Errors
/// Parameters that are not JSON, and what [`Session::create`] returns.
pub fn create_from_text<S: Session>(info: &RequestInfo) -> Result<S, String> {
    let params =
        serde_json::from_str(&info.params_json).map_err(|error| format!("params: not JSON: {error}"))?;
    S::create(&params, info)
}

/// Makes a type that implements [`Session`] this guest's export.
#[macro_export]
macro_rules! export_filter {
    ($session:ty) => {
        const _: () = {
            use $crate::filter::bindings::exports::galerne::filter::filtering as wit;

            struct Export;
            struct ExportSession(std::cell::RefCell<$session>);

            impl wit::Guest for Export {
                type Session = ExportSession;
            }

            impl wit::GuestSession for ExportSession {
                fn create(info: wit::RequestInfo) -> Result<wit::Session, String> {
                    let session = $crate::filter::create_from_text::<$session>(&info)?;
                    Ok(wit::Session::new(ExportSession(std::cell::RefCell::new(
                        session,
                    ))))
                }

                fn on_request(&self, request: wit::Request) -> wit::Verdict {
                    $crate::filter::Session::on_request(&mut *self.0.borrow_mut(), request)
                }

                fn on_text(&self, channel: wit::Channel, text: String) -> Result<wit::Passage, wit::Refusal> {
                    $crate::filter::Session::on_text(&mut *self.0.borrow_mut(), channel, &text)
                }

                fn finish(&self, channel: wit::Channel, held: String) -> Result<String, wit::Refusal> {
                    $crate::filter::Session::finish(&mut *self.0.borrow_mut(), channel, &held)
                }
            }

    $crate::filter::bindings::export!(Export with_types_in $crate::filter::bindings);
        };
    };
}
