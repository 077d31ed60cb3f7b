//! Which tokens are green behind which, for a key: what the sampler prefers and the detector counts (Kirchenbauer et al. 2023,
//! arXiv 2301.10226, the soft rule with one token before). Knows no guest and no model.

use std::hash::Hasher as _;

use siphasher::sip::SipHasher24;

/// A key, and which part of the tokens is green.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Green {
    key: [u8; 16],
    /// The part of all tokens that is green behind any other.
    pub(crate) gamma: f64,
}

impl Green {
    /// `key` is 32 hexadecimal digits; `gamma` lies between 0 and 1.
    ///
    /// # Errors
    /// One of them is not so.
    pub(crate) fn new(key: &str, gamma: f64) -> Result<Self, String> {
        if !(0.01..=0.99).contains(&gamma) {
            return Err(format!("gamma: expected from 0.01 to 0.99, got {gamma}"));
        }
        // The key itself is in no message.
        let wrong = || "key: expected 32 hexadecimal digits, as from `openssl rand -hex 16`".to_owned();
        if key.len() != 32 || !key.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 16];
        for (place, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&key[2 * place..2 * place + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self { key: bytes, gamma })
    }

    /// Whether `token` is green behind `before`.
    pub(crate) fn is_green(&self, before: u32, token: u32) -> bool {
        let mut hash = SipHasher24::new_with_key(&self.key);
        hash.write(&before.to_le_bytes());
        hash.write(&token.to_le_bytes());
        // 53 bits make an exact number in [0, 1).
        let uniform = (hash.finish() >> 11) as f64 / (1_u64 << 53) as f64;
        uniform < self.gamma
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f";

    #[test]
    fn green_is_the_part_it_should_be_and_differs_by_key_and_token_before() {
        let green = Green::new(KEY, 0.25).expect("a key");
        let other = Green::new("100102030405060708090a0b0c0d0e0f", 0.25).expect("a key");
        let count =
            |green: &Green, before| (0..10_000).filter(|token| green.is_green(before, *token)).count();
        for before in [0, 1, 49_151] {
            assert!(
                (2_350..2_650).contains(&count(&green, before)),
                "{}",
                count(&green, before)
            );
        }
        let both = (0..10_000)
            .filter(|token| green.is_green(7, *token) && other.is_green(7, *token))
            .count();
        assert!((500..750).contains(&both), "keys are not independent: {both}");
        let both = (0..10_000)
            .filter(|token| green.is_green(7, *token) && green.is_green(8, *token))
            .count();
        assert!((500..750).contains(&both), "lists are not independent: {both}");
    }

    /// SipHash-2-4 of the bytes 00 to 07 under the key 00 to 0f, from the reference implementation's vectors.
    #[test]
    fn the_hash_is_siphash_2_4() {
        let mut hash = SipHasher24::new_with_key(&std::array::from_fn(|place| place as u8));
        hash.write(&[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(
            hash.finish().to_le_bytes(),
            [0x62, 0x24, 0x93, 0x9a, 0x79, 0xf5, 0xf5, 0x93]
        );
    }

    #[test]
    fn keys_are_checked_and_not_shown() {
        for bad in [
            "",
            "00",
            &KEY[1..],
            "zz0102030405060708090a0b0c0d0e0f",
            "é00102030405060708090a0b0c0d0e",
        ] {
            let error = Green::new(bad, 0.25).expect_err("no key");
            assert!(!error.contains("0102"), "{error}");
        }
        assert!(Green::new(KEY, 0.0).is_err() && Green::new(KEY, f64::NAN).is_err());
    }
}
