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
}
