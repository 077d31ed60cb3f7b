//! `galerne.toml`: what a package says of itself. Plain data; opens no other file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The manifest's file name.
pub const MANIFEST_FILE: &str = "galerne.toml";
/// Longest manifest accepted.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// A package's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The name clients put in `model`.
    pub name: String,
    /// The package's own version.
    pub version: String,
    /// SPDX licence expression, where the source states one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// The kind of architecture, as in `config.json`.
    pub model_type: String,
    /// When it was imported: UTC, RFC 3339.
    pub created: String,
    /// The file or folder it was imported from.
    pub source: String,
    /// Most tokens of one sequence.
    pub context_tokens_max: u32,
    /// Files of the weights, inside the package.
    pub weights: Vec<String>,
    /// The conversation format.
    pub chat: ChatManifest,
    /// `sha256:` digest of every other file of the package, by file name.
    pub digests: BTreeMap<String, String>,
}

/// What the manifest says about conversations and about where texts begin and end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatManifest {
    /// Tokens that end an answer, by name.
    pub eos_tokens: Vec<String>,
    /// The token that begins a text, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token: Option<String>,
    /// Whether a plain prompt gets the beginning token. Chat formats state it themselves.
    #[serde(default)]
    pub add_bos: bool,
    /// The template text of the model's tokenizer configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}
