//! Passes over a row of logits for the sampler, sixteen at a time. Knows no plans.
//!
//! Logits that are not a number count as minus infinity, and infinity as the largest number.

use super::simd::{Kernel, Simd, exp};
use super::weights::LANES;

/// Logits whose weights are summed apart.
pub(crate) const CHUNK: usize = 1_024;

/// A logit as it counts.
pub(crate) fn clean(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit.min(f32::MAX)
    }
}

/// The largest number, ignoring what is not a number; minus infinity if there is none.
pub(crate) struct Largest<'a>(pub(crate) &'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        const CHAINS: usize = 4;
        let (groups, rest) = self.0.as_chunks::<{ CHAINS * LANES }>();
        // SAFETY: each group has 64 elements; the caller answers for the instruction set.
        let best = unsafe {
            let mut best = [S::splat(f32::NEG_INFINITY); CHAINS];
            for group in groups {
                for (chain, best) in best.iter_mut().enumerate() {
                    // In this order the second operand wins over NaN.
                    *best = S::max(S::load(group.as_ptr().add(chain * LANES)), *best);
                }
            }
            S::max_lane(S::max(S::max(best[0], best[1]), S::max(best[2], best[3])))
        };
        rest.iter().copied().fold(best, f32::max)
    }
}

/// Index of the first element of at least `floor`.
pub(crate) struct First<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) floor: f32,
}

impl Kernel for First<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Option<usize> {
        let (groups, rest) = self.values.as_chunks::<LANES>();
        for (at, group) in groups.iter().enumerate() {
            // SAFETY: the group has 16 elements; the caller answers for the instruction set.
            let mask = unsafe { S::at_least(S::load(group.as_ptr()), S::splat(self.floor)) };
            if mask != 0 {
                return Some(at * LANES + mask.trailing_zeros() as usize);
            }
        }
        let found = rest.iter().position(|&v| v >= self.floor)?;
        Some(groups.len() * LANES + found)
    }
}

/// Copies logits as they count. Both slices have the same length.
pub(crate) struct Clean<'a> {
    pub(crate) from: &'a [f32],
    pub(crate) to: &'a mut [f32],
}

impl Kernel for Clean<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (from, from_rest) = self.from.as_chunks::<LANES>();
        let (to, to_rest) = self.to.as_chunks_mut::<LANES>();
        for (from, to) in from.iter().zip(to) {
            // SAFETY: each group has 16 elements; the caller answers for the instruction set.
            unsafe { S::store(to.as_mut_ptr(), cleaned::<S>(S::load(from.as_ptr()))) };
        }
        for (from, to) in from_rest.iter().zip(to_rest) {
            *to = clean(*from);
        }
    }
}

/// # Safety
/// See [`Simd`].
#[inline(always)]
unsafe fn cleaned<S: Simd>(logits: S::F) -> S::F {
    // SAFETY: the caller answers for the instruction set. In this order the second operand wins over NaN.
    unsafe { S::min(S::max(logits, S::splat(f32::NEG_INFINITY)), S::splat(f32::MAX)) }
}

/// Writes `e^((logit - largest) factor)` and the sum of each [`CHUNK`]. `weights` is as long as `logits`, `sums` as
/// there are chunks; `largest` and `factor` are finite.
pub(crate) struct Weigh<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) weights: &'a mut [f32],
    pub(crate) sums: &'a mut [f32],
    pub(crate) largest: f32,
    pub(crate) factor: f32,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let chunks = self.logits.chunks(CHUNK).zip(self.weights.chunks_mut(CHUNK));
        for ((logits, weights), sum) in chunks.zip(self.sums) {
            let (logits, logits_rest) = logits.as_chunks::<LANES>();
            let (weights, weights_rest) = weights.as_chunks_mut::<LANES>();
            // SAFETY: each group has 16 elements; the caller answers for the instruction set.
            *sum = unsafe {
                let mut total = S::splat(0.0);
                for (from, to) in logits.iter().zip(weights) {
                    let below = S::sub(cleaned::<S>(S::load(from.as_ptr())), S::splat(self.largest));
                    let weight = exp::<S>(S::mul(below, S::splat(self.factor)));
                    S::store(to.as_mut_ptr(), weight);
                    total = S::add(total, weight);
                }
                S::sum(total)
            };
            for (&logit, weight) in logits_rest.iter().zip(weights_rest) {
                *weight = ((clean(logit) - self.largest) * self.factor).max(-87.3).exp();
                *sum += *weight;
            }
        }
    }
}

