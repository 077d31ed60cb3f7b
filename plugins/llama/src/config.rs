//! Reads the fields of `config.json` that Llama-type models have, with Hugging Face's names and defaults.

use galerne_sdk::graph::Rope;
use galerne_sdk::json::Value;
use galerne_sdk::model::{ActivationFunction, Error};

use crate::rope;

/// More layers than any model has; the host limits the graph too, but a guest need not build it first.
const LAYERS_MAX: u32 = 1_024;

/// The `model_type` values of this architecture.
pub(crate) const MODEL_TYPES: [&str; 3] = ["llama", "mistral", "qwen2"];

/// What the graph depends on.
pub(crate) struct Config {
    pub(crate) layers: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_width: u32,
    pub(crate) norm_eps: f32,
    pub(crate) rope: Rope,
    pub(crate) activation: ActivationFunction,
    pub(crate) sliding_window: Option<u32>,
    pub(crate) context_tokens_max: u32,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_bias: bool,
    tied: bool,
}

impl Config {
    pub(crate) fn read(config: &Value) -> Result<Self, Error> {
        let fields = Fields(config);
        let model_type = fields.text("model_type", None)?;
        if !MODEL_TYPES.contains(&model_type) {
            return Err(Error::Unsupported(format!("model_type \"{model_type}\"")));
        }
        let hidden = fields.positive("hidden_size")?;
        let layers = fields.positive("num_hidden_layers")?;
        if layers > LAYERS_MAX {
            return Err(field_error(
                "num_hidden_layers",
                &format!("at most {LAYERS_MAX}"),
                &layers.to_string(),
            ));
        }
        let heads = fields.positive("num_attention_heads")?;
        let kv_heads = fields.positive_or("num_key_value_heads", heads)?;
        if heads % kv_heads != 0 {
            return Err(field_error(
                "num_key_value_heads",
                &format!("a divisor of {heads} heads"),
                &kv_heads.to_string(),
            ));
        }
        let head_width = fields.positive_or("head_dim", hidden / heads)?;
        let attention_bias = fields.flag("attention_bias", false)?;
        Ok(Self {
            layers,
            heads,
            kv_heads,
            head_width,
            norm_eps: fields.number("rms_norm_eps", None)? as f32,
            rope: rope::read(config, head_width)?,
            activation: activation(fields.text("hidden_act", Some("silu"))?)?,
            sliding_window: sliding_window(&fields, model_type)?,
            context_tokens_max: fields.positive("max_position_embeddings")?,
            qkv_bias: attention_bias || model_type == "qwen2",
            // Qwen 2 never has one; files made from GGUF set `attention_bias` for its other three.
            o_bias: attention_bias && model_type != "qwen2",
            mlp_bias: fields.flag("mlp_bias", false)?,
            tied: fields.flag("tie_word_embeddings", false)?,
        })
    }

    /// The output matrix: the embedding table itself where they are tied.
    pub(crate) fn logits_weight(&self) -> &'static str {
        if self.tied {
            "model.embed_tokens.weight"
        } else {
            "lm_head.weight"
        }
    }
}

/// Mistral states its window; Qwen 2 states one too but uses it only if a flag says so, and then only in some layers.
fn sliding_window(fields: &Fields<'_>, model_type: &str) -> Result<Option<u32>, Error> {
    if model_type == "qwen2" {
        if fields.flag("use_sliding_window", false)? {
            return Err(Error::Unsupported(
                "use_sliding_window: a window in some layers only".to_owned(),
            ));
        }
        return Ok(None);
    }
    match &fields.0["sliding_window"] {
        Value::Null => Ok(None),
        _ => fields.positive("sliding_window").map(Some),
    }
}

fn activation(name: &str) -> Result<ActivationFunction, Error> {
    Ok(match name {
        "silu" | "swish" => ActivationFunction::Silu,
        "gelu" => ActivationFunction::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => ActivationFunction::GeluTanh,
        "relu" => ActivationFunction::Relu,
        other => return Err(Error::Unsupported(format!("hidden_act \"{other}\""))),
    })
}

/// An error that names the field, what was expected, and what came.
pub(crate) fn field_error(field: &str, expected: &str, got: &str) -> Error {
    Error::Config(format!("{field}: expected {expected}, got {got}"))
}

/// Typed access with errors that name the field.
pub(crate) struct Fields<'a>(pub(crate) &'a Value);

impl Fields<'_> {
    pub(crate) fn positive(&self, field: &str) -> Result<u32, Error> {
        let value = &self.0[field];
        value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| *number > 0)
            .ok_or_else(|| field_error(field, "a positive integer", &value.to_string()))
    }

    pub(crate) fn positive_or(&self, field: &str, default: u32) -> Result<u32, Error> {
        if self.0[field].is_null() && default > 0 {
            Ok(default)
        } else {
            self.positive(field)
        }
    }

    /// Without a default the field must be there.
    pub(crate) fn number(&self, field: &str, default: Option<f64>) -> Result<f64, Error> {
        let value = &self.0[field];
        if let (Value::Null, Some(default)) = (value, default) {
            return Ok(default);
        }
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number >= 0.0)
            .ok_or_else(|| field_error(field, "a number from 0", &value.to_string()))
    }

    /// Without a default the field must be there.
    pub(crate) fn text<'a>(&'a self, field: &str, default: Option<&'a str>) -> Result<&'a str, Error> {
        match (&self.0[field], default) {
            (Value::Null, Some(default)) => Ok(default),
            (Value::String(text), _) => Ok(text),
            (value, _) => Err(field_error(field, "a text", &value.to_string())),
        }
    }

    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        match &self.0[field] {
            Value::Null => Ok(default),
            value => value
                .as_bool()
                .ok_or_else(|| field_error(field, "true or false", &value.to_string())),
        }
    }
}
