//! A GGUF file's vocabulary as a Hugging Face `tokenizer.json`. Reads no file.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json, json};

use super::ImportError;
use super::gguf_config::Metadata;
use crate::gguf::Value;
use crate::manifest::ChatManifest;

const MODEL_KEY: &str = "tokenizer.ggml.model";
const PRE_KEY: &str = "tokenizer.ggml.pre";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const TYPES_KEY: &str = "tokenizer.ggml.token_type";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
const SCORES_KEY: &str = "tokenizer.ggml.scores";
/// Longest token of a sentencepiece vocabulary: every cut of every token is looked up.
const PIECE_BYTES_MAX: usize = 512;

/// GPT-2's splitting of text into words.
const GPT2_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: single digits.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Every digit alone, whatever splits words afterwards.
const DIGIT: &str = r"\p{N}";

/// How one value of `tokenizer.ggml.pre` splits text before merging.
struct Splitting {
    names: &'static [&'static str],
    /// Applied one after another to the pieces of the one before.
    patterns: &'static [&'static str],
    /// Whether a word that is in the vocabulary is taken whole.
    ignore_merges: bool,
    /// Whether text is put in Unicode's composed form first.
    composes: bool,
    /// Whether a text begins with the beginning token when the file does not say.
    adds_bos: bool,
}

const SPLITTINGS: [Splitting; 5] = [
    Splitting {
        names: &["gpt-2"],
        patterns: &[GPT2_WORDS],
        ignore_merges: false,
        composes: false,
        adds_bos: false,
    },
    Splitting {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        patterns: &[DIGIT, GPT2_WORDS],
        ignore_merges: false,
        composes: false,
        adds_bos: false,
    },
    Splitting {
        names: &["llama-bpe", "llama3", "llama-v3"],
        patterns: &[LLAMA3_WORDS],
        ignore_merges: true,
        composes: false,
        adds_bos: true,
    },
    Splitting {
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[QWEN2_WORDS],
        ignore_merges: false,
        composes: true,
        adds_bos: false,
    },
    // What converters write when they do not recognise a tokenizer; the splitting is the ggml project's default.
    Splitting {
        names: &["default"],
        patterns: &[
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        ],
        ignore_merges: false,
        composes: false,
        adds_bos: false,
    },
];

/// What a vocabulary entry is: the numbers of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The vocabulary as the file lists it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<TokenType>,
}

/// The `tokenizer.json` and what the manifest says of texts' ends.
pub(super) fn read(metadata: Metadata<'_>) -> Result<(Vec<u8>, ChatManifest), ImportError> {
    let text = |key: &str| metadata.gguf.text(key).map_err(|error| metadata.fault(error));
    let vocabulary = vocabulary(metadata)?;
    let kind = metadata.need(MODEL_KEY, "a name", text(MODEL_KEY)?)?;
    let (mut tokenizer, adds_bos) = match kind {
        "gpt2" => byte_level(
            metadata,
            &vocabulary,
            metadata.need(PRE_KEY, "a name", text(PRE_KEY)?)?,
        )?,
        "llama" => (sentencepiece(metadata, &vocabulary)?, true),
        other => return Err(unsupported(MODEL_KEY, other, "gpt2, llama".to_owned())),
    };
    tokenizer.insert("added_tokens".to_owned(), added_tokens(&vocabulary));
    let flag = |key: &str| metadata.gguf.boolean(key).map_err(|error| metadata.fault(error));
    let mut eos_tokens: Vec<String> = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        match token_at(metadata, &vocabulary, key)? {
            Some(token) if !eos_tokens.contains(&token) => eos_tokens.push(token),
            _ => {}
        }
    }
    let chat = ChatManifest {
        eos_tokens,
        bos_token: token_at(metadata, &vocabulary, "bos_token_id")?,
        add_bos: flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos),
        template: text("tokenizer.chat_template")?.map(str::to_owned),
    };
    Ok((Json::Object(tokenizer).to_string().into_bytes(), chat))
}

fn unsupported(field: &'static str, got: &str, supported: String) -> ImportError {
    ImportError::TokenizerKind {
        field,
        got: got.to_owned(),
        supported,
    }
}

