//! Element types of stored tensors and their block layouts. Block formats are GGUF's.

use serde::{Deserialize, Serialize};

/// How a tensor's elements are stored.
///
/// Quantized layouts are GGUF's (little-endian, blocks of 32 along the row unless said otherwise):
/// - `Q4_0`: f16 scale `d`, 16 bytes of nibbles; element `i < 16` is the low nibble of byte `i`, element
///   `i + 16` its high nibble; value `d * (q - 8)`. 18 bytes.
/// - `Q4_1`: f16 scale `d`, f16 minimum `m`, 16 bytes of nibbles in the same order; value `d * q + m`. 20 bytes.
/// - `Q8_0`: f16 scale `d`, 32 signed bytes; value `d * q`. 34 bytes.
/// - `Q5_0`, `Q5_1`: like `Q4_0` and `Q4_1`, with four bytes of fifth bits before the nibbles; value `d * (q - 16)` and
///   `d * q + m`. 22 and 24 bytes.
/// - `IQ4_NL`: like `Q4_0`, but the nibble selects one of 16 fixed values. 18 bytes.
/// - `Q4_K`, `Q5_K`, `Q6_K`: blocks of 256 with a scale, itself quantized, for every 32, 32 and 16 elements. 144, 176 and
///   210 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// 4-bit blocks of 32 with a scale.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 4-bit blocks of 32 with a scale and a minimum.
    #[serde(rename = "q4_1")]
    Q4_1,
    /// 8-bit blocks of 32 with a scale.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 5-bit blocks of 32 with a scale.
    #[serde(rename = "q5_0")]
    Q5_0,
    /// 5-bit blocks of 32 with a scale and a minimum.
    #[serde(rename = "q5_1")]
    Q5_1,
    /// Blocks of 32 of 16 unevenly spaced values with a scale.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    /// 4-bit blocks of 256 with 8 scales and minima.
    #[serde(rename = "q4_k")]
    Q4K,
    /// 5-bit blocks of 256 with 8 scales and minima.
    #[serde(rename = "q5_k")]
    Q5K,
    /// 6-bit blocks of 256 with 16 scales.
    #[serde(rename = "q6_k")]
    Q6K,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q8_0,
        Self::Q5_0,
        Self::Q5_1,
        Self::Iq4Nl,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Elements in one block: 1 for plain types.
    #[must_use]
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 | Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `elements`, or `None` if the row is not whole blocks or overflows.
    #[must_use]
    pub const fn row_bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// The name used in manifests and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q8_0 => "q8_0",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Iq4Nl => "iq4_nl",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// The type with this [`name`](Self::name).
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
