//! A lowered graph: instructions over numbered buffers, submitted to a device as a whole.
//!
//! A buffer holds f32 rows of a fixed number of elements; how many rows it has is known at each step
//! ([`Rows`]). An instruction reads and writes [`View`]s: columns of a buffer. Instructions run in order.

use galerne_core::graph::{Activation, EmbeddingIndex, RopePairing, RouterNormalisation, Rows};
use galerne_core::ids::LayerId;

macro_rules! index {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);

        impl $name {
            /// The index into the program's table.
            #[must_use]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

index!(/// A buffer of [`Program::buffers`].
    BufferId);
index!(/// A weight of [`Program::weights`].
    WeightId);
index!(/// A rotation table of [`Program::ropes`].
    RopeId);

/// Columns `start .. start + width` of every row of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct View {
    /// The buffer.
    pub buffer: BufferId,
    /// First column.
    pub start: u32,
    /// Number of columns.
    pub width: u32,
}

/// Rows and columns of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferSpec {
    /// What its rows stand for; how many there are is known at each step.
    pub rows: Rows,
    /// Elements per row.
    pub width: u32,
}

/// A weight as the program uses it: named tensors joined along their outermost dimension (fused QKV, gate-up).
/// A vector `[n]` counts as one row of `n` elements; several vectors join to one longer row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WeightSpec {
    /// Names in the weight file, in order. Dtypes may differ between parts.
    pub parts: Vec<String>,
    /// Rows of all parts together (1 for a vector).
    pub rows: u32,
    /// Elements per row.
    pub width: u32,
}

/// A rotation: see `Op::Rope`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequencies, one per rotated pair.
    pub inv_freq: Vec<f32>,
    /// How rotated dimensions are paired.
    pub pairing: RopePairing,
    /// Factor on sine and cosine.
    pub attention_factor: f32,
}

/// A normalisation over groups of `width` elements (a row, or one head of it).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Root mean square or mean and variance.
    pub kind: NormKind,
    /// `[width]`
    pub weight: WeightId,
    /// Elements normalised together; divides the view's width.
    pub width: u32,
    /// Added under the square root.
    pub eps: f32,
}

/// The two normalisations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `x / rms(x) * (w + weight_offset)`
    Rms {
        /// Added to every weight.
        weight_offset: f32,
    },
    /// `(x - mean) / sqrt(var + eps) * w + b`
    Layer {
        /// `[width]`
        bias: Option<WeightId>,
    },
}