fn texts<'a>(metadata: Metadata<'a>, key: &str) -> Result<Vec<&'a str>, ImportError> {
    let values = metadata.gguf.array(key).map_err(|error| metadata.fault(error))?;
    let values = metadata.need(key, "an array of strings", values)?;
    let text = |(index, value): (usize, &'a Value)| match value {
        Value::Text(text) => Ok(text.as_str()),
        other => Err(metadata.field(&format!("{key}[{index}]"), "a string", other.describe())),
    };
    values.iter().enumerate().map(text).collect()
}

fn vocabulary(metadata: Metadata<'_>) -> Result<Vocabulary<'_>, ImportError> {
    let tokens = texts(metadata, TOKENS_KEY)?;
    let mut seen = BTreeMap::new();
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = seen.insert(*token, id) {
            let expected = format!("a token other than token {first}");
            return Err(metadata.field(
                &format!("{TOKENS_KEY}[{id}]"),
                expected,
                format!("{token:?} again"),
            ));
        }
    }
    let types = match metadata
        .gguf
        .array(TYPES_KEY)
        .map_err(|error| metadata.fault(error))?
    {
        None => vec![TokenType::Normal; tokens.len()],
        Some(values) if values.len() == tokens.len() => values
            .iter()
            .enumerate()
            .map(|(id, value)| token_type(metadata, id, value))
            .collect::<Result<_, _>>()?,
        Some(values) => {
            return Err(metadata.field(TYPES_KEY, format!("{} entries", tokens.len()), values.len()));
        }
    };
    Ok(Vocabulary { tokens, types })
}

fn token_type(metadata: Metadata<'_>, id: usize, value: &Value) -> Result<TokenType, ImportError> {
    Ok(match value {
        Value::Signed(1) | Value::Unsigned(1) => TokenType::Normal,
        Value::Signed(2) | Value::Unsigned(2) => TokenType::Unknown,
        Value::Signed(3) | Value::Unsigned(3) => TokenType::Control,
        Value::Signed(4) | Value::Unsigned(4) => TokenType::UserDefined,
        Value::Signed(5) | Value::Unsigned(5) => TokenType::Unused,
        Value::Signed(6) | Value::Unsigned(6) => TokenType::Byte,
        other => return Err(metadata.field(&format!("{TYPES_KEY}[{id}]"), "1 to 6", other.describe())),
    })
}

fn token_at(
    metadata: Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
    key: &str,
) -> Result<Option<String>, ImportError> {
    let key = format!("tokenizer.ggml.{key}");
    let Some(id) = metadata.unsigned(&key)? else {
        return Ok(None);
    };
    let token = usize::try_from(id).ok().and_then(|id| vocabulary.tokens.get(id));
    let token =
        token.ok_or_else(|| metadata.field(&key, format!("an id below {}", vocabulary.tokens.len()), id))?;
    Ok(Some((*token).to_owned()))
}

/// Control and user-defined tokens are found in text before words are split.
fn added_tokens(vocabulary: &Vocabulary<'_>) -> Json {
    let entries = vocabulary.tokens.iter().zip(&vocabulary.types).enumerate();
    let added = entries.filter_map(|(id, (token, kind))| {
        let special = match kind {
            TokenType::Control | TokenType::Unknown => true,
            TokenType::UserDefined => false,
            TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
        };
        Some(json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        }))
    });
    Json::Array(added.collect())
}

fn ids(vocabulary: &Vocabulary<'_>) -> Map<String, Json> {
    vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_owned(), json!(id)))
        .collect()
}

fn tokenizer_object(parts: Json, model: Json) -> Map<String, Json> {
    let mut tokenizer = Map::new();
    tokenizer.insert("version".to_owned(), json!("1.0"));
    tokenizer.insert("truncation".to_owned(), Json::Null);
    tokenizer.insert("padding".to_owned(), Json::Null);
    tokenizer.insert("added_tokens".to_owned(), json!([]));
    if let Json::Object(parts) = parts {
        tokenizer.extend(parts);
    }
    tokenizer.insert("post_processor".to_owned(), Json::Null);
    tokenizer.insert("model".to_owned(), model);
    tokenizer
}

