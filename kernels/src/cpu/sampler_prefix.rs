//! A row's tokens by likelihood, without sorting the row: where a cumulative weight is reached, and the few most likely
//! tokens. Knows no plans.
//!
//! Tokens are ordered by logit, largest first, equal ones by id. A filter keeps a beginning of that order, so that
//! both cutting at a probability and drawing ask where a sum of weights is reached. A pass sums the weights above one
//! logit. Those tried come from a sorted sample of the row, which also says where to begin; what lies between two
//! neighbours is a small part of the row, and the same is done to that until it is small enough to sort.

use galerne_core::ids::TokenId;

use super::isa::Isa;
use super::sampler_ladder::{Edge, Hunt, Ladder, Scale, Span};
use super::sampler_passes::{Between, CHUNK, First, Weigh, clean};
use super::simd::dispatch;

/// Logits of a sample.
const SAMPLE: usize = 256;
const SAMPLE_AGAIN: usize = 64;
/// So few are sorted.
const SORTED_MAX: usize = 96;

/// The token at which a sum is reached.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    pub(crate) token: TokenId,
    /// The sum up to this token, its own weight included.
    pub(crate) mass: f64,
}

/// Part of a row, in the order of ids.
#[derive(Debug, Default)]
struct Band {
    logits: Vec<f32>,
    weights: Vec<f32>,
    ids: Vec<u32>,
}

impl Band {
    fn clear(&mut self) {
        self.logits.clear();
        self.weights.clear();
        self.ids.clear();
    }

    fn push(&mut self, logit: f32, weight: f32, id: u32) {
        self.logits.push(logit);
        self.weights.push(weight);
        self.ids.push(id);
    }
}

/// Works on one row at a time; keeps its room.
#[derive(Debug)]
pub(crate) struct Prefix {
    isa: Isa,
    weights: Vec<f32>,
    sums: Vec<f32>,
    whole: f64,
    scale: Scale,
    row: Ladder,
    part: Ladder,
    band: Band,
    spare: Band,
    keys: Vec<u64>,
}

impl Prefix {
    pub(crate) fn new(isa: Isa) -> Self {
        Self {
            isa,
            weights: Vec::new(),
            sums: Vec::new(),
            whole: 0.0,
            scale: Scale {
                largest: 0.0,
                factor: 1.0,
            },
            row: Ladder::default(),
            part: Ladder::default(),
            band: Band::default(),
            spare: Band::default(),
            keys: Vec::new(),
        }
    }

    /// Computes the weights of a row; returns their sum.
    pub(crate) fn weigh(&mut self, logits: &[f32], scale: Scale) -> f64 {
        self.weights.resize(logits.len(), 0.0);
        self.sums.resize(logits.len().div_ceil(CHUNK), 0.0);
        let pass = Weigh {
            logits,
            weights: &mut self.weights,
            sums: &mut self.sums,
            largest: scale.largest,
            factor: scale.factor,
        };
        // SAFETY: the instruction set is the device's; the slices are as long as the kernel wants.
        unsafe { dispatch(self.isa, pass) };
        let whole: f64 = self.sums.iter().map(|&sum| f64::from(sum)).sum();
        self.whole = whole.max(f64::from(f32::MIN_POSITIVE));
        self.scale = scale;
        self.whole
    }

    /// Prepares [`Prefix::find`] after [`Prefix::weigh`]; returns the sum from `floor` on upwards, or of the whole row.
    pub(crate) fn prepare(&mut self, logits: &[f32], floor: Option<f32>) -> f64 {
        self.row.fill(logits, SAMPLE, self.scale, floor);
        let Some(at) = floor.and_then(|floor| self.row.floors.iter().position(|&f| f == floor)) else {
            return self.whole;
        };
        let hunt = Hunt {
            isa: self.isa,
            logits,
            weights: &self.weights,
            base: 0.0,
            target: 0.0,
            edge: Edge::Passes,
        };
        self.row.mass(hunt, at)
    }

    /// The weight of a token after [`Prefix::weigh`].
    pub(crate) fn weight(&self, token: TokenId) -> f32 {
        self.weights[token.index()]
    }