/// The sum of `weights` whose `keys` are at least `floor`. Both slices have the same length.
pub(crate) struct MassFrom<'a> {
    pub(crate) keys: &'a [f32],
    pub(crate) weights: &'a [f32],
    pub(crate) floor: f32,
}

impl Kernel for MassFrom<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        const CHAINS: usize = 4;
        let (keys, keys_rest) = self.keys.as_chunks::<{ CHAINS * LANES }>();
        let (weights, weights_rest) = self.weights.as_chunks::<{ CHAINS * LANES }>();
        // SAFETY: each group has 64 elements; the caller answers for the instruction set.
        let mass = unsafe {
            let floor = S::splat(self.floor);
            let mut masses = [S::splat(0.0); CHAINS];
            for (keys, weights) in keys.iter().zip(weights) {
                for (chain, mass) in masses.iter_mut().enumerate() {
                    let key = S::load(keys.as_ptr().add(chain * LANES));
                    let weight = S::load(weights.as_ptr().add(chain * LANES));
                    *mass = S::add(*mass, S::keep_from(key, floor, weight));
                }
            }
            S::sum(S::add(S::add(masses[0], masses[1]), S::add(masses[2], masses[3])))
        };
        let rest = keys_rest.iter().zip(weights_rest);
        rest.fold(
            mass,
            |mass, (&key, &weight)| if key >= self.floor { mass + weight } else { mass },
        )
    }
}

/// Calls `found` with the indices of the elements from `floor` on and, if given, not from `ceiling` on, in order. A floor of
/// minus infinity takes what is not a number too.
pub(crate) struct Between<'a, F> {
    pub(crate) values: &'a [f32],
    pub(crate) floor: f32,
    pub(crate) ceiling: Option<f32>,
    pub(crate) found: F,
}

impl<F: FnMut(usize)> Kernel for Between<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let (groups, rest) = self.values.as_chunks::<LANES>();
        let every = if self.floor == f32::NEG_INFINITY {
            u16::MAX
        } else {
            0
        };
        // Nothing is at least NaN.
        let ceiling = self.ceiling.unwrap_or(f32::NAN);
        for (at, group) in groups.iter().enumerate() {
            // SAFETY: the group has 16 elements; the caller answers for the instruction set.
            let mut mask = unsafe {
                let values = S::load(group.as_ptr());
                (S::at_least(values, S::splat(self.floor)) | every) & !S::at_least(values, S::splat(ceiling))
            };
            while mask != 0 {
                (self.found)(at * LANES + mask.trailing_zeros() as usize);
                mask &= mask - 1;
            }
        }
        for (i, &value) in rest.iter().enumerate() {
            let is_below = self
                .ceiling
                .is_none_or(|ceiling| value.is_nan() || value < ceiling);
            if (value >= self.floor || every != 0) && is_below {
                (self.found)(groups.len() * LANES + i);
            }
        }
    }
}

/// Index of element `n` of those from `floor` on and below `ceiling`, or of the last of them.
pub(crate) struct Nth<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) floor: f32,
    pub(crate) ceiling: f32,
    pub(crate) n: usize,
}

impl Kernel for Nth<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Option<usize> {
        let (groups, rest) = self.values.as_chunks::<LANES>();
        let (mut left, mut last) = (self.n, None);
        for (at, group) in groups.iter().enumerate() {
            // SAFETY: the group has 16 elements; the caller answers for the instruction set.
            let mut mask = unsafe {
                let values = S::load(group.as_ptr());
                S::at_least(values, S::splat(self.floor)) & !S::at_least(values, S::splat(self.ceiling))
            };
            let count = mask.count_ones() as usize;
            if left < count {
                for _ in 0..left {
                    mask &= mask - 1;
                }
                return Some(at * LANES + mask.trailing_zeros() as usize);
            }
            left -= count;
            if mask != 0 {
                last = Some(at * LANES + mask.ilog2() as usize);
            }
        }
        for (i, &value) in rest.iter().enumerate() {
            if value >= self.floor && value < self.ceiling {
                last = Some(groups.len() * LANES + i);
                if left == 0 {
                    return last;
                }
                left -= 1;
            }
        }
        last
    }
}
