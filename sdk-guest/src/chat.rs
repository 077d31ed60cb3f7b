//! The world `galerne:chat/chat`: from messages to a prompt, and from an answer to its parts.

/// Generated from `wit/chat`.
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
        world: "chat",
        path: "../wit/chat/0.1.0",
        pub_export_macro: true,
        default_bindings_module: "galerne_sdk::chat::bindings",
    });
}

pub use bindings::exports::galerne::chat::format::{
    CalledTool, Delta, Error, Message, Options, Segment, Tool, ToolCall,
};

/// A chat format.
pub trait Format {
    /// Splits one answer.
    type Parser: Parse + 'static;

    /// Whether a model with this template text and these special tokens speaks this format.
    fn recognises(template: Option<&str>, special_tokens: &[String]) -> bool;

    /// The prompt, text and special tokens apart.
    ///
    /// # Errors
    /// A message this format cannot express.
    fn render(messages: &[Message], tools: &[Tool], options: &Options) -> Result<Vec<Segment>, Error>;

    /// A parser for one answer.
    fn parser(options: &Options) -> Self::Parser;
}

/// Splits one answer as it streams in.
pub trait Parse {
    /// The deltas this text completes; text that may begin a marker is held back.
    fn push(&mut self, text: &str) -> Vec<Delta>;
    /// What was held back.
    fn finish(&mut self) -> Vec<Delta>;
}

/// Makes a type that implements [`Format`] this guest's export.
#[macro_export]
macro_rules! export_chat {
    ($format:ty) => {
        const _: () = {
            use $crate::chat::bindings::exports::galerne::chat::format as wit;

            struct Export;
            struct ExportParser(std::cell::RefCell<<$format as $crate::chat::Format>::Parser>);

            impl wit::Guest for Export {
                type Parser = ExportParser;

                fn recognises(template: Option<String>, special_tokens: Vec<String>) -> bool {
                    <$format as $crate::chat::Format>::recognises(template.as_deref(), &special_tokens)
                }

                fn render(
                    messages: Vec<wit::Message>,
                    tools: Vec<wit::Tool>,
                    options: wit::Options,
                ) -> Result<Vec<wit::Segment>, wit::Error> {
                    <$format as $crate::chat::Format>::render(&messages, &tools, &options)
                }
            }

            impl wit::GuestParser for ExportParser {
                fn new(options: wit::Options) -> Self {
                    Self(std::cell::RefCell::new(
                        <$format as $crate::chat::Format>::parser(&options),
                    ))
                }

                fn push(&self, text: String) -> Vec<wit::Delta> {
                    $crate::chat::Parse::push(&mut *self.0.borrow_mut(), &text)
                }

                fn finish(&self) -> Vec<wit::Delta> {
                    $crate::chat::Parse::finish(&mut *self.0.borrow_mut())
                }
            }

    $crate::chat::bindings::export!(Export with_types_in $crate::chat::bindings);
        };
    };
}
