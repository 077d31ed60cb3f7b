//! A GGUF file's metadata as a Hugging Face style `config.json`. Reads no file.

use serde_json::{Map, Value as Json, json};

use super::ImportError;
use crate::gguf::{Gguf, GgufError, Value};

/// One architecture that can be imported.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// As in `general.architecture`, and as `model_type` in `config.json`.
    pub(super) name: &'static str,
    class: &'static str,
    /// Whether the file keeps rope pairs side by side, where Hugging Face keeps them in halves.
    pub(super) pairs_interleaved: bool,
}

/// All architectures that can be imported.
const FAMILIES: [Family; 3] = [
    Family {
        name: "llama",
        class: "LlamaForCausalLM",
        pairs_interleaved: true,
    },
    Family {
        name: "qwen2",
        class: "Qwen2ForCausalLM",
        pairs_interleaved: false,
    },
    Family {
        name: "qwen3",
        class: "Qwen3ForCausalLM",
        pairs_interleaved: false,
    },
];

/// The numbers the importer itself needs.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) family: Family,
    pub(super) layers: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_width: u64,
    pub(super) hidden: u64,
    pub(super) rope_theta: f64,
    pub(super) context_tokens: u32,
}

/// Metadata with the file's name for messages.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    pub(super) gguf: &'a Gguf,
    pub(super) path: &'a str,
}

