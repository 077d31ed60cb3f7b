//! Weights in memory and the numbers that fill them. Knows nothing of devices.

use std::collections::BTreeMap;

use galerne_core::dtype::DType;
use galerne_core::weights::{WeightIndex, WeightInfo, WeightReadError, WeightSource, WeightView};

use crate::quant;

/// A weight file in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryWeights {
    index: WeightIndex,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl MemoryWeights {
    /// Adds a tensor in its stored form: rows of `shape`'s last dimension in `dtype`'s layout.
    pub fn insert_bytes(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: Vec<u8>) {
        let info = WeightInfo {
            dtype,
            shape: shape.to_vec(),
        };
        self.index.tensors.insert(name.to_owned(), info);
        self.bytes.insert(name.to_owned(), bytes);
    }

    /// Adds a tensor, stored as `dtype`.
    pub fn insert(&mut self, name: &str, dtype: DType, shape: &[u64], values: &[f32]) {
        self.insert_bytes(name, dtype, shape, quant::quantize(dtype, values));
    }

    /// All elements of a tensor as stored, in f32; empty if there is none of this name.
    #[must_use]
    pub fn dequantized(&self, name: &str) -> Vec<f32> {
        let Ok(Some(view)) = self.weight(name) else {
            return vec![];
        };
        let mut values = vec![0.0; view.shape.iter().product::<u64>() as usize];
        quant::dequantize(view.dtype, &view.bytes, &mut values);
        values
    }
}

impl WeightSource for MemoryWeights {
    fn weight(&self, name: &str) -> Result<Option<WeightView<'_>>, WeightReadError> {
        let (Some(info), Some(bytes)) = (self.index.tensors.get(name), self.bytes.get(name)) else {
            return Ok(None);
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

/// A small generator of reproducible numbers (xorshift64*, Vigna 2016).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next 64 bits.
    pub fn next_bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A whole number below `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        ((self.next_bits() >> 32) % u64::from(end.max(1))) as u32
    }

    /// Roughly normal with standard deviation `size`.
    pub fn normal(&mut self, size: f32) -> f32 {
        let sum: u64 = (0..4).map(|_| self.next_bits() >> 40).sum();
        (sum as f32 / (1u64 << 24) as f32 - 2.0) * 1.732 * size
    }

    /// Many of [`Numbers::normal`].
    pub fn normals(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal(size)).collect()
    }
}
