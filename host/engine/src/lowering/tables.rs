//! The program's weights and rotation tables, each entered once. Knows nothing of buffers.

use std::collections::HashMap;

use galerne_core::graph::{FeedForward, RopePairing};
use galerne_core::validate::ValidGraph;
use galerne_kernels::program::{ExpertSpec, Program, RopeId, RopeSpec, WeightId, WeightSpec};

use super::LowerError;

/// Finds what is already in the program's tables.
#[derive(Default)]
pub(super) struct Tables {
    weights: HashMap<WeightSpec, WeightId>,
    ropes: HashMap<(Vec<u32>, RopePairing, u32), RopeId>,
}

impl Tables {
    /// A matrix made of `parts`.
    pub(super) fn matrix(
        &mut self,
        program: &mut Program,
        parts: Vec<String>,
        rows: u32,
        width: u32,
    ) -> WeightId {
        let spec = WeightSpec { parts, rows, width };
        *self.weights.entry(spec).or_insert_with_key(|spec| {
            program.weights.push(spec.clone());
            WeightId(index(program.weights.len() - 1))
        })
    }

    /// A vector of `width` elements.
    pub(super) fn vector(&mut self, program: &mut Program, name: &str, width: u32) -> WeightId {
        self.matrix(program, vec![name.to_owned()], 1, width)
    }

    /// A matrix whose shape only the weight file tells.
    pub(super) fn known(
        &mut self,
        program: &mut Program,
        graph: &ValidGraph,
        name: &str,
    ) -> Result<WeightId, LowerError> {
        let (rows, width) = shape(graph, name)?;
        Ok(self.matrix(program, vec![name.to_owned()], rows, width))
    }

    /// An expert.
    pub(super) fn expert(
        &mut self,
        program: &mut Program,
        graph: &ValidGraph,
        expert: &FeedForward,
    ) -> Result<ExpertSpec, LowerError> {
        let (ffn, width) = shape(graph, &expert.gate)?;
        let parts = vec![expert.gate.clone(), expert.up.clone()];
        let gate_up = self.matrix(program, parts, ffn.saturating_mul(2), width);
        Ok(ExpertSpec {
            gate_up,
            down: self.known(program, graph, &expert.down)?,
        })
    }

    /// A rotation.
    pub(super) fn rope(
        &mut self,
        program: &mut Program,
        inv_freq: &[f32],
        pairing: RopePairing,
        attention_factor: f32,
    ) -> RopeId {
        let bits = inv_freq.iter().map(|f| f.to_bits()).collect();
        *self
            .ropes
            .entry((bits, pairing, attention_factor.to_bits()))
            .or_insert_with(|| {
                program.ropes.push(RopeSpec {
                    inv_freq: inv_freq.to_vec(),
                    pairing,
                    attention_factor,
                });
                RopeId(index(program.ropes.len() - 1))
            })
    }
}

fn shape(graph: &ValidGraph, name: &str) -> Result<(u32, u32), LowerError> {
    graph.matrix(name).ok_or_else(|| LowerError::UnknownMatrix {
        weight: name.to_owned(),
    })
}

fn index(index: usize) -> u32 {
    u32::try_from(index).expect("fewer than 2^32 table entries: a node makes at most a few thousand")
}
