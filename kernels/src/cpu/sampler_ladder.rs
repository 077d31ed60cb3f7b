//! Between which two logits a sum of weights is met, found by sums above members of a sorted sample. Knows no tokens.

use super::isa::Isa;
use super::sampler_passes::{MassFrom, Nth, clean};
use super::simd::dispatch;

/// Neighbours so near in the sample are not told apart by sums over the whole row.
const NEAR: usize = 6;
/// Where a sum is first tried, this far to both sides of where the sample alone puts it.
const GUESS_ERROR: usize = 12;
/// How logits become weights: `e^((logit - largest) factor)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// The largest logit, finite.
    pub(crate) largest: f32,
    /// One over the temperature, finite.
    pub(crate) factor: f32,
}

/// When a sum is enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edge {
    /// As soon as it is the target.
    Reaches,
    /// Once it is larger.
    Passes,
}

impl Edge {
    pub(crate) fn is_met(self, sum: f64, target: f64) -> bool {
        match self {
            Self::Reaches => sum >= target,
            Self::Passes => sum > target,
        }
    }
}

/// Where a target lies: logits from `floor` on and below `ceiling`, after weights of `above`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) floor: f32,
    pub(crate) ceiling: Option<f32>,
    pub(crate) above: f64,
}

/// A sorted sample of some logits, and the sums known at its members.
#[derive(Debug, Default)]
pub(crate) struct Ladder {
    /// Downwards.
    pub(crate) floors: Vec<f32>,
    /// Where the sum is estimated to be, as a fraction of the whole: a running sum of the sample's weights.
    guesses: Vec<f32>,
    masses: Vec<Option<f32>>,
}

/// A target in logits with weights.
#[derive(Clone, Copy)]
pub(crate) struct Hunt<'a> {
    pub(crate) isa: Isa,
    pub(crate) logits: &'a [f32],
    pub(crate) weights: &'a [f32],
    /// The sum before all of these logits.
    pub(crate) base: f64,
    pub(crate) target: f64,
    pub(crate) edge: Edge,
}

impl Hunt<'_> {
    fn mass_from(&self, floor: f32) -> f32 {
        let pass = MassFrom {
            keys: self.logits,
            weights: self.weights,
            floor,
        };
        // SAFETY: the instruction set is the device's; both slices have the same length.
        unsafe { dispatch(self.isa, pass) }
    }

    /// Index and sum of the element at which the target is met, if that is in the span and the span's logits are
    /// all equal to its floor; else the span without them, if the target is met before.
    pub(crate) fn settle(&self, span: Span) -> Result<(usize, f64), Span> {
        let end = span.floor.next_up();
        let mass = self.base + f64::from(self.mass_from(end));
        if self.edge.is_met(mass, self.target) {
            return Err(Span { floor: end, ..span });
        }
        let nth = |n| Nth {
            values: self.logits,
            floor: span.floor,
            ceiling: end,
            n,
        };
        // SAFETY: the instruction set is the device's.
        let first = unsafe { dispatch(self.isa, nth(0)) }.ok_or(span)?;
        let weight = f64::from(self.weights[first]);
        let steps = (self.target - mass) / weight;
        let n = match self.edge {
            Edge::Reaches => (steps.ceil() - 1.0).max(0.0),
            Edge::Passes => steps.floor().max(0.0),
        };
        // SAFETY: the instruction set is the device's.
        let at = unsafe { dispatch(self.isa, nth(n as usize)) }.ok_or(span)?;
        Ok((at, mass + (n + 1.0) * weight))
    }
}
impl Ladder {
    /// At most `count` of the logits, evenly spread, and `extra`, without what [`Ladder::find`] needs to know of them.
    pub(crate) fn sample(&mut self, logits: &[f32], count: usize, extra: Option<f32>) {
        let stride = logits.len().div_ceil(count).max(1);
        self.floors.clear();
        self.floors
            .extend(logits.iter().step_by(stride).map(|&v| clean(v)));
        self.floors.extend(extra);
        self.floors.sort_unstable_by(|a, b| b.total_cmp(a));
    }

    /// At most `count` of the logits, evenly spread, and `extra`.
    pub(crate) fn fill(&mut self, logits: &[f32], count: usize, scale: Scale, extra: Option<f32>) {
        self.sample(logits, count, extra);
        self.masses.clear();
        self.masses.resize(self.floors.len(), None);
        let mut sum = 0.0;
        self.guesses.clear();
        self.guesses.extend(self.floors.iter().map(|&floor| {
            sum += ((floor - scale.largest) * scale.factor).exp();
            sum
        }));
        self.guesses.iter_mut().for_each(|guess| *guess /= sum);
    }

    /// The sum from member `at` on upwards.
    pub(crate) fn mass(&mut self, hunt: Hunt<'_>, at: usize) -> f64 {
        let floor = self.floors[at];
        hunt.base + f64::from(*self.masses[at].get_or_insert_with(|| hunt.mass_from(floor)))
    }

    /// The span between neighbours in which the target, `fraction` of the whole, is met.
    pub(crate) fn find(&mut self, hunt: Hunt<'_>, fraction: f64) -> Span {
        // The target is not met at members before `low` and is met at member `high`, if there is one.
        let (mut low, mut high) = (0, self.floors.len());
        let guess = self.guesses.partition_point(|&guess| f64::from(guess) < fraction);
        let mut probes = [0, guess.saturating_sub(GUESS_ERROR), guess + GUESS_ERROR].into_iter();
        while low < high {
            let at = match probes.next() {
                Some(at) if (low..high).contains(&at) => at,
                Some(_) => continue,
                None if high - low <= NEAR => break,
                None => low.midpoint(high),
            };
            if hunt.edge.is_met(self.mass(hunt, at), hunt.target) {
                high = at;
            } else {
                low = at + 1;
            }
        }
        Span {
            floor: self.floors.get(high).copied().unwrap_or(f32::NEG_INFINITY),
            ceiling: low.checked_sub(1).map(|at| self.floors[at]),
            above: low.checked_sub(1).map_or(hunt.base, |at| self.mass(hunt, at)),
        }
    }
}
