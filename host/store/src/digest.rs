//! SHA-256 digests in the form manifests carry them. Knows nothing of what is digested.

use std::io::Read;

use sha2::{Digest, Sha256};

/// Bytes read, hashed or copied at once: large enough to be fast, small enough to notice a cancellation.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// `sha256:` and the digest in lower-case hexadecimal.
pub(crate) fn text(hasher: Sha256) -> String {
    use std::fmt::Write as _;
    hasher
        .finalize()
        .iter()
        .fold("sha256:".to_owned(), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    text(Sha256::new_with_prefix(bytes))
}

pub(crate) fn of_reader(mut reader: impl Read, mut seen: impl FnMut(u64)) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = reader.read(&mut chunk)?;
        if count == 0 {
            return Ok(text(hasher));
        }
        hasher.update(&chunk[..count]);
        seen(count as u64);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn digests_are_those_of_fips_180() {
        let expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(super::of_bytes(b"abc"), expected);
        assert_eq!(super::of_reader(&b"abc"[..], |_| ()).expect("read"), expected);
    }
}
