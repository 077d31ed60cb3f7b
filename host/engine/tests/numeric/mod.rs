//! Two interpreters in f64, for one sequence and without a cache: of graphs as the contract defines them, and
//! of programs as the device's contract defines them. They share the row arithmetic and nothing else.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod build;
pub mod graph;
pub mod math;
pub mod program;

use std::collections::BTreeMap;

use galerne_core::dtype::DType;
use galerne_core::weights::{WeightIndex, WeightInfo, WeightReadError, WeightSource, WeightView};

/// Weights in memory, f32, small and different for every name.
#[derive(Debug, Default)]
pub struct Weights {
    index: WeightIndex,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl Weights {
    /// Makes up a tensor.
    pub fn add(&mut self, name: &str, shape: &[u32]) {
        let shape: Vec<u64> = shape.iter().copied().map(u64::from).collect();
        let count: u64 = shape.iter().product();
        let mut state = name
            .bytes()
            .fold(0x51_7c_c1_b7, |h: u64, b| h.wrapping_mul(131) ^ u64::from(b));
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 1.2
        };
        let bytes = (0..count).flat_map(|_| next().to_le_bytes()).collect();
        self.bytes.insert(name.to_owned(), bytes);
        self.index.tensors.insert(
            name.to_owned(),
            WeightInfo {
                dtype: DType::F32,
                shape,
            },
        );
    }

    /// All elements of a tensor, and those of one row.
    pub fn values(&self, name: &str) -> (Vec<f64>, usize) {
        let bytes = &self.bytes[name];
        let value = |b: &[u8]| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let width = self.index.tensors[name]
            .shape
            .last()
            .copied()
            .expect("no scalars");
        (
            bytes.chunks_exact(4).map(value).collect(),
            usize::try_from(width).expect("small"),
        )
    }
}

impl WeightSource for Weights {
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
