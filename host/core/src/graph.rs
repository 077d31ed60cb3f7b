//! The graph a model guest returns: plain data in SSA form, symbolic only in the number of rows.
//!
//! A *value* is the output of a node: f32 elements of shape `[rows, heads, width]`. The number of rows is
//! symbolic, see [`Rows`]. Ops act on each row on its own except attention, which mixes rows of one sequence.
//! A value of `heads = h, width = w` lies in memory like one of `heads = 1, width = h * w`.

use serde::{Deserialize, Serialize};

use crate::ids::{LayerId, NodeId};

/// What the rows of a value stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One row per token of the step's batch.
    Tokens,
    /// One row per position whose logits or hidden state is wanted (after `output-rows`).
    Outputs,
    /// One row per sequence (after pooling).
    Sequences,
}

impl std::fmt::Display for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tokens => "tokens",
            Self::Outputs => "outputs",
            Self::Sequences => "sequences",
        })
    }
}

/// The inferred shape of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ValueShape {
    /// What the rows are.
    pub rows: Rows,
    /// Heads per row; 1 unless split by `reshape-heads`.
    pub heads: u32,
    /// Elements per head.
    pub width: u32,
}

impl ValueShape {
    /// Elements per row: `heads * width`.
    #[must_use]
    pub fn row_elements(self) -> u64 {
        u64::from(self.heads) * u64::from(self.width)
    }
}

impl std::fmt::Display for ValueShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}, {}]", self.rows, self.heads, self.width)
    }
}

/// Which row of the table an `embedding` takes for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EmbeddingIndex {
    /// The token's id.
    Tokens,
    /// The token's position in its sequence plus this offset.
    Positions(u32),
    /// Always this row (token types of encoders that only use one).
    Constant(u32),
}

/// How the dimensions that rotate together are paired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RopePairing {
    /// Dimension `i` with `i + rotated_width / 2` (Hugging Face Llama, "NeoX").
    Half,
    /// Dimension `2 i` with `2 i + 1` (the original Llama, "GPT-J").
    Interleaved,
}

/// Elementwise functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)` with the exact error function.
    Gelu,
    /// GELU by `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// Hyperbolic tangent.
    Tanh,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
}

/// A gated feed-forward block: `down(activation(gate(x)) * up(x))`, each a weight name, `[out, in]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FeedForward {
    /// `[ffn, width]`
    pub gate: String,
    /// `[ffn, width]`
    pub up: String,
    /// `[width, ffn]`
    pub down: String,
}

/// How router scores become expert weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RouterNormalisation {
    /// Softmax over all experts, the chosen weights used as they are.
    SoftmaxAll,
    /// Softmax over all experts, the chosen weights divided by their sum (Mixtral, Qwen with `norm_topk_prob`).
    SoftmaxChosen,
    /// Sigmoid of each score, the chosen weights divided by their sum.
    SigmoidChosen,
}

