//! What an answer must match, and where the engine and the grammars meet: masks over a model's vocabulary.
//! Knows no parser.

use serde_json::Value;

use crate::guest::{Answer, Waker};
use crate::ids::TokenId;

/// What a whole answer must match.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSource {
    /// A JSON text valid for this JSON Schema (draft 2020-12).
    JsonSchema(Value),
    /// A regular expression in the syntax of the `regex` crate, matched from beginning to end.
    Regex(String),
    /// A context-free grammar in Lark's syntax, with `start` as its first rule.
    Lark(String),
}

impl GrammarSource {
    /// What it is called in messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "Lark grammar",
        }
    }
}

/// What a token stands for in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenText {
    /// These bytes, which need not be whole UTF-8. Empty for a token nobody may draw.
    Bytes(Vec<u8>),
    /// No text: a control token of this name.
    Control(String),
}

/// What the grammars of one model need to know of its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTexts {
    /// By id, one for each entry of the model's output.
    pub tokens: Vec<TokenText>,
    /// Tokens that end an answer; all below `tokens.len()`.
    pub ends: Vec<TokenId>,
}

/// The tokens that may come next: a bit for each token, token `t` in bit `t % 32` of word `t / 32`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// Of a vocabulary of `vocabulary` tokens. Missing words allow nothing, and bits past the vocabulary are cleared.
    #[must_use]
    pub fn new(mut words: Vec<u32>, vocabulary: u32) -> Self {
        words.resize(vocabulary.div_ceil(32) as usize, 0);
        if let Some(last) = words.last_mut()
            && !vocabulary.is_multiple_of(32)
        {
            *last &= (1 << (vocabulary % 32)) - 1;
        }
        Self { words }
    }

    /// The bits, `vocabulary / 32` words, rounded up.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether the token may come next.
    #[must_use]
    pub fn allows(&self, token: TokenId) -> bool {
        let word = self.words.get(token.index() / 32);
        word.is_some_and(|word| word >> (token.0 % 32) & 1 == 1)
    }

    /// Whether no token may come next.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The token, if only one may come next.
    #[must_use]
    pub fn only(&self) -> Option<TokenId> {
        let mut set = self.words.iter().enumerate().filter(|(_, word)| **word != 0);
        let (at, word) = set.next()?;
        let is_only = word.is_power_of_two() && set.next().is_none();
        is_only.then(|| TokenId(u32::try_from(at).unwrap_or(u32::MAX) * 32 + word.trailing_zeros()))
    }
}

/// What may follow in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// One of these tokens, at least one. Tokens that end an answer are among them if the answer may end here.
    Tokens(TokenMask),
    /// Nothing: the answer is complete and cannot be continued.
    End,
}

/// Why an answer cannot be kept to a grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The grammar is wrong, says nothing that a text could match, or uses what is not supported.
    #[error("{kind}: {reason}")]
    Source {
        /// What kind of grammar.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The grammar is larger than the host allows.
    #[error("{kind}: expected at most {limit} {unit}, got {got}; simplify it")]
    TooLarge {
        /// What kind of grammar.
        kind: &'static str,
        /// What is counted.
        unit: &'static str,
        /// The limit.
        limit: usize,
        /// What came.
        got: usize,
    },
    /// Finding the tokens that may come next took more work than the host allows.
    #[error("the grammar is too complex for this answer to go on: {reason}; simplify it")]
    TooComplex {
        /// Which limit.
        reason: String,
    },
    /// No token of the vocabulary, or none that was drawn, continues the answer.
    #[error("the grammar leaves no way to continue the answer: {reason}")]
    Stuck {
        /// What is known.
        reason: String,
    },
    /// The host's own mistake, or too much of other work.
    #[error("grammar: {reason}")]
    Host {
        /// What happened.
        reason: String,
    },
}

/// A grammar's state for one sequence. Calls never block: a question is asked, worked on by the grammar's own threads, and
/// its answer taken later. At most one question is open at a time.
pub trait GrammarSession: Send {
    /// Takes note of the tokens that came since the last question, oldest first, and asks what may follow.
    fn request_next(&mut self, accepted: Vec<TokenId>);
    /// What may follow, if it is known. Ready once per question.
    fn take_next(&mut self) -> Answer<Next, GrammarError>;
}

/// Makes grammars for one model.
pub trait GrammarFactory: Send + Sync {
    /// A session for one sequence. `waker` is called whenever an answer is there. Blocks while the grammar is compiled.
    ///
    /// # Errors
    /// A grammar that is wrong or too large.
    fn session(&self, source: &GrammarSource, waker: Waker) -> Result<Box<dyn GrammarSession>, GrammarError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_knows_its_tokens_and_nothing_past_the_vocabulary() {
        let mask = TokenMask::new(vec![0, u32::MAX, u32::MAX], 40);
        assert_eq!(mask.words(), [0, 0xff]);
        assert!(mask.allows(TokenId(39)) && !mask.allows(TokenId(40)) && !mask.allows(TokenId(4_000)));
        assert!(!mask.allows(TokenId(0)));
        assert!(TokenMask::new(Vec::new(), 40).is_empty() && !mask.is_empty());
    }

    #[test]
    fn only_one_token_is_told_from_several() {
        let only = |words: &[u32]| TokenMask::new(words.to_vec(), 96).only();
        assert_eq!(only(&[0, 4, 0]), Some(TokenId(34)));
        assert_eq!(only(&[0, 5, 0]), None);
        assert_eq!(only(&[1, 4, 0]), None);
        assert_eq!(only(&[0, 0, 0]), None);
    }
}
