//! The world `galerne:model/model`: an architecture as data.

use serde_json::Value;

/// Generated from `wit/model`.
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
        world: "model",
        path: "../wit/model/0.1.0",
        pub_export_macro: true,
        default_bindings_module: "galerne_sdk::model::bindings",
    });
}

pub use bindings::exports::galerne::model::architecture::{
    ActivationFunction, EmbeddingIndex, Error, FeedForward, Graph, MixtureOfExperts, RopePairing,
    RouterNormalisation,
};

/// A model's architecture.
pub trait Architecture {
    /// The `model_type` values of `config.json` this guest builds.
    fn model_types() -> Vec<String>;

    /// The graph for a parsed `config.json`. Pure: the same configuration always gives the same graph.
    ///
    /// # Errors
    /// A field is missing or out of range ([`Error::Config`]), or asks for something this guest does not know
    /// ([`Error::Unsupported`]).
    fn build(config: &Value) -> Result<Graph, Error>;
}

/// Parses the text and builds; what the exported function does.
///
/// # Errors
/// Text that is not JSON, and what [`Architecture::build`] returns.
pub fn build_from_text<A: Architecture>(config_json: &str) -> Result<Graph, Error> {
    let config = serde_json::from_str(config_json)
        .map_err(|error| Error::Config(format!("config.json is not JSON: {error}")))?;
    A::build(&config)
}

/// Makes a type that implements [`Architecture`] this guest's export.
#[macro_export]
macro_rules! export_model {
    ($architecture:ty) => {
        const _: () = {
            struct Export;

            impl $crate::model::bindings::exports::galerne::model::architecture::Guest for Export {
                fn model_types() -> Vec<String> {
                    <$architecture as $crate::model::Architecture>::model_types()
                }

                fn build(config_json: String) -> Result<$crate::model::Graph, $crate::model::Error> {
                    $crate::model::build_from_text::<$architecture>(&config_json)
                }
            }

    $crate::model::bindings::export!(Export with_types_in $crate::model::bindings);
        };
    };
}
