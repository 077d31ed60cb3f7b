//! What the host knows of a weight file: names, dtypes, shapes, and where the bytes are.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::dtype::DType;

/// Name, dtype and logical shape of one stored tensor, outermost dimension first (`[out, in]` for a matrix).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightInfo {
    /// How elements are stored.
    pub dtype: DType,
    /// Logical shape in elements, outermost first.
    pub shape: Vec<u64>,
}

/// All weights of a model by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightIndex {
    /// By the name in the safetensors file.
    pub tensors: BTreeMap<String, WeightInfo>,
}

/// A weight's bytes, row-major, in its stored layout, with its description.
#[derive(Debug, Clone)]
pub struct WeightView<'a> {
    /// How elements are stored.
    pub dtype: DType,
    /// Logical shape in elements, outermost first.
    pub shape: &'a [u64],
    /// Rows in order, each `dtype.row_bytes(inner)` bytes, without padding. Not necessarily aligned.
    pub bytes: Cow<'a, [u8]>,
}

/// A weight's bytes cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("read weight \"{name}\": {source}")]
pub struct WeightReadError {
    /// The weight.
    pub name: String,
    /// The operating system's answer.
    pub source: std::io::Error,
}

/// Gives the bytes of weights, typically from files. Whoever asks drops one weight's bytes before asking for the next, so
/// that a model larger than half the memory can be loaded.
pub trait WeightSource: Send + Sync {
    /// The weight called `name`, or `None` if there is none.
    ///
    /// # Errors
    /// The file cannot be read.
    fn weight(&self, name: &str) -> Result<Option<WeightView<'_>>, WeightReadError>;
    /// Names, dtypes and shapes of all weights.
    fn index(&self) -> &WeightIndex;
}