/// Shape of one attention layer and its part of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionLayer {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_width: u32,
    /// Factor on `q . k`.
    pub scale: f32,
    /// Whether a token sees only itself and earlier ones.
    pub causal: bool,
    /// A token sees at most this many last positions.
    pub sliding_window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Weights of one gated feed-forward: `gate_up` is `[2 * ffn, width]` (gate rows first), `down` `[width, ffn]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertSpec {
    /// Gate rows, then up rows.
    pub gate_up: WeightId,
    /// Back to the model's width.
    pub down: WeightId,
}

/// A mixture of experts: see `Op::MixtureOfExperts`.
#[derive(Debug, Clone, PartialEq)]
pub struct MixtureSpec {
    /// `[experts, width]`
    pub router: WeightId,
    /// All experts.
    pub experts: Vec<ExpertSpec>,
    /// Experts per row.
    pub top_k: u32,
    /// How scores become weights.
    pub normalisation: RouterNormalisation,
    /// The experts' activation.
    pub function: Activation,
    /// An expert every row passes through.
    pub shared: Option<ExpertSpec>,
    /// `[1, width]`
    pub shared_gate: Option<WeightId>,
}

/// One instruction. Unless said otherwise `out` may not overlap an input.
#[derive(Debug, Clone, PartialEq)]
pub enum Instr {
    /// Rows of a table.
    Embedding {
        /// `[entries, width]`
        table: WeightId,
        /// Which row.
        index: EmbeddingIndex,
        /// `[tokens, width]`
        out: View,
    },
    /// `out = x W^T + bias`, or `out += x W^T + bias` if `accumulate` (the fused residual).
    Linear {
        /// `[rows, in]`
        x: View,
        /// `[out, in]`
        weight: WeightId,
        /// `[out]`
        bias: Option<WeightId>,
        /// Whether to add to what is in `out`.
        accumulate: bool,
        /// `[rows, out]`
        out: View,
    },
    /// `out = norm(x)`; `out` may be `x`.
    Norm {
        /// Input.
        x: View,
        /// Which.
        norm: NormSpec,
        /// Output.
        out: View,
    },
    /// `residual += delta; out = norm(residual)`: the fused residual add and norm.
    AddNorm {
        /// Read and written.
        residual: View,
        /// Added.
        delta: View,
        /// Which.
        norm: NormSpec,
        /// Output.
        out: View,
    },
    /// Rotates every head of `x` in place.
    Rope {
        /// `[tokens, heads * head_width]`, read and written.
        x: View,
        /// The table.
        rope: RopeId,
        /// Elements per head.
        head_width: u32,
    },
    /// Rotates `q` in place, rotates `k`, and appends `k` and `v` to the layer's KV blocks, all in one pass.
    /// Without tables it only appends. `k` in its buffer may be left rotated or not.
    RopeAppend {
        /// The attention layer.
        layer: LayerId,
        /// `[tokens, heads * head_width]`, read and written.
        q: View,
        /// `[tokens, kv_heads * head_width]`
        k: View,
        /// `[tokens, kv_heads * head_width]`
        v: View,
        /// Rotation of q.
        q_rope: Option<RopeId>,
        /// Rotation of k.
        k_rope: Option<RopeId>,
    },
    /// Attention of `q` over the layer's KV blocks, the step's own tokens included.
    Attention {
        /// The attention layer.
        layer: LayerId,
        /// `[tokens, heads * head_width]`
        q: View,
        /// `[tokens, heads * head_width]`
        out: View,
    },
    /// `out = function(gate) * up`; `out` may be `gate`.
    ActivateMul {
        /// Through the function.
        gate: View,
        /// Multiplied.
        up: View,
        /// Which.
        function: Activation,
        /// Output.
        out: View,
    },
    /// `out = a + b`; `out` may be `a` or `b`.
    Add {
        /// Left.
        a: View,
        /// Right.
        b: View,
        /// Output.
        out: View,
    },
    /// `out = a * b`; `out` may be `a` or `b`.
    Mul {
        /// Left.
        a: View,
        /// Right.
        b: View,
        /// Output.
        out: View,
    },
    /// `out = x * factor`; `out` may be `x`.
    Scale {
        /// Input.
        x: View,
        /// The constant.
        factor: f32,
        /// Output.
        out: View,
    },
    /// `out = function(x)`; `out` may be `x`.
    Activate {
        /// Input.
        x: View,
        /// Which.
        function: Activation,
        /// Output.
        out: View,
    },
    /// `out = cap * tanh(x / cap)`; `out` may be `x`.
    SoftCap {
        /// Input.
        x: View,
        /// The bound.
        cap: f32,
        /// Output.
        out: View,
    },
    /// `out = x` (slices and joins that no view can express). Groups of `group` columns are taken every
    /// `x_stride` columns of `x` and put every `out_stride` columns of `out`.
    Copy {
        /// Input.
        x: View,
        /// Output.
        out: View,
        /// Columns copied together.
        group: u32,
        /// Columns between groups in `x`.
        x_stride: u32,
        /// Columns between groups in `out`.
        out_stride: u32,
        /// Number of groups.
        groups: u32,
    },
    /// A mixture of experts.
    Mixture {
        /// `[rows, width]`
        x: View,
        /// Router and experts.
        mixture: Box<MixtureSpec>,
        /// `[rows, width]`
        out: View,
    },
    /// Mean of each sequence's rows of this step.
    MeanPool {
        /// `[tokens, width]`
        x: View,
        /// `[sequences, width]`
        out: View,
    },
    /// First row of each sequence of this step.
    ClsPool {
        /// `[tokens, width]`
        x: View,
        /// `[sequences, width]`
        out: View,
    },
    /// `x / max(|x|, 1e-12)` over groups of `width` elements; `out` may be `x`.
    L2Normalise {
        /// Input.
        x: View,
        /// Elements normalised together.
        width: u32,
        /// Output.
        out: View,
    },
    /// The rows in [`crate::device::StepBatch::output_rows`].
    OutputRows {
        /// `[tokens, width]`
        x: View,
        /// `[outputs, width]`
        out: View,
    },
}

/// A lowered model. Built by the engine from a validated graph; devices may rely on shapes being consistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// In the order they run.
    pub instrs: Vec<Instr>,
    /// All buffers. A device may let buffers whose lives do not overlap share memory.
    pub buffers: Vec<BufferSpec>,
    /// All weights.
    pub weights: Vec<WeightSpec>,
    /// All rotation tables.
    pub ropes: Vec<RopeSpec>,
    /// Attention layers by [`LayerId`].
    pub layers: Vec<AttentionLayer>,
    /// The result: logits `[outputs, vocabulary]`, or hidden states of an encoder.
    pub output: View,
    /// Largest number of tokens of one sequence.
    pub context_tokens_max: u32,
}
