//! What may be a name of a model, plugin, deployment or tenant.

/// What [`is_name`] accepts, for messages.
pub const NAME_FORM: &str = "[a-z0-9][a-z0-9._-]{0,63}";

/// Whether this can name a model, plugin, deployment or tenant. Such a name is safe as a file name.
#[must_use]
pub fn is_name(name: &str) -> bool {
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
    use super::is_name;

    #[test]
    fn names_are_safe_file_names() {
        for name in ["a", "smollm2", "llama-3.1_8b", "0x", &"a".repeat(64)] {
            assert!(is_name(name), "{name}");
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
            assert!(!is_name(name), "{name}");
        }
    }
}
