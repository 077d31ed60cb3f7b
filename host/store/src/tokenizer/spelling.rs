//! What bytes each token stands for: byte-level and sentencepiece vocabularies. Must not know how text becomes tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use galerne_core::ids::TokenId;
use serde::Deserialize;
use serde_json::Value;

use super::TokenizerError;

/// How a vocabulary's spellings stand for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    /// Each character stands for one byte, by GPT-2's table.
    ByteLevel,
    /// `▁` stands for a space, `<0xAB>` for a byte.
    Metaspace,
    /// As spelled.
    Literal,
}

/// Where a token's name and bytes end in the tables. They begin where those of the token before end.
#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    name: u32,
    bytes: u32,
}

/// The bytes and kinds of all tokens. Names and bytes lie one after another: a string of its own for each of a hundred
/// thousand tokens would take megabytes.
#[derive(Debug)]
pub(super) struct Spelling {
    /// By id; ids that no token has are empty.
    ends: Vec<Ends>,
    names: String,
    bytes: Vec<u8>,
    special: BTreeSet<u32>,
    added: BTreeMap<u32, String>,
    added_ids: BTreeMap<String, u32>,
    unknown: Option<TokenId>,
    marks_start: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: Model,
}

#[derive(Deserialize, Default)]
struct Model {
    #[serde(default)]
    unk_token: Option<String>,
}

impl Ends {
    fn of(names: &str, bytes: &[u8]) -> Result<Self, TokenizerError> {
        let end = |len: usize| {
            u32::try_from(len)
                .map_err(|_| TokenizerError::Parse("its tokens are longer than 4 GiB".to_owned()))
        };
        Ok(Self {
            name: end(names.len())?,
            bytes: end(bytes.len())?,
        })
    }
}

impl Spelling {
    /// Reads the vocabulary of `tokenizer`, whose file is `json`.
    pub(super) fn new(
        tokenizer: &tokenizers::Tokenizer,
        json: &[u8],
        vocabulary_max: u64,
    ) -> Result<Self, TokenizerError> {
        let file: File =
            serde_json::from_slice(json).map_err(|error| TokenizerError::Parse(error.to_string()))?;
        let scheme = scheme_of(&file.decoder);
        let mut names: Vec<(u32, String)> = tokenizer
            .get_vocab(true)
            .into_iter()
            .map(|(name, id)| (id, name))
            .collect();
        names.sort_unstable();
        if let Some((id, token)) = names.last()
            && u64::from(*id) >= vocabulary_max
        {
            return Err(TokenizerError::VocabularyTooLarge {
                token: token.clone(),
                id: *id,
                limit: vocabulary_max,
            });
        }
        let added_tokens = tokenizer.get_added_tokens_decoder();
        let bytes_of_chars = byte_level_table();
        let mut ends = Vec::with_capacity(names.last().map_or(0, |(id, _)| *id as usize + 1));
        let (mut all_names, mut bytes) = (String::new(), Vec::new());
        for (id, name) in &names {
            ends.resize(*id as usize, Ends::of(&all_names, &bytes)?);
            match added_tokens.get(id) {
                Some(token) if token.special => {}
                Some(_) => bytes.extend_from_slice(name.as_bytes()),
                None => append_bytes(scheme, name, &bytes_of_chars, &mut bytes),
            }
            all_names.push_str(name);
            ends.push(Ends::of(&all_names, &bytes)?);
        }
        let special = added_tokens
            .iter()
            .filter_map(|(id, token)| token.special.then_some(*id))
            .collect();
        let added: BTreeMap<u32, String> = added_tokens
            .iter()
            .map(|(id, token)| (*id, token.content.clone()))
            .collect();
        let added_ids = added.iter().map(|(id, name)| (name.clone(), *id)).collect();
        let unknown = file
            .model
            .unk_token
            .and_then(|name| tokenizer.token_to_id(&name))
            .map(TokenId);
        let marks_start = scheme == Scheme::Metaspace && strips_start(&file.decoder);
        all_names.shrink_to_fit();
        bytes.shrink_to_fit();
        Ok(Self {
            ends,
            names: all_names,
            bytes,
            special,
            added,
            added_ids,
            unknown,
            marks_start,
        })
    }

