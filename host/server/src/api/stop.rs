//! Finds stop strings in streamed text, across token boundaries.

/// Holds back text that might begin a stop string.
#[derive(Debug)]
pub(super) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What came of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Matched {
    /// Text that is safe to give out.
    pub(super) text: String,
    /// Whether a stop string came; what follows it is dropped, and so is the stop string itself.
    pub(super) stopped: bool,
}

impl StopMatcher {
    /// Empty strings are ignored.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            held: String::new(),
        }
    }

    pub(super) fn push(&mut self, text: &str) -> Matched {
        self.held.push_str(text);
        if let Some(at) = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min()
        {
            self.held.truncate(at);
            return Matched {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - keep);
        Matched {
            text: std::mem::replace(&mut self.held, tail),
            stopped: false,
        }
    }

    /// What was held back, at the end.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that begins `stop`, at a character boundary.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .skip(1)
        .filter(|length| text.ends_with(&stop[..*length]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<'a>(stops: &[&str], chunks: impl IntoIterator<Item = &'a str>) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut out = String::new();
        for chunk in chunks {
            let matched = matcher.push(chunk);
            out.push_str(&matched.text);
            if matched.stopped {
                return (out, true);
            }
        }
        out.push_str(&matcher.finish());
        (out, false)
    }

    #[test]
    fn every_cut_gives_the_same() {
        let cases: [(&[&str], &str); 6] = [
            (&["END"], "text ENEND more"),
            (&["\n\n", "Q:"], "a\nb\n\nc Q: d"),
            (&["aab"], "aaaab"),
            (&["né", "é!"], "caf né x"),
            (&["stop"], "sto sto sto"),
            (&[""], "nothing stops"),
        ];
        for (stops, text) in cases {
            let whole = run(stops, [text]);
            let chars: Vec<String> = text.chars().map(String::from).collect();
            assert_eq!(run(stops, chars.iter().map(String::as_str)), whole, "{text:?}");
            for (cut, _) in text.char_indices() {
                assert_eq!(
                    run(stops, [&text[..cut], &text[cut..]]),
                    whole,
                    "{text:?} cut at {cut}"
                );
            }
        }
        assert_eq!(run(&["aab"], ["aaaab"]), ("aa".to_owned(), true));
        assert_eq!(run(&["stop"], ["sto sto"]), ("sto sto".to_owned(), false));
    }
}
