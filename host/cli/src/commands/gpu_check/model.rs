//! Llama-shaped models of random weights, the same for a seed, held nowhere: a weight's bytes are made when they are asked for.

use std::hash::Hasher as _;

use anyhow::{Context, Result};
use clap::ValueEnum;
use galerne_core::dtype::DType;
use galerne_core::limits::GraphLimits;
use galerne_core::validate::validate;
use galerne_core::weights::{WeightIndex, WeightInfo, WeightReadError, WeightSource, WeightView};
use galerne_engine::lowering::lower;
use galerne_kernels::conformance::Numbers;
use galerne_kernels::program::Program;
use galerne_kernels::quant;
use galerne_plugin::PluginHost;
use serde_json::json;
use siphasher::sip::SipHasher;

use super::ModelArgs;
use crate::guests;

/// Numbers from which all weights of a model are cut.
const POOL: usize = 1 << 22;
/// Their standard deviation: that of trained models' weights, about.
const SIZE: f32 = 0.02;

/// Whose shape a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Shape {
    /// A few thousand weights
    Tiny,
    /// SmolLM2-135M
    Smollm2,
    /// Llama 3.1 8B
    Llama8b,
}

/// Sizes of a model.
struct Sizes {
    layers: u32,
    width: u64,
    ffn: u64,
    heads: u64,
    kv_heads: u64,
    vocabulary: u64,
    is_tied: bool,
    rope_theta: f64,
}

impl Shape {
    fn sizes(self) -> Sizes {
        let of = |layers, [width, ffn, heads, kv_heads, vocabulary]: [u64; 5], is_tied, rope_theta| Sizes {
            layers,
            width,
            ffn,
            heads,
            kv_heads,
            vocabulary,
            is_tied,
            rope_theta,
        };
        match self {
            Self::Tiny => of(2, [256, 512, 4, 2, 1_000], true, 1e4),
            Self::Smollm2 => of(30, [576, 1_536, 9, 3, 49_152], true, 1e5),
            Self::Llama8b => of(32, [4_096, 14_336, 32, 8, 128_256], false, 5e5),
        }
    }
}

/// A program with weights.
pub(super) struct SeededModel {
    pub(super) program: Program,
    pub(super) weights: SeededWeights,
    pub(super) vocabulary: u32,
    /// Bytes of tables of which a step reads a few rows.
    pub(super) table_bytes: usize,
}

impl SeededModel {
    /// Asks the architecture guest of this binary for the graph.
    pub(super) fn new(plugins: &PluginHost, args: &ModelArgs) -> Result<Self> {
        let mut sizes = args.shape.sizes();
        sizes.layers = args.layers.unwrap_or(sizes.layers).min(sizes.layers);
        let config = json!({
            "model_type": "llama", "hidden_size": sizes.width, "intermediate_size": sizes.ffn,
            "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads, "vocab_size": sizes.vocabulary, "max_position_embeddings": 8_192,
            "rms_norm_eps": 1e-5, "rope_theta": sizes.rope_theta, "hidden_act": "silu",
            "tie_word_embeddings": sizes.is_tied,
        });
        let weights = SeededWeights::new(&sizes, args.weights);
        let guest = plugins.load_model("llama", guests::embedded("llama")?)?;
        let graph = guest.build(&config.to_string())?;
        let graph = validate(graph, weights.index(), &GraphLimits::default())?;
        Ok(Self {
            program: lower(&graph)?,
            vocabulary: graph.vocabulary().context("the graph has no logits")?,
            table_bytes: weights.table_bytes(sizes.is_tied),
            weights,
        })
    }
}

/// Weights cut from a pool of numbers.
pub(super) struct SeededWeights {
    index: WeightIndex,
    /// The pool as matrices are stored.
    pool: Vec<u8>,
}

const EMBEDDING: &str = "model.embed_tokens.weight";

impl SeededWeights {
    fn new(sizes: &Sizes, dtype: DType) -> Self {
        let (width, ffn) = (sizes.width, sizes.ffn);
        let kv_width = width / sizes.heads * sizes.kv_heads;
        let mut index = WeightIndex::default();
        let mut add = |name: String, shape: Vec<u64>| {
            // Norms, as all vectors, are near one and in f32.
            let dtype = if shape.len() == 1 { DType::F32 } else { dtype };
            index.tensors.insert(name, WeightInfo { dtype, shape });
        };
        add(EMBEDDING.to_owned(), vec![sizes.vocabulary, width]);
        for layer in 0..sizes.layers {
            for (name, shape) in [
                ("input_layernorm", vec![width]),
                ("self_attn.q_proj", vec![width, width]),
                ("self_attn.k_proj", vec![kv_width, width]),
                ("self_attn.v_proj", vec![kv_width, width]),
                ("self_attn.o_proj", vec![width, width]),
                ("post_attention_layernorm", vec![width]),
                ("mlp.gate_proj", vec![ffn, width]),
                ("mlp.up_proj", vec![ffn, width]),
                ("mlp.down_proj", vec![width, ffn]),
            ] {
                add(format!("model.layers.{layer}.{name}.weight"), shape);
            }
        }
        add("model.norm.weight".to_owned(), vec![width]);
        if !sizes.is_tied {
            add("lm_head.weight".to_owned(), vec![sizes.vocabulary, width]);
        }
        let numbers = Numbers::new(1).normals(POOL, SIZE);
        Self {
            index,
            pool: quant::quantize(dtype, &numbers),
        }
    }

    /// A tied table is read whole for the logits.
    fn table_bytes(&self, is_tied: bool) -> usize {
        let table = self.index.tensors.get(EMBEDDING).filter(|_| !is_tied);
        table.map_or(0, bytes)
    }
}

fn bytes(info: &WeightInfo) -> usize {
    let elements: u64 = info.shape.iter().product();
    elements as usize / info.dtype.block_elements() * info.dtype.block_bytes()
}

impl WeightSource for SeededWeights {
    fn weight(&self, name: &str) -> Result<Option<WeightView<'_>>, WeightReadError> {
        let Some(info) = self.index.tensors.get(name) else {
            return Ok(None);
        };
        let mut hash = SipHasher::new();
        hash.write(name.as_bytes());
        let bytes = if info.shape.len() == 1 {
            let vector = Numbers::new(hash.finish()).normals(info.shape[0] as usize, SIZE);
            vector.iter().flat_map(|x| (1.0 + x).to_le_bytes()).collect()
        } else {
            // Each matrix begins at another block of the pool, and goes round it.
            let block = info.dtype.block_bytes();
            let start = hash.finish() as usize % (self.pool.len() / block) * block;
            let mut bytes = Vec::with_capacity(bytes(info) + self.pool.len());
            bytes.extend_from_slice(&self.pool[start..]);
            while bytes.len() < self::bytes(info) {
                bytes.extend_from_slice(&self.pool);
            }
            bytes.truncate(self::bytes(info));
            bytes
        };
        Ok(Some(WeightView {
            dtype: info.dtype,
            shape: &info.shape,
            bytes: bytes.into(),
        }))
    }

    fn index(&self) -> &WeightIndex {
        &self.index
    }
}