    /// Where a token's name or bytes lie, as `end` picks.
    fn range(&self, token: TokenId, end: fn(&Ends) -> u32) -> Range<usize> {
        let Some(to) = self.ends.get(token.index()) else {
            return 0..0;
        };
        let before = token.index().checked_sub(1);
        let from = before.map_or(0, |at| end(&self.ends[at]));
        from as usize..end(to) as usize
    }

    pub(super) fn bytes(&self, token: TokenId) -> &[u8] {
        &self.bytes[self.range(token, |ends| ends.bytes)]
    }

    pub(super) fn name(&self, token: TokenId) -> Option<&str> {
        let name = &self.names[self.range(token, |ends| ends.name)];
        (!name.is_empty()).then_some(name)
    }

    pub(super) fn is_special(&self, token: TokenId) -> bool {
        self.special.contains(&token.0)
    }

    pub(super) fn is_unknown(&self, token: TokenId) -> bool {
        self.unknown == Some(token)
    }

    pub(super) fn added_id(&self, name: &str) -> Option<TokenId> {
        self.added_ids.get(name).copied().map(TokenId)
    }

    pub(super) fn added_names(&self) -> Vec<String> {
        self.added.values().cloned().collect()
    }

    pub(super) fn vocabulary(&self) -> u32 {
        u32::try_from(self.ends.len()).unwrap_or(u32::MAX)
    }

    /// Whether the first token of a text begins with a space that is not part of the text.
    pub(super) fn marks_start(&self) -> bool {
        self.marks_start
    }
}

/// The decoder and, if it is a sequence, its steps.
fn decoder_steps(decoder: &Value) -> Vec<&Value> {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.iter().collect(),
        None => vec![decoder],
    }
}

fn scheme_of(decoder: &Value) -> Scheme {
    let steps = decoder_steps(decoder);
    let has = |kind: &str| {
        steps
            .iter()
            .any(|step| step.get("type").and_then(Value::as_str) == Some(kind))
    };
    if has("ByteLevel") {
        Scheme::ByteLevel
    } else if has("ByteFallback") || has("Metaspace") {
        Scheme::Metaspace
    } else {
        Scheme::Literal
    }
}

fn strips_start(decoder: &Value) -> bool {
    decoder_steps(decoder)
        .iter()
        .any(|step| match step.get("type").and_then(Value::as_str) {
            Some("Strip") => step
                .get("start")
                .and_then(Value::as_u64)
                .is_some_and(|count| count > 0),
            Some("Metaspace") => step.get("prepend_scheme").and_then(Value::as_str) != Some("never"),
            _ => false,
        })
}

fn append_bytes(scheme: Scheme, name: &str, table: &BTreeMap<char, u8>, out: &mut Vec<u8>) {
    match scheme {
        Scheme::ByteLevel => {
            let start = out.len();
            for character in name.chars() {
                let Some(&byte) = table.get(&character) else {
                    // A spelling outside the table stands for itself, as in the `tokenizers` crate's decoder.
                    out.truncate(start);
                    out.extend_from_slice(name.as_bytes());
                    return;
                };
                out.push(byte);
            }
        }
        Scheme::Metaspace => match byte_fallback(name) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(name.replace('▁', " ").as_bytes()),
        },
        Scheme::Literal => out.extend_from_slice(name.as_bytes()),
    }
}

/// The byte of a token spelled `<0xAB>`.
fn byte_fallback(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's table: printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
pub(crate) fn byte_level_table() -> BTreeMap<char, u8> {
    let mut next = 0x100_u32;
    (0..=u8::MAX)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let character = if printable {
                char::from(byte)
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            };
            (character, byte)
        })
        .collect()
}
