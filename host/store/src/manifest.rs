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

/// Whether this can name a package: `[a-z0-9][a-z0-9._-]{0,63}`. Such a name is safe as a file name.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= 64
        && bytes.first().is_some_and(|&first| plain(first))
        && bytes
            .iter()
            .all(|&byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::is_valid_name;

    #[test]
    fn names_are_safe_file_names() {
        for name in ["a", "smollm2", "llama-3.1_8b", "0x", &"a".repeat(64)] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in [
            "",
            ".a",
            "-a",
            "A",
            "a/b",
            "..",
            "a b",
            "é",
            "a\0",
            &"a".repeat(65),
        ] {
            assert!(!is_valid_name(name), "{name}");
        }
    }
}