/// Parameters of an attention layer. Shapes of its inputs: `q [tokens, heads, width]`,
/// `k [tokens, kv_heads, width]`, `v [tokens, kv_heads, width]`; output `[tokens, heads, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Layers are numbered from 0 in graph order without gaps.
    pub layer: LayerId,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_width: u32,
    /// Factor on `q . k`, usually `1 / sqrt(head_width)`.
    pub scale: f32,
    /// Whether a token sees only itself and earlier ones.
    pub causal: bool,
    /// A token sees at most this many last positions, itself included.
    pub sliding_window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)` before the softmax.
    pub soft_cap: Option<f32>,
}

/// The closed set of operations. Weight fields are names in the safetensors file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Op {
    /// Rows of a table `[entries, width]` → `[tokens, 1, width]`.
    Embedding {
        /// The table's name.
        weight: String,
        /// Which row is taken.
        index: EmbeddingIndex,
    },
    /// `x W^T + b`: `[rows, 1, in]` → `[rows, 1, out]`; weight `[out, in]`, bias `[out]`.
    Linear {
        /// Input.
        x: NodeId,
        /// `[out, in]`
        weight: String,
        /// `[out]`
        bias: Option<String>,
    },
    /// `x / sqrt(mean(x^2) + eps) * (w + weight_offset)` over the last dimension; weight `[width]`
    /// (Zhang & Sennrich 2019; the offset is Gemma's 1).
    RmsNorm {
        /// Input.
        x: NodeId,
        /// `[width]`
        weight: String,
        /// Added to the mean square.
        eps: f32,
        /// Added to every weight.
        weight_offset: f32,
    },
    /// `(x - mean) / sqrt(var + eps) * w + b` over the last dimension (Ba et al. 2016).
    LayerNorm {
        /// Input.
        x: NodeId,
        /// `[width]`
        weight: String,
        /// `[width]`
        bias: Option<String>,
        /// Added to the variance.
        eps: f32,
    },
    /// Rotates the first `2 * inv_freq.len()` elements of every head by `position * inv_freq[i]` and multiplies
    /// sine and cosine by `attention_factor` (Su et al. 2021; the factor is YaRN's). The guest computes the
    /// table, so every scaling scheme fits.
    Rope {
        /// Input, split into heads.
        x: NodeId,
        /// Inverse frequencies, one per rotated pair.
        inv_freq: Vec<f32>,
        /// How rotated dimensions are paired.
        pairing: RopePairing,
        /// Factor on sine and cosine; 1 in most models.
        attention_factor: f32,
    },
    /// Scaled dot-product attention over the sequence's KV cache, to which `k` and `v` are appended.
    Attention {
        /// `[tokens, heads, head_width]`
        q: NodeId,
        /// `[tokens, kv_heads, head_width]`
        k: NodeId,
        /// `[tokens, kv_heads, head_width]`
        v: NodeId,
        /// Layer and shape.
        spec: AttentionSpec,
    },
    /// Elementwise sum of two values of one shape.
    Add {
        /// Left.
        a: NodeId,
        /// Right.
        b: NodeId,
    },
    /// Elementwise product of two values of one shape.
    Mul {
        /// Left.
        a: NodeId,
        /// Right.
        b: NodeId,
    },
    /// Every element times a constant.
    Scale {
        /// Input.
        x: NodeId,
        /// The constant.
        factor: f32,
    },
    /// An elementwise function.
    Activate {
        /// Input.
        x: NodeId,
        /// Which.
        function: Activation,
    },
    /// `cap * tanh(x / cap)`.
    SoftCap {
        /// Input.
        x: NodeId,
        /// The bound, above 0.
        cap: f32,
    },
    /// Elements `start .. start + length` of the last dimension of every head.
    Slice {
        /// Input.
        x: NodeId,
        /// First element.
        start: u32,
        /// Number of elements.
        length: u32,
    },
    /// Values of equal rows and heads, joined along the last dimension.
    Concat {
        /// At least one input.
        parts: Vec<NodeId>,
    },
    /// Splits or joins the last two dimensions: `[rows, h, w]` → `[rows, heads, h * w / heads]`.
    ReshapeHeads {
        /// Input.
        x: NodeId,
        /// Heads of the output.
        heads: u32,
    },
    /// Sum over the `top_k` experts the router chooses of weight times feed-forward, plus the shared expert.
    MixtureOfExperts {
        /// `[rows, 1, width]`
        x: NodeId,
        /// `[experts, width]`
        router: String,
        /// All experts.
        experts: Vec<FeedForward>,
        /// Experts per row.
        top_k: u32,
        /// How scores become weights.
        normalisation: RouterNormalisation,
        /// The experts' activation.
        function: Activation,
        /// An expert every row passes through.
        shared: Option<FeedForward>,
        /// `[1, width]`: the shared expert's output is multiplied by the sigmoid of this linear map.
        shared_gate: Option<String>,
    },
    /// Mean of each sequence's rows: `[tokens, ..]` → `[sequences, ..]`.
    MeanPool {
        /// Input.
        x: NodeId,
    },
    /// First row of each sequence: `[tokens, ..]` → `[sequences, ..]`.
    ClsPool {
        /// Input.
        x: NodeId,
    },
    /// `x / max(|x|_2, 1e-12)` over the last dimension.
    L2Normalise {
        /// Input.
        x: NodeId,
    },
    /// Keeps the rows whose output is wanted: `[tokens, ..]` → `[outputs, ..]`.
    OutputRows {
        /// Input.
        x: NodeId,
    },
    /// `x W^T`, in f32, the distribution over the vocabulary: `[outputs, 1, width]` → `[outputs, 1, vocabulary]`;
    /// weight `[vocabulary, width]`, often the embedding table itself.
    Logits {
        /// Input.
        x: NodeId,
        /// `[vocabulary, width]`
        weight: String,
    },
}

impl Op {
    /// The op's name in the contract (`wit/`), for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embedding { .. } => "embedding",
            Self::Linear { .. } => "linear",
            Self::RmsNorm { .. } => "rms-norm",
            Self::LayerNorm { .. } => "layer-norm",
            Self::Rope { .. } => "rope",
            Self::Attention { .. } => "attention",
            Self::Add { .. } => "add",
            Self::Mul { .. } => "mul",
            Self::Scale { .. } => "scale",
            Self::Activate { .. } => "activation",
            Self::SoftCap { .. } => "soft-cap",
            Self::Slice { .. } => "slice",
            Self::Concat { .. } => "concat",
            Self::ReshapeHeads { .. } => "reshape-heads",
            Self::MixtureOfExperts { .. } => "mixture-of-experts",
            Self::MeanPool { .. } => "mean-pool",
            Self::ClsPool { .. } => "cls-pool",
            Self::L2Normalise { .. } => "l2-normalise",
            Self::OutputRows { .. } => "output-rows",
            Self::Logits { .. } => "logits",
        }
    }

    /// The nodes this op reads, in the order of its fields.
    #[must_use]
    pub fn inputs(&self) -> Vec<NodeId> {
        match self {
            Self::Embedding { .. } => vec![],
            Self::Linear { x, .. }
            | Self::RmsNorm { x, .. }
            | Self::LayerNorm { x, .. }
            | Self::Rope { x, .. }
            | Self::Scale { x, .. }
            | Self::Activate { x, .. }
            | Self::SoftCap { x, .. }
            | Self::Slice { x, .. }
            | Self::ReshapeHeads { x, .. }
            | Self::MixtureOfExperts { x, .. }
            | Self::MeanPool { x }
            | Self::ClsPool { x }
            | Self::L2Normalise { x }
            | Self::OutputRows { x }
            | Self::Logits { x, .. } => vec![*x],
            Self::Add { a, b } | Self::Mul { a, b } => vec![*a, *b],
            Self::Attention { q, k, v, .. } => vec![*q, *k, *v],
            Self::Concat { parts } => parts.clone(),
        }
    }

    /// The names of the weights this op reads.
    #[must_use]
    pub fn weights(&self) -> Vec<&str> {
        match self {
            Self::Embedding { weight, .. } | Self::RmsNorm { weight, .. } | Self::Logits { weight, .. } => {
                vec![weight]
            }
            Self::Linear { weight, bias, .. } | Self::LayerNorm { weight, bias, .. } => {
                [weight].into_iter().chain(bias).map(String::as_str).collect()
            }
            Self::MixtureOfExperts {
                router,
                experts,
                shared,
                shared_gate,
                ..
            } => {
                let blocks = experts.iter().chain(shared);
                let blocks = blocks.flat_map(|block| [&block.gate, &block.up, &block.down]);
                [router]
                    .into_iter()
                    .chain(blocks)
                    .chain(shared_gate)
                    .map(String::as_str)
                    .collect()
            }
            Self::Rope { .. }
            | Self::Attention { .. }
            | Self::Add { .. }
            | Self::Mul { .. }
            | Self::Scale { .. }
            | Self::Activate { .. }
            | Self::SoftCap { .. }
            | Self::Slice { .. }
            | Self::Concat { .. }
            | Self::ReshapeHeads { .. }
            | Self::MeanPool { .. }
            | Self::ClsPool { .. }
            | Self::L2Normalise { .. }
            | Self::OutputRows { .. } => Vec::new(),
        }
    }
}

/// What a model guest returns from `build`. Foreign data: use only through [`crate::validate::validate`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    /// In SSA order: a node reads only nodes before it.
    pub nodes: Vec<Op>,
    /// The node whose value is the model's result.
    pub output: NodeId,
    /// Largest number of tokens of one sequence.
    pub context_tokens_max: u32,
}
