//! Text out of one sequence's tokens as they come. Knows UTF-8 and nothing of the vocabulary's layout.

use std::sync::Arc;

use galerne_core::ids::TokenId;

use super::Tokenizer;

/// Decodes one sequence token by token. Only whole characters come out; the bytes of a character that is not yet
/// complete (at most three) are held back.
#[derive(Debug, Clone)]
pub struct TokenStream {
    tokenizer: Arc<Tokenizer>,
    held: Vec<u8>,
}

impl TokenStream {
    pub(super) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            held: Vec::new(),
        }
    }

    /// The text this token completes, often nothing. Bytes that can never become a character give U+FFFD.
    pub fn push(&mut self, token: TokenId) -> String {
        self.held.extend_from_slice(self.tokenizer.spelling.bytes(token));
        let (text, rest) = take_whole(&self.held);
        let start = self.held.len() - rest;
        self.held.drain(..start);
        text
    }

    /// What was held back, at the end of the sequence: U+FFFD if a character stayed incomplete.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// The whole characters at the front of `bytes`, and how many bytes behind them may still become one.
fn take_whole(mut bytes: &[u8]) -> (String, usize) {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(whole) => {
                text.push_str(whole);
                return (text, 0);
            }
            Err(error) => {
                let (whole, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(whole));
                let Some(bad) = error.error_len() else {
                    return (text, rest.len());
                };
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[bad..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::take_whole;

    fn check(bytes: &[u8], text: &str, held: usize) {
        assert_eq!(take_whole(bytes), (text.to_owned(), held), "{bytes:x?}");
    }

    #[test]
    fn incomplete_characters_are_held_and_broken_ones_replaced() {
        check(b"", "", 0);
        check(b"abc", "abc", 0);
        check("é".as_bytes(), "é", 0);
        check(&"é".as_bytes()[..1], "", 1);
        check(&"a€".as_bytes()[..3], "a", 2);
        check(&"😀".as_bytes()[..3], "", 3);
        check(b"\xffx", "\u{fffd}x", 0);
        check(b"\xe2\x82x", "\u{fffd}x", 0);
        check(b"\x80\x80\xf0\x9f", "\u{fffd}\u{fffd}", 2);
    }
}
