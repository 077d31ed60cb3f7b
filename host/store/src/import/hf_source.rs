//! Reads a Hugging Face folder as the source of an import. Must not know how packages are written.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use galerne_core::ids::TokenId;
use serde::Deserialize;
use serde_json::Value as Json;

use super::plan::{PlannedTensor, RowOrder, WeightPlan};
use super::{ImportError, Source, license};
use crate::manifest::ChatManifest;
use crate::package::{
    CONFIG_BYTES_MAX, CONFIG_FILE, TOKENIZER_BYTES_MAX, TOKENIZER_FILE, into_text, open_file, read_bounded,
};
use crate::tensor_file::read_header;
use crate::tokenizer::Tokenizer;

const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
/// Longest shard index accepted.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Most shards.
const SHARDS_MAX: usize = 4_096;

/// Reads the folder's small files and the headers of its shards.
pub(super) fn read(folder: &Path) -> Result<Source, ImportError> {
    let config_json = read_bounded(&folder.join(CONFIG_FILE), CONFIG_BYTES_MAX)?;
    let config: Json = parse(CONFIG_FILE, &config_json)?;
    let model_type = config.get("model_type").and_then(Json::as_str).ok_or_else(|| {
        fault(
            CONFIG_FILE,
            "model_type",
            "a string",
            shown(config.get("model_type")),
        )
    })?;
    let context = config.get("max_position_embeddings");
    let context_tokens_max = context
        .and_then(Json::as_u64)
        .and_then(|tokens| u32::try_from(tokens).ok())
        .filter(|&tokens| tokens > 0)
        .ok_or_else(|| {
            fault(
                CONFIG_FILE,
                "max_position_embeddings",
                "a positive number",
                shown(context),
            )
        })?;
    let tokenizer_json = read_bounded(&folder.join(TOKENIZER_FILE), TOKENIZER_BYTES_MAX)?;
    let tokenizer = Tokenizer::from_bytes(&tokenizer_json)?;
    Ok(Source {
        model_type: model_type.to_owned(),
        context_tokens_max,
        license: license_of(folder)?,
        chat: chat(folder, &config, &tokenizer)?,
        plan: plan(folder)?,
        config_json,
        tokenizer_json,
    })
}

fn fault(file: &str, field: impl Into<String>, expected: &str, got: impl Into<String>) -> ImportError {
    ImportError::Field {
        file: file.to_owned(),
        field: field.into(),
        expected: expected.to_owned(),
        got: got.into(),
    }
}

/// A JSON value in a message: cut, for it is foreign.
fn shown(value: Option<&Json>) -> String {
    value.map_or_else(
        || "nothing".to_owned(),
        |value| value.to_string().chars().take(80).collect(),
    )
}

fn parse<T: for<'de> Deserialize<'de>>(file: &str, bytes: &[u8]) -> Result<T, ImportError> {
    serde_json::from_slice(bytes)
        .map_err(|error| fault(file, "content", "JSON of the known form", error.to_string()))
}

/// A file of the folder that may be missing.
fn optional(folder: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ImportError> {
    let path = folder.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    Ok(Some(read_bounded(&path, limit)?))
}

fn license_of(folder: &Path) -> Result<Option<String>, ImportError> {
    let card = optional(folder, "README.md", CONFIG_BYTES_MAX)?;
    Ok(card.and_then(|card| license::of_model_card(&String::from_utf8_lossy(&card))))
}

fn chat(folder: &Path, config: &Json, tokenizer: &Tokenizer) -> Result<ChatManifest, ImportError> {
    const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
    const GENERATION_CONFIG: &str = "generation_config.json";
    let read = |name: &str| -> Result<Json, ImportError> {
        optional(folder, name, CONFIG_BYTES_MAX)?.map_or(Ok(Json::Null), |bytes| parse(name, &bytes))
    };
    let tokenizer_config = read(TOKENIZER_CONFIG)?;
    let generation = read(GENERATION_CONFIG)?;
    let own_prefix = tokenizer.own_prefix();
    let bos_token = token_name(&tokenizer_config, "bos_token").or_else(|| {
        own_prefix
            .and_then(|id| tokenizer.token_name(id))
            .map(str::to_owned)
    });
    let ids = [(GENERATION_CONFIG, &generation), (CONFIG_FILE, config)]
        .into_iter()
        .find_map(|(file, json)| {
            json.get("eos_token_id")
                .filter(|ids| !ids.is_null())
                .map(|ids| (file, ids))
        });
    let mut eos_tokens = match ids {
        Some((file, ids)) => names_of_ids(file, ids, tokenizer)?,
        None => Vec::new(),
    };
    // Chat models often end their turn with the tokenizer's end token, and the text with the configuration's.
    match token_name(&tokenizer_config, "eos_token") {
        Some(token) if !eos_tokens.contains(&token) => eos_tokens.push(token),
        _ => {}
    }
    let add_bos = tokenizer_config.get("add_bos_token").and_then(Json::as_bool);
    let template = match optional(folder, "chat_template.jinja", CONFIG_BYTES_MAX)? {
        Some(bytes) => Some(into_text(&folder.join("chat_template.jinja"), bytes)?),
        None => template(&tokenizer_config),
    };
    Ok(ChatManifest {
        eos_tokens,
        add_bos: bos_token.is_some() && add_bos.unwrap_or(own_prefix.is_some()),
        bos_token,
        template,
    })
}

/// A token of `tokenizer_config.json`: its name, or an object that has it.
fn token_name(config: &Json, field: &str) -> Option<String> {
    let value = config.get(field)?;
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_owned)
}

