//! What a plugin author uses: typed traits for the worlds of the contract, and a graph builder that reads like
//! a model's paper. Knows nothing of the host.
//!
//! A guest is a library crate that depends on this one with the feature of its world, implements the
//! world's trait, and names its type once:
//!
//! ```text
//! struct MyModel;
//! impl galerne_sdk::model::Architecture for MyModel { ... }
//! galerne_sdk::export_model!(MyModel);
//! ```
//!
//! Capabilities (`grammar`, `http`, `kv`, `log`, `secrets`) are features too. Their functions work in a component only: logic that
//! is tested on the author's machine takes what they give as arguments.

#[cfg(feature = "chat")]
pub mod chat;
#[cfg(feature = "filter")]
pub mod filter;
#[cfg(feature = "grammar")]
pub mod grammar;
#[cfg(feature = "model")]
pub mod graph;
#[cfg(feature = "http")]
pub mod http;
#[cfg(feature = "kv")]
pub mod kv;
#[cfg(feature = "log")]
pub mod log;
#[cfg(feature = "model")]
pub mod model;
#[cfg(feature = "pipeline")]
pub mod pipeline;
#[cfg(feature = "sampling")]
pub mod sampling;
#[cfg(feature = "secrets")]
pub mod secrets;
#[cfg(feature = "tool")]
pub mod tool;

/// JSON values, for configurations and parameters.
pub use serde_json as json;
