//! Where the last tokens came before. Knows no host.

use std::collections::HashMap;

/// A sequence's tokens, and where each n-gram of them came last.
pub(crate) struct Lookup {
    tokens: Vec<u32>,
    /// By length, the shortest first: n-grams, and the place behind their latest occurrence.
    places: Vec<(usize, HashMap<Vec<u32>, usize>)>,
    /// N-grams that end at this place or before are in `places`.
    indexed: usize,
}

impl Lookup {
    /// Looks for n-grams of these lengths.
    pub(crate) fn new(shortest: usize, longest: usize, tokens: Vec<u32>) -> Self {
        Self {
            tokens,
            places: (shortest..=longest)
                .map(|length| (length, HashMap::new()))
                .collect(),
            indexed: 0,
        }
    }

    /// Tokens that came.
    pub(crate) fn extend(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// What followed the latest earlier occurrence of the last tokens, as many of them as possible: at most `count`
    /// tokens. Where that occurrence runs into the end, what it is followed by repeats.
    pub(crate) fn continuation(&mut self, count: usize) -> Vec<u32> {
        let end = self.tokens.len();
        // Not the last n-gram itself: it is what is looked for.
        for place in self.indexed + 1..end {
            for (length, places) in &mut self.places {
                if let Some(start) = place.checked_sub(*length) {
                    places.insert(self.tokens[start..place].to_vec(), place);
                }
            }
        }
        self.indexed = self.indexed.max(end.saturating_sub(1));
        let found = self.places.iter().rev().find_map(|(length, places)| {
            let start = end.checked_sub(*length)?;
            places.get(&self.tokens[start..]).copied()
        });
        let Some(from) = found else {
            return Vec::new();
        };
        let mut continued = Vec::with_capacity(count);
        for place in from..from + count {
            let token = match place.checked_sub(end) {
                None => self.tokens[place],
                Some(behind) => continued[behind],
            };
            continued.push(token);
        }
        continued
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn continuation(tokens: &[u32], count: usize) -> Vec<u32> {
        Lookup::new(2, 3, tokens.to_vec()).continuation(count)
    }

    #[test]
    fn what_followed_the_last_tokens_before_is_found() {
        assert_eq!(continuation(&[1, 2, 3, 4, 5, 9, 1, 2], 3), [3, 4, 5]);
    }

    #[test]
    fn the_latest_occurrence_counts() {
        assert_eq!(continuation(&[1, 2, 7, 1, 2, 8, 1, 2], 1), [8]);
    }

    #[test]
    fn a_longer_match_counts_more_than_a_later_one() {
        assert_eq!(continuation(&[5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1), [7]);
    }

    #[test]
    fn what_never_came_before_has_no_continuation() {
        for tokens in [&[][..], &[1], &[1, 2], &[1, 2, 3, 4], &[1, 1]] {
            assert_eq!(continuation(tokens, 4), Vec::<u32>::new(), "{tokens:?}");
        }
    }

    #[test]
    fn a_repetition_goes_on() {
        assert_eq!(continuation(&[1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
        assert_eq!(continuation(&[4, 4, 4], 3), [4, 4, 4]);
    }

    #[test]
    fn tokens_that_come_later_change_nothing_of_what_is_found() {
        let tokens: Vec<u32> = (0..400_u32).map(|place| place * place % 11 % 4).collect();
        let mut grown = Lookup::new(2, 4, tokens[..3].to_vec());
        for end in 3..tokens.len() {
            assert_eq!(
                grown.continuation(6),
                Lookup::new(2, 4, tokens[..end].to_vec()).continuation(6),
                "at {end}"
            );
            grown.extend(&tokens[end..=end]);
        }
    }
}