impl Metadata<'_> {
    pub(super) fn fault(&self, source: GgufError) -> ImportError {
        ImportError::Gguf {
            path: self.path.to_owned(),
            source,
        }
    }

    pub(super) fn field(&self, key: &str, expected: impl Into<String>, got: impl ToString) -> ImportError {
        self.fault(GgufError::field(key, expected, got))
    }

    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>, ImportError> {
        self.gguf.unsigned(key).map_err(|error| self.fault(error))
    }

    pub(super) fn need<T>(&self, key: &str, expected: &str, value: Option<T>) -> Result<T, ImportError> {
        value.ok_or_else(|| self.field(key, expected, "nothing"))
    }

    /// A count between 1 and 2^20: nothing a model counts is larger, and products of two do not overflow.
    fn count(&self, key: &str) -> Result<Option<u64>, ImportError> {
        match self.unsigned(key)? {
            Some(count) if (1..=1 << 20).contains(&count) => Ok(Some(count)),
            Some(other) => Err(self.field(key, "1 to 1048576", other)),
            None => Ok(None),
        }
    }

    fn need_count(&self, key: &str) -> Result<u64, ImportError> {
        self.count(key)?
            .map_or_else(|| Err(self.field(key, "1 to 1048576", "nothing")), Ok)
    }

    /// A count, or an array of the same count for every layer.
    fn uniform_count(&self, key: &str) -> Result<Option<u64>, ImportError> {
        let Some(Value::Array(values)) = self.gguf.metadata.get(key) else {
            return self.count(key);
        };
        match values.first() {
            Some(&Value::Unsigned(first)) if values.iter().all(|value| *value == Value::Unsigned(first)) => {
                Ok(Some(first))
            }
            Some(&Value::Signed(first)) if values.iter().all(|value| *value == Value::Signed(first)) => {
                u64::try_from(first)
                    .map(Some)
                    .map_err(|_| self.field(key, "a count", first))
            }
            _ => Err(self.field(
                key,
                "the same count for every layer",
                "an array of different ones",
            )),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, ImportError> {
        self.gguf.float(key).map_err(|error| self.fault(error))
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ImportError> {
        self.gguf.text(key).map_err(|error| self.fault(error))
    }
}

/// The architecture of the file and its numbers.
pub(super) fn shape(metadata: Metadata<'_>) -> Result<Shape, ImportError> {
    let name = metadata.need(
        "general.architecture",
        "a name",
        metadata.text("general.architecture")?,
    )?;
    let family = FAMILIES
        .into_iter()
        .find(|family| family.name == name)
        .ok_or_else(|| ImportError::Architecture {
            got: name.to_owned(),
            supported: FAMILIES.map(|family| family.name).join(", "),
        })?;
    let key = |rest: &str| format!("{name}.{rest}");
    if let Some(experts) = metadata.unsigned(&key("expert_count"))?
        && experts > 0
    {
        return Err(metadata.field(&key("expert_count"), "a model without experts", experts));
    }
    let hidden = metadata.need_count(&key("embedding_length"))?;
    let heads_key = key("attention.head_count");
    let heads = metadata
        .uniform_count(&heads_key)?
        .filter(|&heads| heads > 0 && heads <= hidden);
    let heads = metadata.need(&heads_key, "1 to embedding_length", heads)?;
    let kv_key = key("attention.head_count_kv");
    let kv_heads = metadata.uniform_count(&kv_key)?.unwrap_or(heads);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(metadata.field(&kv_key, format!("a divisor of {heads} heads"), kv_heads));
    }
    let head_width = match metadata.count(&key("attention.key_length"))? {
        Some(width) => width,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(metadata.field(&heads_key, format!("a divisor of {hidden}"), heads)),
    };
    for rest in ["rope.dimension_count", "attention.value_length"] {
        if let Some(width) = metadata.count(&key(rest))?
            && width != head_width
        {
            return Err(metadata.field(&key(rest), format!("the head width {head_width}"), width));
        }
    }
    let context_tokens = metadata.need_count(&key("context_length"))? as u32;
    Ok(Shape {
        family,
        layers: metadata.need_count(&key("block_count"))?,
        heads,
        kv_heads,
        head_width,
        hidden,
        rope_theta: metadata.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        context_tokens,
    })
}

/// The `config.json`. `rope_scaling` is what the caller recovered from rope factors, if there are any.
pub(super) fn config(
    metadata: Metadata<'_>,
    shape: &Shape,
    rope_scaling: Option<Json>,
) -> Result<Map<String, Json>, ImportError> {
    let name = shape.family.name;
    let key = |rest: &str| format!("{name}.{rest}");
    let eps_key = key("attention.layer_norm_rms_epsilon");
    let eps = metadata.need(&eps_key, "a number", metadata.float(&eps_key)?)?;
    let tensors = &metadata.gguf.tensors;
    let vocabulary = tensors
        .get("token_embd.weight")
        .and_then(|tensor| tensor.info.shape.first().copied());
    let rope_scaling = match rope_scaling {
        Some(scaling) => Some(scaling),
        None => linear_scaling(metadata, name)?,
    };
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| {
        config.insert(key.to_owned(), value);
    };
    set("architectures", json!([shape.family.class]));
    set("model_type", json!(name));
    set("hidden_size", json!(shape.hidden));
    set(
        "intermediate_size",
        json!(metadata.need_count(&key("feed_forward_length"))?),
    );
    set("num_hidden_layers", json!(shape.layers));
    set("num_attention_heads", json!(shape.heads));
    set("num_key_value_heads", json!(shape.kv_heads));
    set("head_dim", json!(shape.head_width));
    set("hidden_act", json!("silu"));
    set("rms_norm_eps", json!(eps));
    set("rope_theta", json!(shape.rope_theta));
    set("rope_scaling", rope_scaling.unwrap_or(Json::Null));
    set("max_position_embeddings", json!(shape.context_tokens));
    set("vocab_size", json!(vocabulary));
    set(
        "tie_word_embeddings",
        json!(!tensors.contains_key("output.weight")),
    );
    set("attention_bias", json!(tensors.contains_key("blk.0.attn_q.bias")));
    set("mlp_bias", json!(false));
    for (field, id) in [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")] {
        if let Some(id) = metadata.unsigned(&format!("tokenizer.ggml.{id}"))? {
            set(field, json!(id));
        }
    }
    if let Some(window) = metadata.count(&key("attention.sliding_window"))? {
        set("sliding_window", json!(window));
    }
    Ok(config)
}

fn linear_scaling(metadata: Metadata<'_>, name: &str) -> Result<Option<Json>, ImportError> {
    let type_key = format!("{name}.rope.scaling.type");
    let factor_key = format!("{name}.rope.scaling.factor");
    let old_key = format!("{name}.rope.scale_linear");
    match (metadata.text(&type_key)?, metadata.float(&old_key)?) {
        (None | Some("none"), None) => Ok(None),
        (None, Some(factor)) => Ok((factor != 1.0).then(|| json!({"rope_type": "linear", "factor": factor}))),
        (Some("linear"), _) => {
            let factor = metadata.need(&factor_key, "a number", metadata.float(&factor_key)?)?;
            Ok(Some(json!({"rope_type": "linear", "factor": factor})))
        }
        (Some(other), _) => Err(metadata.field(&type_key, "none or linear", other)),
    }
}