    /// Draws among all tokens of the row given to [`Prefix::weigh`], in the order of ids.
    pub(crate) fn draw_by_id(&self, uniform: f32) -> TokenId {
        let (mut left, mut last) = (f64::from(uniform) * self.whole, 0);
        for (c, &sum) in self.sums.iter().enumerate() {
            if left >= f64::from(sum) && c + 1 < self.sums.len() {
                left -= f64::from(sum);
                continue;
            }
            for (i, &weight) in self.weights[c * CHUNK..].iter().enumerate() {
                if weight > 0.0 {
                    last = c * CHUNK + i;
                    left -= f64::from(weight);
                    if left < 0.0 {
                        return TokenId(last as u32);
                    }
                }
            }
        }
        TokenId(last as u32)
    }

    /// The first token at which the sum of weights, most likely first, meets the target, or the last of all. The row is the
    /// one given to [`Prefix::prepare`].
    pub(crate) fn find(&mut self, logits: &[f32], target: f64, edge: Edge) -> Found {
        // The first token is always part of the answer.
        let target = target.max(f64::MIN_POSITIVE);
        let whole = Hunt {
            isa: self.isa,
            logits,
            weights: &self.weights,
            base: 0.0,
            target,
            edge,
        };
        let mut span = self.row.find(whole, target / self.whole);
        // Equal logits are settled at once where the sample shows that there are many.
        if self
            .row
            .floors
            .iter()
            .filter(|&&floor| floor == span.floor)
            .count()
            > 1
        {
            match whole.settle(span) {
                Ok((at, mass)) => {
                    return Found {
                        token: TokenId(at as u32),
                        mass,
                    };
                }
                Err(rest) => span = rest,
            }
        }
        let weights = &self.weights;
        narrow(self.isa, logits, span, &mut self.band, |band, i| {
            band.push(clean(logits[i]), weights[i], i as u32);
        });
        while self.band.ids.len() > SORTED_MAX {
            let part = Hunt {
                isa: self.isa,
                logits: &self.band.logits,
                weights: &self.band.weights,
                base: span.above,
                target,
                edge,
            };
            self.part.fill(part.logits, SAMPLE_AGAIN, self.scale, None);
            // Every round leaves out at least the members of the sample at one end, or settles.
            let inside = (target - span.above) / self.whole;
            match part.settle(self.part.find(part, inside)) {
                Ok((at, mass)) => {
                    return Found {
                        token: TokenId(self.band.ids[at]),
                        mass,
                    };
                }
                Err(rest) => span = rest,
            }
            let Band { logits, weights, ids } = &self.band;
            narrow(self.isa, logits, span, &mut self.spare, |band, i| {
                band.push(logits[i], weights[i], ids[i]);
            });
            std::mem::swap(&mut self.band, &mut self.spare);
        }
        self.walk(span.above, target, edge).unwrap_or_else(|| {
            // Sums in another order may differ in the last digits: the target is the end of what lies above.
            let above = span.ceiling.map(|ceiling| First {
                values: logits,
                floor: ceiling,
            });
            // SAFETY: the instruction set is the device's.
            let at = above.and_then(|first| unsafe { dispatch(self.isa, first) });
            Found {
                token: TokenId(at.unwrap_or(0) as u32),
                mass: span.above,
            }
        })
    }

    /// Sorts the band and goes through it.
    fn walk(&mut self, above: f64, target: f64, edge: Edge) -> Option<Found> {
        let Band { logits, weights, ids } = &self.band;
        self.keys.clear();
        self.keys
            .extend(logits.iter().enumerate().map(|(i, &logit)| key(logit, i)));
        self.keys.sort_unstable();
        let (mut mass, mut last) = (above, None);
        for &key in &self.keys {
            let at = index(key);
            mass += f64::from(weights[at]);
            last = Some(Found {
                token: TokenId(ids[at]),
                mass,
            });
            if edge.is_met(mass, target) {
                break;
            }
        }
        last
    }

