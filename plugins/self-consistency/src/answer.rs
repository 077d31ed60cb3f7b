//! What of an answer is compared with others. Knows no model.

/// Which part of an answer the vote is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The last number in it: for sums.
    Number,
    /// Its last line that is not empty: for prompts that end in "on the last line, give only …".
    Line,
    /// All of it: for answers kept to a format.
    Whole,
}

impl Part {
    /// By its name in the parameters.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "number" => Self::Number,
            "line" => Self::Line,
            "whole" => Self::Whole,
            _ => return None,
        })
    }

    /// The part, spelled so that equal answers are equal texts; none if the answer has none.
    pub(crate) fn of(self, answer: &str) -> Option<String> {
        let part = match self {
            Self::Number => last_number(answer)?,
            Self::Line => plain(answer.lines().rev().find(|line| !plain(line).is_empty())?),
            Self::Whole => plain(answer),
        };
        (!part.is_empty()).then_some(part)
    }
}

/// In lower case, single spaces, without what only sets it off.
fn plain(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ").to_lowercase();
    text.trim_matches(|c: char| "*_`\"'.".contains(c))
        .trim()
        .to_owned()
}

/// Digits with at most one point, thousands' commas left out, zeros that say nothing too.
fn last_number(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let is_part = |at: usize| {
        let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
        digit(at) || (matches!(bytes[at], b'.' | b',') && at > 0 && digit(at - 1) && digit(at + 1))
    };
    let end = (0..bytes.len()).rev().find(|at| bytes[*at].is_ascii_digit())? + 1;
    let begin = (0..end).rev().take_while(|at| is_part(*at)).last()?;
    let digits: String = text[begin..end].chars().filter(|c| *c != ',').collect();
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let whole = match whole.trim_start_matches('0') {
        "" => "0",
        whole => whole,
    };
    let fraction = fraction.trim_end_matches('0');
    // A minus that follows a digit or a letter is no sign.
    let before = text[..begin].chars().next_back();
    let sign_at = begin.checked_sub(1).filter(|_| before == Some('-'));
    let is_sign = sign_at.is_some_and(|at| {
        text[..at]
            .chars()
            .next_back()
            .is_none_or(|c| !c.is_alphanumeric())
    });
    let sign = if is_sign && (whole != "0" || !fraction.is_empty()) {
        "-"
    } else {
        ""
    };
    Some(if fraction.is_empty() {
        format!("{sign}{whole}")
    } else {
        format!("{sign}{whole}.{fraction}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_counts_however_it_is_spelled() {
        for (answer, expected) in [
            ("3 + 4 = 7", Some("7")),
            ("The total is $1,234.50.", Some("1234.5")),
            ("so **42**.", Some("42")),
            ("x = -5", Some("-5")),
            ("between 3-5", Some("5")),
            ("-0.0", Some("0")),
            ("007", Some("7")),
            ("1,2", Some("12")),
            ("é 9 é", Some("9")),
            ("none", None),
            ("", None),
        ] {
            assert_eq!(Part::Number.of(answer).as_deref(), expected, "{answer}");
        }
    }

    #[test]
    fn lines_and_wholes_are_compared_without_what_sets_them_off() {
        assert_eq!(
            Part::Line.of("I think.\n\n **Paris**. \n\n").as_deref(),
            Some("paris")
        );
        assert_eq!(Part::Line.of(" \n"), None);
        assert_eq!(Part::Whole.of(" The  CAT ").as_deref(), Some("the cat"));
    }
}