/// The template: text, or the one called `default` of several.
fn template(config: &Json) -> Option<String> {
    let value = config.get("chat_template")?;
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = |name: &str| {
        value
            .as_array()?
            .iter()
            .find(|entry| entry.get("name").is_some_and(|it| it == name))
    };
    named("default")?.get("template")?.as_str().map(str::to_owned)
}

fn names_of_ids(file: &str, ids: &Json, tokenizer: &Tokenizer) -> Result<Vec<String>, ImportError> {
    let ids = ids
        .as_array()
        .map_or_else(|| vec![ids], |ids| ids.iter().collect());
    let name = |id: &Json| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let name = number.and_then(|id| tokenizer.token_name(TokenId(id)));
        name.map(str::to_owned).ok_or_else(|| {
            fault(
                file,
                "eos_token_id",
                "ids of the tokenizer's vocabulary",
                shown(Some(id)),
            )
        })
    };
    ids.into_iter().map(name).collect()
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

fn plan(folder: &Path) -> Result<WeightPlan, ImportError> {
    let index: Option<ShardIndex> = match optional(folder, INDEX_FILE, INDEX_BYTES_MAX)? {
        Some(bytes) => Some(parse(INDEX_FILE, &bytes)?),
        None => None,
    };
    let shards: BTreeSet<&str> = match &index {
        Some(index) => index.weight_map.values().map(String::as_str).collect(),
        None => [SINGLE_FILE].into(),
    };
    if shards.is_empty() || shards.len() > SHARDS_MAX {
        let count = shards.len().to_string();
        return Err(fault(INDEX_FILE, "weight_map", "1 to 4096 shards", count));
    }
    let mut plan = WeightPlan::default();
    for shard in &shards {
        // Names stay inside the folder.
        if Path::new(shard).file_name().is_none_or(|name| name != *shard) {
            return Err(fault(
                INDEX_FILE,
                "weight_map",
                "plain file names",
                format!("{shard:?}"),
            ));
        }
        add_shard(&mut plan, folder.join(shard))?;
    }
    for (tensor, shard) in index.iter().flat_map(|index| &index.weight_map) {
        let found = plan
            .tensors
            .get(tensor)
            .is_some_and(|found| plan.files[found.file] == folder.join(shard));
        if !found {
            return Err(ImportError::MissingTensor {
                tensor: tensor.clone(),
                place: shard.clone(),
            });
        }
    }
    Ok(plan)
}

fn add_shard(plan: &mut WeightPlan, path: PathBuf) -> Result<(), ImportError> {
    let (file, bytes) = open_file(&path)?;
    let header = read_header(BufReader::new(file), bytes).map_err(|source| ImportError::TensorFile {
        path: path.display().to_string(),
        source,
    })?;
    let number = plan.files.len();
    for (name, tensor) in header.tensors {
        let planned = PlannedTensor {
            info: tensor.info,
            file: number,
            start: tensor.start,
            size_bytes: tensor.size_bytes,
            order: RowOrder::Kept,
        };
        if let Some(other) = plan.tensors.insert(name.clone(), planned) {
            return Err(ImportError::Tensor {
                tensor: name,
                expected: "one shard that holds it".to_owned(),
                got: format!("{} and {}", plan.files[other.file].display(), path.display()),
            });
        }
    }
    plan.files.push(path);
    Ok(())
}
