//! Medians, extremes and ratios of alternated measurements.

/// Measurements of one side, in the order they were taken.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample(pub(super) Vec<f64>);

/// Median and extremes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Sample {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// All zero if nothing was measured.
    pub(super) fn summary(&self) -> Summary {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            return Summary {
                median: 0.0,
                min: 0.0,
                max: 0.0,
            };
        };
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Summary { median, min, max }
    }

    /// Each value over the one of `below` taken in the same alternation, so that a drifting machine moves both.
    pub(super) fn over(&self, below: &Self) -> Self {
        Self(self.0.iter().zip(&below.0).map(|(a, b)| a / b).collect())
    }
}

/// Times of many turns of two ways, taken in turn. Slow times are rare: a turn alone has too few to tell a percentile by.
#[derive(Debug, Default)]
pub(super) struct Turns {
    alone: Vec<Vec<f64>>,
    beside: Vec<Vec<f64>>,
}

impl Turns {
    pub(super) fn push(&mut self, alone: Vec<f64>, beside: Vec<f64>) {
        self.alone.push(alone);
        self.beside.push(beside);
    }

    /// The 99th percentile of either side, of all turns together.
    pub(super) fn p99(&self) -> [f64; 2] {
        [&self.alone, &self.beside].map(|side| p99(side.iter()))
    }

    /// The same without one of the turns, for each of them.
    pub(super) fn p99_without_one(&self) -> Vec<[f64; 2]> {
        let rest = |side: &[Vec<f64>], without: usize| {
            p99(side
                .iter()
                .enumerate()
                .filter(|(turn, _)| *turn != without)
                .map(|(_, times)| times))
        };
        (0..self.alone.len())
            .map(|without| [&self.alone, &self.beside].map(|side| rest(side, without)))
            .collect()
    }
}

/// By the nearest rank; 0 without times.
fn p99<'a>(turns: impl Iterator<Item = &'a Vec<f64>>) -> f64 {
    let mut times: Vec<f64> = turns.flatten().copied().collect();
    times.sort_by(f64::total_cmp);
    let rank = (times.len() * 99).div_ceil(100);
    rank.checked_sub(1).map_or(0.0, |at| times[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let odd = Sample(vec![3.0, 1.0, 2.0]).summary();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(Sample(vec![4.0, 1.0, 2.0, 3.0]).summary().median, 2.5);
        assert_eq!(Sample::default().summary().median, 0.0);
    }

    #[test]
    fn ratios_pair_what_was_measured_together() {
        // The machine halves its speed between the alternations; the ratio does not notice.
        let ratios = Sample(vec![20.0, 10.0]).over(&Sample(vec![10.0, 5.0]));
        assert_eq!(ratios, Sample(vec![2.0, 2.0]));
    }

    #[test]
    fn a_percentile_is_of_all_turns_together() {
        let mut turns = Turns::default();
        // One slow time in a hundred, all of them in the second turn.
        turns.push(vec![1.0; 100], vec![2.0; 100]);
        turns.push([vec![1.0; 97], vec![9.0; 3]].concat(), vec![2.0; 100]);
        assert_eq!(turns.p99(), [9.0, 2.0]);
        assert_eq!(turns.p99_without_one(), [[9.0, 2.0], [1.0, 2.0]]);
        assert_eq!(Turns::default().p99(), [0.0, 0.0]);
    }
}
