//! A mixture of experts for one row: router, choice, feed-forwards, weighted sum. One worker computes a row
//! from end to end, so a row's result does not depend on the batch. Knows nothing of programs' buffers.

use std::sync::Arc;

use galerne_core::graph::RouterNormalisation;

use super::elementwise::{Elementwise, elementwise};
use super::isa::Isa;
use super::linear::{LinearIn, LinearOut, linear};
use super::memory::{Memory, Rect};
use super::quantize_rows::{QuantBuffer, quantize_row};
use super::weights::Matrix;
use crate::device::DeviceError;
use crate::program::{ExpertSpec, MixtureSpec, WeightId};

/// A matrix and the output column at which it starts.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) column: usize,
    pub(crate) matrix: Arc<Matrix>,
}

/// One worker's room for a row's experts.
#[derive(Debug)]
pub(crate) struct MixtureScratch {
    /// Router scores, then gate and up, then the expert's output.
    memory: Memory,
    scores_max: usize,
    inner_max: usize,
    width_max: usize,
}

impl MixtureScratch {
    /// Room for the largest of a program's mixtures.
    pub(crate) fn new(scores: usize, inner: usize, width: usize) -> Result<Self, DeviceError> {
        let memory = Memory::zeroed("mixture scratch", (scores + inner + width) * 4)?;
        Ok(Self {
            memory,
            scores_max: scores,
            inner_max: inner,
            width_max: width,
        })
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }

    fn row(&self, first: usize, width: usize, room: usize) -> Rect {
        assert!(width <= room);
        // SAFETY: the three parts lie one after the other in the memory, each as large as its room.
        let base = unsafe { self.memory.f32s().add(first) };
        Rect {
            base,
            stride: width,
            width,
            rows: 1,
        }
    }

    fn scores(&self, width: usize) -> Rect {
        self.row(0, width, self.scores_max)
    }

    fn inner(&self, width: usize) -> Rect {
        self.row(self.scores_max, width, self.inner_max)
    }

    fn output(&self, width: usize) -> Rect {
        self.row(self.scores_max + self.inner_max, width, self.width_max)
    }
}

/// What a row is computed with.
pub(crate) struct Mixture<'a> {
    pub(crate) isa: Isa,
    pub(crate) spec: &'a MixtureSpec,
    pub(crate) matrices: &'a [Vec<Part>],
    pub(crate) scratch: &'a MixtureScratch,
    /// Room for one quantized row, if the precision allows it.
    pub(crate) quant: Option<&'a QuantBuffer>,
}

impl Mixture<'_> {
    /// Computes the only row of `x` into the only row of `out`.
    ///
    /// # Safety
    /// `isa` is the machine's; nobody else touches the rows or the scratch.
    pub(crate) unsafe fn row(&self, x: Rect, out: Rect) {
        let spec = self.spec;
        let scores = self.scratch.scores(spec.experts.len());
        // SAFETY: scratch and rows are this worker's own by contract; slices of scratch parts do not overlap.
        unsafe {
            out.row_mut(0).fill(0.0);
            self.linear(x, spec.router, scores);
            for (expert, weight) in choose(scores.row(0), spec) {
                self.expert(x, spec.experts[expert], weight, out);
            }
            if let Some(shared) = spec.shared {
                let weight = spec.shared_gate.map_or(1.0, |gate| {
                    let score = self.scratch.scores(1);
                    self.linear(x, gate, score);
                    1.0 / (1.0 + (-score.row(0)[0]).exp())
                });
                self.expert(x, shared, weight, out);
            }
        }
    }

    /// # Safety
    /// See [`Mixture::row`].
    unsafe fn expert(&self, x: Rect, expert: ExpertSpec, weight: f32, out: Rect) {
        let inner = self.matrices[expert.gate_up.index()]
            .iter()
            .map(|part| part.matrix.rows)
            .sum();
        let both = self.scratch.inner(inner);
        let gate = Rect {
            width: inner / 2,
            ..both
        };
        // SAFETY: the second half of the row.
        let up = unsafe { both.base.add(inner / 2) };
        let up = Rect { base: up, ..gate };
        let result = self.scratch.output(out.width);
        // SAFETY: scratch is this worker's own by contract.
        unsafe {
            self.linear(x, expert.gate_up, both);
            elementwise(
                self.isa,
                Elementwise::ActivateMul(self.spec.function),
                gate,
                up,
                gate,
                0,
            );
            self.linear(gate, expert.down, result);
            for (out, value) in out.row_mut(0).iter_mut().zip(result.row(0)) {
                *out += weight * value;
            }
        }
    }

    /// # Safety
    /// See [`Mixture::row`].
    unsafe fn linear(&self, x: Rect, weight: WeightId, out: Rect) {
        for part in &self.matrices[weight.index()] {
            let quantized = part.matrix.dtype.block_elements() > 1;
            let quant = self
                .quant
                .filter(|_| quantized)
                .map(|buffer| buffer.rows(x.width));
            let out = LinearOut {
                rect: out,
                column: part.column,
                bias: None,
                accumulate: false,
            };
            // SAFETY: one row each; scratch is this worker's own by contract.
            unsafe {
                if let Some(quant) = quant {
                    quantize_row(self.isa, x, quant, 0);
                }
                let input = LinearIn {
                    float: x,
                    quant,
                    split: None,
                    rounded: None,
                    prompts: 0,
                    room: None,
                };
                linear(
                    self.isa,
                    &part.matrix,
                    0..part.matrix.panels(),
                    0..x.rows,
                    input,
                    out,
                );
            }
        }
    }
}

/// The chosen experts and their weights, best first; equal scores go to the lower index.
fn choose(scores: &[f32], spec: &MixtureSpec) -> Vec<(usize, f32)> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = match spec.normalisation {
        RouterNormalisation::SoftmaxAll | RouterNormalisation::SoftmaxChosen => {
            let raised: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f32 = raised.iter().sum();
            raised.into_iter().map(|weight| weight / total).collect()
        }
        RouterNormalisation::SigmoidChosen => {
            scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect()
        }
    };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(spec.top_k as usize);
    let chosen: f32 = order.iter().map(|&expert| weights[expert]).sum();
    let divisor = if spec.normalisation == RouterNormalisation::SoftmaxAll {
        1.0
    } else {
        chosen
    };
    order
        .into_iter()
        .map(|expert| (expert, weights[expert] / divisor))
        .collect()
}
