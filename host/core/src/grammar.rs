//! What an answer must match, and where the engine and the grammars meet: masks over a model's vocabulary.
//! Knows no parser.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
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

/// What a whole output must match, as a guest writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrammarText {
    /// A JSON Schema, as JSON.
    JsonSchema(String),
    /// A regular expression.
    Regex(String),
    /// A grammar in Lark's syntax.
    Lark(String),
}

impl GrammarText {
    /// Parsed as far as the host's own types go.
    ///
    /// # Errors
    /// A JSON Schema that is no JSON object.
    pub fn source(self) -> Result<GrammarSource, GrammarError> {
        let wrong = |reason| GrammarError::Source {
            kind: "JSON schema",
            reason,
        };
        Ok(match self {
            Self::Regex(text) => GrammarSource::Regex(text),
            Self::Lark(text) => GrammarSource::Lark(text),
            Self::JsonSchema(text) => match serde_json::from_str(&text) {
                Ok(schema @ Value::Object(_)) => GrammarSource::JsonSchema(schema),
                Ok(_) => return Err(wrong("expected a JSON object".to_owned())),
                Err(error) => return Err(wrong(format!("expected a JSON object, got no JSON: {error}"))),
            },
        })
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
    #[error("{kind}: expected at most {limit} {unit} ({who}), got {got}; simplify it")]
    TooLarge {
        /// What kind of grammar.
        kind: &'static str,
        /// What is counted.
        unit: &'static str,
        /// The limit's name, and who can raise it.
        who: String,
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

    /// A grammar for a guest to hold, in its first state. Blocks while it is compiled.
    ///
    /// # Errors
    /// As for [`session`](Self::session).
    fn hold(&self, source: &GrammarSource) -> Result<Arc<dyn HeldGrammar>, GrammarError>;
}

/// A grammar's state in a guest's hands: which tokens it has taken. Whoever asks next finds the tokens taken that
/// [`drawn`](Self::drawn) told of. Calls other than `drawn` and `session` block while the grammar works.
pub trait HeldGrammar: Send + Sync {
    /// The same state once more; from here on the two know nothing of each other.
    ///
    /// # Errors
    /// The grammar could not take a token that was drawn.
    fn fork(&self) -> Result<Arc<dyn HeldGrammar>, GrammarError>;
    /// Takes as many of these tokens, from the first on, as may follow. How many.
    ///
    /// # Errors
    /// As for [`fork`](Self::fork); or it took more work than the host allows.
    fn accept(&self, tokens: &[TokenId]) -> Result<usize, GrammarError>;
    /// Forgets the last so many tokens. `false` if it has not taken as many; then nothing changes.
    ///
    /// # Errors
    /// As for [`fork`](Self::fork).
    fn rollback(&self, tokens: usize) -> Result<bool, GrammarError>;
    /// Whether its text may end here.
    ///
    /// # Errors
    /// As for [`fork`](Self::fork).
    fn status(&self) -> Result<GrammarStatus, GrammarError>;
    /// Tells it of tokens that were drawn. Never blocks.
    fn drawn(&self, tokens: &[TokenId]);
    /// Keeps a sequence to it: what the sequence draws, it takes. `waker` is called whenever an answer is there.
    fn session(&self, waker: Waker) -> Box<dyn GrammarSession>;
}

/// Whether a grammar's text may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrammarStatus {
    /// It must go on.
    Open,
    /// It may end or go on.
    Complete,
    /// Nothing can follow.
    Ended,
}

/// A grammar that one sampling session holds. The host numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GrammarId(pub u32);

/// What a sampling guest asks of its grammars.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrammarAsk {
    /// A new one. Answered by [`GrammarReply::Grammar`].
    Compile(GrammarText),
    /// A copy. Answered by [`GrammarReply::Grammar`].
    Fork(GrammarId),
    /// Takes tokens. Answered by [`GrammarReply::Accepted`].
    Accept(GrammarId, Vec<TokenId>),
    /// Forgets so many tokens. Answered by [`GrammarReply::Done`].
    Rollback(GrammarId, u32),
    /// Whether its text may end. Answered by [`GrammarReply::Status`].
    Status(GrammarId),
    /// Forgets a grammar. Answered by [`GrammarReply::Done`].
    Drop(GrammarId),
}

/// What a sampling guest is told of its grammars.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrammarReply {
    /// It is done.
    Done,
    /// A new grammar.
    Grammar(GrammarId),
    /// So many tokens were taken.
    Accepted(u32),
    /// Whether its text may end.
    Status(GrammarStatus),
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