    /// The `count` most likely tokens, fewer if there are not so many.
    pub(crate) fn top(
        &mut self,
        logits: &[f32],
        count: usize,
    ) -> impl ExactSizeIterator<Item = TokenId> + '_ {
        let count = count.min(logits.len());
        self.row.sample(logits, SAMPLE, None);
        let stride = logits.len().div_ceil(SAMPLE).max(1);
        // Twice as many as wanted are expected above this member of the sample.
        let mut rank = count * 2 / stride + 2;
        loop {
            let floor = self.row.floors.get(rank).copied().unwrap_or(f32::NEG_INFINITY);
            self.keys.clear();
            let keys = &mut self.keys;
            let pass = Between {
                values: logits,
                floor,
                ceiling: None,
                found: |i: usize| keys.push(key(clean(logits[i]), i)),
            };
            // SAFETY: the instruction set is the device's.
            unsafe { dispatch(self.isa, pass) };
            if self.keys.len() >= count || floor == f32::NEG_INFINITY {
                break;
            }
            rank *= 4;
        }
        if (1..self.keys.len()).contains(&count) {
            self.keys.select_nth_unstable(count - 1);
        }
        self.keys.truncate(count);
        self.keys.sort_unstable();
        self.keys.iter().map(|&key| TokenId(index(key) as u32))
    }
}

/// Sorts by logit downwards, then by index upwards.
fn key(logit: f32, index: usize) -> u64 {
    // The two zeros are equal.
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | index as u64
}

fn index(key: u64) -> usize {
    key as u32 as usize
}

fn narrow(isa: Isa, logits: &[f32], span: Span, band: &mut Band, mut push: impl FnMut(&mut Band, usize)) {
    band.clear();
    let pass = Between {
        values: logits,
        floor: span.floor,
        ceiling: span.ceiling,
        found: |i| push(band, i),
    };
    // SAFETY: the instruction set is the device's.
    unsafe { dispatch(isa, pass) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rows with few and many equal logits, narrow and wide, long enough to be split more than once.
    fn row() -> impl Strategy<Value = Vec<f32>> {
        let shapes = prop_oneof![
            Just((0.0, 1.0)),
            Just((0.01, 1e-6)),
            Just((3.0, 0.5)),
            Just((8.0, 1e-4))
        ];
        (shapes, 1usize..6_000, any::<u64>()).prop_map(|((size, step), width, seed)| {
            let mut numbers = crate::conformance::Numbers::new(seed);
            (0..width)
                .map(|_| (numbers.normal(size) / step).round() * step)
                .collect()
        })
    }

    fn sorted(logits: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| (logits[b] + 0.0).total_cmp(&(logits[a] + 0.0)).then(a.cmp(&b)));
        order
    }

    fn scale(logits: &[f32]) -> Scale {
        Scale {
            largest: logits.iter().copied().fold(f32::MIN, f32::max),
            factor: 1.0,
        }
    }

    proptest! {
        #[test]
        fn a_sum_is_reached_where_a_full_sort_reaches_it(logits in row(), fraction in 0.0f64..1.0) {
            let mut prefix = Prefix::new(Isa::detect());
            let whole = prefix.weigh(&logits, scale(&logits));
            prefix.prepare(&logits, None);
            let slack = whole * 1e-5;
            for edge in [Edge::Reaches, Edge::Passes] {
                let found = prefix.find(&logits, fraction * whole, edge);
                let mut mass = 0.0;
                for id in sorted(&logits) {
                    let before = mass;
                    mass += f64::from(prefix.weights[id]);
                    if id == found.token.index() {
                        prop_assert!((mass - found.mass).abs() <= slack, "{edge:?}: sum {mass} of token {id}, found {found:?}");
                        prop_assert!(before <= fraction * whole + slack && mass >= fraction * whole - slack,
                            "{edge:?}: token {id} covers {before} to {mass} of {whole}, target {}", fraction * whole);
                        break;
                    }
                }
            }
        }

        #[test]
        fn the_top_is_the_beginning_of_a_full_sort(logits in row(), count in 0usize..300) {
            let mut prefix = Prefix::new(Isa::detect());
            let top: Vec<usize> = prefix.top(&logits, count).map(|token| token.index()).collect();
            let mut expected = sorted(&logits);
            expected.truncate(count);
            prop_assert_eq!(top, expected);
        }
    }
}
