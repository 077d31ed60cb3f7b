//! Packages on disk, importers, tokenizers. Must not know wasm runtimes, devices, HTTP or a terminal.
//!
//! - [`store`]: the data folder and the models in it.
//! - [`package`]: one model's folder, opened for use.
//! - [`registry`]: tenants' plugins and deployments.
//! - [`kv`] and [`secrets`]: what tenants' guests keep and may know.
//! - [`import`]: from a GGUF file or a Hugging Face folder to a package.
//! - [`tokenizer`]: text to ids and back.
//! - [`gguf`] and [`tensor_file`]: readers of foreign bytes. Every count and offset is checked before it is used.

mod digest;
pub mod gguf;
pub mod import;
pub mod kv;
pub mod manifest;
pub mod package;
mod private;
pub mod registry;
pub mod secrets;
pub mod store;
pub mod tensor_file;
pub mod timestamp;
pub mod tokenizer;
mod weights;
