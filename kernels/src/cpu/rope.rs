//! Rotary position embedding: tables of cosines and sines per step, and the rotation of one row's heads.
//! Knows nothing of attention.

use galerne_core::graph::RopePairing;

use super::isa::Isa;
use super::memory::Memory;
use super::simd::{Kernel, Simd, dispatch};
use crate::device::DeviceError;
use crate::program::RopeSpec;

/// The rotation of a row, compiled for each instruction set.
struct Rotate<'a> {
    pairing: RopePairing,
    cosines: &'a [f32],
    sines: &'a [f32],
    row: &'a mut [f32],
    head_width: usize,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let pairs = self.cosines.len();
        for head in self.row.chunks_exact_mut(self.head_width) {
            match self.pairing {
                RopePairing::Half => {
                    let (a, rest) = head.split_at_mut(pairs);
                    let angles = self.cosines.iter().zip(self.sines);
                    for ((a, b), (c, s)) in a.iter_mut().zip(rest).zip(angles) {
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
                RopePairing::Interleaved => {
                    let angles = self.cosines.iter().zip(self.sines);
                    for (pair, (c, s)) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                        let [a, b] = *pair;
                        *pair = [a * c - b * s, b * c + a * s];
                    }
                }
            }
        }
    }
}

/// Cosines and sines of the step's tokens: computed once, used by every layer.
#[derive(Debug)]
pub(crate) struct RopeTable {
    spec: RopeSpec,
    /// `[tokens, 2, pairs]`
    memory: Memory,
    tokens_max: usize,
}

impl RopeTable {
    /// Room for `tokens_max` tokens.
    pub(crate) fn new(spec: &RopeSpec, tokens_max: usize) -> Result<Self, DeviceError> {
        let memory = Memory::zeroed("rotation tables", tokens_max * 2 * spec.inv_freq.len() * 4)?;
        Ok(Self {
            spec: spec.clone(),
            memory,
            tokens_max,
        })
    }

    /// Fills in one token.
    ///
    /// # Safety
    /// Nobody else touches this token's part.
    pub(crate) unsafe fn fill(&self, token: usize, position: u32) {
        // SAFETY: exclusive by contract.
        let (cosines, sines) = unsafe { self.slices(token) };
        for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&self.spec.inv_freq) {
            // The angle is rounded to f32 as in the models' own implementation.
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            *cosine = c as f32 * self.spec.attention_factor;
            *sine = s as f32 * self.spec.attention_factor;
        }
    }

    /// Rotates every head of one row in place.
    ///
    /// # Safety
    /// The machine has `isa`; the token has been filled in and nobody fills it in meanwhile.
    pub(crate) unsafe fn rotate(&self, isa: Isa, token: usize, row: &mut [f32], head_width: usize) {
        // SAFETY: only read here, and nobody writes by contract.
        let (cosines, sines) = unsafe { self.slices(token) };
        let rotate = Rotate {
            pairing: self.spec.pairing,
            cosines,
            sines,
            row,
            head_width,
        };
        // SAFETY: by contract.
        unsafe { dispatch(isa, rotate) };
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }

    /// # Safety
    /// As for any two `&mut` slices: readers may share, a writer is alone with its token.
    #[expect(
        clippy::mut_from_ref,
        reason = "shared memory; the callers' contracts say who may write"
    )]
    unsafe fn slices(&self, token: usize) -> (&mut [f32], &mut [f32]) {
        assert!(token < self.tokens_max);
        let pairs = self.spec.inv_freq.len();
        // SAFETY: the token's part lies within the memory sized in `new`.
        let both =
            unsafe { std::slice::from_raw_parts_mut(self.memory.f32s().add(token * 2 * pairs), 2 * pairs) };
        both.split_at_mut(pairs)
    }
}
