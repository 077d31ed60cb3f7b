//! Text to token ids and back. Wraps the `tokenizers` crate and must not know packages, chat formats or HTTP.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use galerne_core::chat::Segment;
use galerne_core::ids::TokenId;
use galerne_core::limits::GraphLimits;

mod spelling;
mod stream;

use spelling::Spelling;
pub use stream::TokenStream;

/// Why text could not be tokenized, or a tokenizer not be read.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("read tokenizer {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not a tokenizer in Hugging Face's JSON form.
    #[error("parse tokenizer: {0}")]
    Parse(String),
    /// A token's id is larger than the host allows.
    #[error("parse tokenizer: token {token:?} has id {id}, the limit is {limit}")]
    VocabularyTooLarge {
        /// The token's spelling.
        token: String,
        /// Its id.
        id: u32,
        /// Ids must be below this.
        limit: u64,
    },
    /// The `tokenizers` crate refused the text.
    #[error("tokenize text: {0}")]
    Encode(String),
    /// A segment names a special token the tokenizer does not have.
    #[error(
        "tokenize segments: the tokenizer has no special token {0:?}; does the chat format fit this model?"
    )]
    UnknownSpecial(String),
    /// Plain text came out as a special token, which would let text forge control tokens.
    #[error("tokenize text: plain text turned into special token {0:?}; the text is refused")]
    ForgedSpecial(String),
}

/// A model's tokenizer.
pub struct Tokenizer {
    /// Treats the spelling of special tokens as plain text.
    plain: tokenizers::Tokenizer,
    /// Parses special tokens out of the text. Made when first asked for: a copy takes ten megabytes or more, and chats
    /// need none.
    parsing: OnceLock<tokenizers::Tokenizer>,
    spelling: Spelling,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If the file cannot be read or is not a tokenizer.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(path).map_err(|source| TokenizerError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::from_bytes(&bytes)
    }

    /// Parses the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is not a tokenizer, or its vocabulary is larger than [`GraphLimits::vocabulary_max`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let mut plain = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| TokenizerError::Parse(error.to_string()))?;
        // A file may carry the training run's truncation and padding; prompts must be neither cut nor filled.
        plain
            .with_truncation(None)
            .map_err(|error| TokenizerError::Parse(error.to_string()))?;
        plain.with_padding(None);
        plain.set_encode_special_tokens(true);
        let spelling = Spelling::new(&plain, bytes, GraphLimits::default().vocabulary_max)?;
        Ok(Self {
            plain,
            parsing: OnceLock::new(),
            spelling,
        })
    }

    /// The ids of plain text. Whatever the text spells, no special token comes out. Adds nothing around it.
    ///
    /// # Errors
    /// If the text cannot be tokenized.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        let ids = encode_with(&self.plain, text)?;
        // Some BPE models look whole words up in the vocabulary, where special tokens are listed too.
        match ids
            .iter()
            .find(|&&id| self.is_special(id) && !self.spelling.is_unknown(id))
        {
            Some(&id) => Err(TokenizerError::ForgedSpecial(
                self.spelling.name(id).unwrap_or_default().to_owned(),
            )),
            None => Ok(ids),
        }
    }

    /// The ids of text in which the spelling of a special token means that token. Adds nothing around it.
    ///
    /// # Errors
    /// If the text cannot be tokenized.
    pub fn encode_special(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        let parsing = self.parsing.get_or_init(|| {
            let mut parsing = self.plain.clone();
            parsing.set_encode_special_tokens(false);
            parsing
        });
        encode_with(parsing, text)
    }

    /// The ids of a rendered prompt. Adjacent text segments are joined first, so that the cut between them leaves no
    /// trace in the tokens.
    ///
    /// # Errors
    /// If a special segment does not name a token of [`Self::special_tokens`] exactly.
    pub fn encode_segments(&self, segments: &[Segment]) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::new();
        let mut text = String::new();
        for segment in segments {
            match segment {
                Segment::Text(piece) => text.push_str(piece),
                Segment::Special(name) => {
                    ids.extend(self.encode_run(&mut text)?);
                    ids.push(
                        self.special_id(name)
                            .ok_or_else(|| TokenizerError::UnknownSpecial(name.clone()))?,
                    );
                }
            }
        }
        ids.extend(self.encode_run(&mut text)?);
        Ok(ids)
    }

    fn encode_run(&self, text: &mut String) -> Result<Vec<TokenId>, TokenizerError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        self.encode(&std::mem::take(text))
    }

    /// The token added to the vocabulary under exactly this name.
    #[must_use]
    pub fn special_id(&self, name: &str) -> Option<TokenId> {
        self.spelling.added_id(name)
    }

    /// Names of all tokens added to the vocabulary (control tokens and markers such as `<think>`), by id.
    #[must_use]
    pub fn special_tokens(&self) -> Vec<String> {
        self.spelling.added_names()
    }

    /// The token's spelling in the vocabulary file.
    #[must_use]
    pub fn token_name(&self, token: TokenId) -> Option<&str> {
        self.spelling.name(token)
    }

    /// The token with exactly this spelling in the vocabulary file.
    #[must_use]
    pub fn token_id(&self, name: &str) -> Option<TokenId> {
        self.plain.token_to_id(name).map(TokenId)
    }

    /// Largest token id plus one.
    #[must_use]
    pub fn vocabulary(&self) -> u32 {
        self.spelling.vocabulary()
    }

    /// Whether the token is a control token: never part of the text.
    #[must_use]
    pub fn is_special(&self, token: TokenId) -> bool {
        self.spelling.is_special(token)
    }

    /// The bytes a token stands for, which need not be whole UTF-8. Empty for control tokens and unknown ids.
    #[must_use]
    pub fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        self.spelling.bytes(token).to_vec()
    }

    /// The text of a whole sequence, without its control tokens. Invalid UTF-8 becomes U+FFFD.
    ///
    /// A sentencepiece vocabulary marks the start of a text with a space, which is removed here. [`Self::stream`] keeps
    /// it, since a stream continues a prompt.
    #[must_use]
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|&token| self.spelling.bytes(token))
            .copied()
            .collect();
        let text = String::from_utf8_lossy(&bytes);
        match text.strip_prefix(' ') {
            Some(rest) if self.spelling.marks_start() => rest.to_owned(),
            _ => text.into_owned(),
        }
    }

    /// Decodes a sequence token by token.
    #[must_use]
    pub fn stream(self: &Arc<Self>) -> TokenStream {
        TokenStream::new(Arc::clone(self))
    }

    /// The token this tokenizer's own post-processing puts before a text, if it does.
    #[must_use]
    pub fn own_prefix(&self) -> Option<TokenId> {
        let with = self.plain.encode_fast("a", true).ok()?;
        let without = self.plain.encode_fast("a", false).ok()?;
        let first = *with.get_ids().first()?;
        (without.get_ids().first() != Some(&first)).then_some(TokenId(first))
    }
}

fn encode_with(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|error| TokenizerError::Encode(error.to_string()))?;
    Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use spelling::byte_level_table as spelling_table_for_tests;
