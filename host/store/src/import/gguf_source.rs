//! Reads a GGUF file as the source of an import. Must not know how packages are written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use galerne_core::dtype::DType;
use serde_json::Value as Json;

use super::gguf_config::{Metadata, Shape, config, shape};
use super::plan::{PlannedTensor, RowOrder, WeightPlan};
use super::{ImportError, Source, gguf_tokenizer, io, license, rope_factors};
use crate::gguf::{Gguf, GgufLimits};

/// The tensor that holds rope factors instead of weights.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Reads the header of the file and plans the copy of its tensors.
pub(super) fn read(path: &Path) -> Result<Source, ImportError> {
    let file = File::open(path).map_err(io("open", path))?;
    let file_bytes = file.metadata().map_err(io("read", path))?.len();
    let shown = path.display().to_string();
    let gguf = Gguf::read(BufReader::new(&file), file_bytes, &GgufLimits::default()).map_err(|source| {
        ImportError::Gguf {
            path: shown.clone(),
            source,
        }
    })?;
    let metadata = Metadata {
        gguf: &gguf,
        path: &shown,
    };
    let shape = shape(metadata)?;
    let scaling = rope_scaling(&gguf, &shape, &file, path)?;
    let config = config(metadata, &shape, scaling)?;
    let plan = plan(&gguf, &shape, path)?;
    let (tokenizer_json, chat) = gguf_tokenizer::read(metadata)?;
    let licence = gguf
        .text("general.license")
        .ok()
        .flatten()
        .and_then(license::spdx);
    Ok(Source {
        model_type: shape.family.name.to_owned(),
        config_json: to_json(&Json::Object(config)),
        tokenizer_json,
        context_tokens_max: shape.context_tokens,
        license: licence,
        chat,
        plan,
    })
}

fn to_json(value: &Json) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn rope_scaling(gguf: &Gguf, shape: &Shape, file: &File, path: &Path) -> Result<Option<Json>, ImportError> {
    let Some(tensor) = gguf.tensors.get(ROPE_FACTORS) else {
        return Ok(None);
    };
    let pairs = shape.head_width / 2;
    let fault = |expected: String, got: String| ImportError::Tensor {
        tensor: ROPE_FACTORS.to_owned(),
        expected,
        got,
    };
    if tensor.info.dtype != DType::F32 || tensor.info.shape != [pairs] {
        let got = format!("{} {:?}", tensor.info.dtype, tensor.info.shape);
        return Err(fault(format!("f32 [{pairs}]"), got));
    }
    let mut reader = BufReader::new(file);
    reader
        .seek(SeekFrom::Start(tensor.start))
        .map_err(io("read", path))?;
    let mut factors = Vec::new();
    for _ in 0..pairs {
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).map_err(io("read", path))?;
        factors.push(f32::from_le_bytes(bytes));
    }
    match rope_factors::rope_scaling(&factors, shape.rope_theta) {
        Some(scaling) => Ok(Some(scaling)),
        None => Err(fault(
            "the factors of Llama 3's rope scaling".to_owned(),
            format!("{factors:?}"),
        )),
    }
}

fn plan(gguf: &Gguf, shape: &Shape, path: &Path) -> Result<WeightPlan, ImportError> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in gguf.tensors.iter().filter(|(name, _)| *name != ROPE_FACTORS) {
        let target = weight_name(name, shape.layers).ok_or_else(|| ImportError::Tensor {
            tensor: name.clone(),
            expected: format!(
                "a tensor of architecture {:?} with {} blocks",
                shape.family.name, shape.layers
            ),
            got: "an unknown name".to_owned(),
        })?;
        let heads = match name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem) {
            stem if stem.ends_with(".attn_q") => Some(shape.heads),
            stem if stem.ends_with(".attn_k") => Some(shape.kv_heads),
            _ => None,
        };
        if let Some(heads) = heads {
            check_rows(name, &tensor.info.shape, heads * shape.head_width)?;
        }
        let order = match heads {
            Some(heads) if shape.family.pairs_interleaved => RowOrder::PairsToHalves { heads },
            _ => RowOrder::Kept,
        };
        let planned = PlannedTensor {
            info: tensor.info.clone(),
            file: 0,
            start: tensor.start,
            size_bytes: tensor.size_bytes,
            order,
        };
        tensors.insert(target, planned);
    }
    if let Some(name) = required(shape.layers).find(|name| !gguf.tensors.contains_key(name)) {
        return Err(ImportError::MissingTensor {
            tensor: name,
            place: path.display().to_string(),
        });
    }
    Ok(WeightPlan {
        files: vec![path.to_owned()],
        tensors,
    })
}

fn check_rows(name: &str, shape: &[u64], expected: u64) -> Result<(), ImportError> {
    if shape.first() == Some(&expected) {
        return Ok(());
    }
    Err(ImportError::Tensor {
        tensor: name.to_owned(),
        expected: format!("{expected} rows (heads × head width)"),
        got: format!("shape {shape:?}"),
    })
}

/// Names of the parts of a layer, in GGUF and in Hugging Face's order of things.
const LAYER_PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
];
/// How many of them every layer has.
const REQUIRED_PARTS: usize = 9;

fn required(layers: u64) -> impl Iterator<Item = String> {
    let ends = ["token_embd.weight", "output_norm.weight"].map(str::to_owned);
    let parts = (0..layers).flat_map(|layer| {
        LAYER_PARTS[..REQUIRED_PARTS]
            .iter()
            .map(move |(part, _)| format!("blk.{layer}.{part}.weight"))
    });
    ends.into_iter().chain(parts)
}

/// The Hugging Face name of a GGUF tensor of a model with `layers` layers.
fn weight_name(name: &str, layers: u64) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest
        .rsplit_once('.')
        .filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let (_, target) = LAYER_PARTS.iter().find(|(source, _)| *source == part)?;
    let number = layer.parse().ok().filter(|number: &u64| *number < layers)?;
    // One spelling only: `blk.01` must not become another `blk.1`.
    if number.to_string() != layer {
        return None;
    }
    Some(format!("model.layers.{layer}.{target}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::weight_name;

    #[test]
    fn names_map_one_to_one() {
        for (gguf, target) in [
            ("output.weight", Some("lm_head.weight")),
            (
                "blk.11.ffn_gate.weight",
                Some("model.layers.11.mlp.gate_proj.weight"),
            ),
            ("blk.0.attn_q.bias", Some("model.layers.0.self_attn.q_proj.bias")),
            ("blk.0.ffn_gate_exps.weight", None),
            ("blk.x.attn_q.weight", None),
            ("blk.01.attn_q.weight", None),
            ("blk.12.attn_q.weight", None),
            ("blk.0.attn_q.scale", None),
            ("blk.0.attn_q", None),
        ] {
            assert_eq!(weight_name(gguf, 12).as_deref(), target, "{gguf}");
        }
    }
}