fn byte_level(
    metadata: Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
    pre: &str,
) -> Result<(Map<String, Json>, bool), ImportError> {
    let splitting = SPLITTINGS
        .iter()
        .find(|splitting| splitting.names.contains(&pre))
        .ok_or_else(|| {
            let known: Vec<&str> = SPLITTINGS
                .iter()
                .flat_map(|splitting| splitting.names)
                .copied()
                .collect();
            unsupported(PRE_KEY, pre, known.join(", "))
        })?;
    let ids = ids(vocabulary);
    let mut merges = Vec::new();
    for (index, merge) in texts(metadata, MERGES_KEY)?.into_iter().enumerate() {
        let key = format!("{MERGES_KEY}[{index}]");
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| metadata.field(&key, "two tokens with a space between", format!("{merge:?}")))?;
        let joined = format!("{left}{right}");
        if let Some(token) = [left, right, &joined]
            .into_iter()
            .find(|token| !ids.contains_key(*token))
        {
            return Err(metadata.field(&key, "tokens of the vocabulary", format!("{token:?}")));
        }
        merges.push(json!([left, right]));
    }
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let mut steps: Vec<Json> = splitting
        .patterns
        .iter()
        .map(|pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}))
        .collect();
    steps.push(byte_level.clone());
    let parts = json!({
        "normalizer": splitting.composes.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
    });
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": splitting.ignore_merges, "vocab": ids, "merges": merges,
    });
    Ok((tokenizer_object(parts, model), splitting.adds_bos))
}

/// A sentencepiece vocabulary has scores instead of merges: the higher a token's score, the earlier its parts merge.
fn sentencepiece(
    metadata: Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
) -> Result<Map<String, Json>, ImportError> {
    let scores = metadata
        .gguf
        .array(SCORES_KEY)
        .map_err(|error| metadata.fault(error))?;
    let scores = metadata.need(SCORES_KEY, "an array of numbers", scores)?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(metadata.field(
            SCORES_KEY,
            format!("{} entries", vocabulary.tokens.len()),
            scores.len(),
        ));
    }
    let merges = merges_of_scores(metadata, vocabulary, scores)?;
    let prefix = metadata.gguf.boolean("tokenizer.ggml.add_space_prefix");
    let prefix = prefix.map_err(|error| metadata.fault(error))?.unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers: Vec<Json> = prefix
        .then(|| json!({"type": "Prepend", "prepend": "▁"}))
        .into_iter()
        .chain([spaces])
        .collect();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let parts = json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
    });
    let unknown = vocabulary
        .types
        .iter()
        .position(|kind| *kind == TokenType::Unknown);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| vocabulary.tokens[id]),
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
        "ignore_merges": false, "vocab": ids(vocabulary), "merges": merges,
    });
    Ok(tokenizer_object(parts, model))
}

fn merges_of_scores(
    metadata: Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
    scores: &[Value],
) -> Result<Vec<Json>, ImportError> {
    let normal = |id: &usize| vocabulary.types[*id] == TokenType::Normal;
    let ids: BTreeMap<&str, usize> = (0..vocabulary.tokens.len())
        .filter(normal)
        .map(|id| (vocabulary.tokens[id], id))
        .collect();
    let mut merges: Vec<(f64, usize, [usize; 2])> = Vec::new();
    for (&token, &id) in &ids {
        if token.len() > PIECE_BYTES_MAX {
            let expected = format!("at most {PIECE_BYTES_MAX} bytes");
            return Err(metadata.field(&format!("{TOKENS_KEY}[{id}]"), expected, token.len()));
        }
        let score = match scores[id] {
            Value::Float(score) if !score.is_nan() => score,
            ref other => {
                return Err(metadata.field(&format!("{SCORES_KEY}[{id}]"), "a number", other.describe()));
            }
        };
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                merges.push((score, id, [left, right]));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    Ok(merges
        .into_iter()
        .map(|(_, _, pair)| json!(pair.map(|id| vocabulary.tokens[id])))
        .collect())
}
