//! Telephone numbers: French ones, and those with a country's code. They have no checksum, so their form decides.

use crate::numbers::{self, SEPARATORS, ends_at};

/// Digits of a number with its country's code (E.164, 6.2.1); shorter ones than the least are too likely something else.
const INTERNATIONAL_DIGITS_MIN: usize = 9;
const INTERNATIONAL_DIGITS_MAX: usize = 15;

/// The length in bytes of the telephone number that `text` begins with.
pub(crate) fn phone(text: &str) -> Option<usize> {
    let length = if let Some(code) = text.strip_prefix('+').or_else(|| text.strip_prefix("00")) {
        let prefix = text.len() - code.len();
        prefix + french_abroad(code).or_else(|| international(code))?
    } else {
        1 + french_after_zero(text.strip_prefix('0')?)?
    };
    ends_at(text, length).then_some(length)
}

/// Nine digits of which the first is not 0, in pairs after it, with one and the same separator or none throughout: a
/// date and a time do not look like that.
fn french_after_zero(text: &str) -> Option<usize> {
    let mut rest = text.strip_prefix(|c: char| ('1'..='9').contains(&c))?;
    let separator = rest.chars().next().filter(|c| SEPARATORS.contains(c));
    for _ in 0..4 {
        if let Some(separator) = separator {
            rest = rest.strip_prefix(separator)?;
        }
        rest = rest.strip_prefix(|c: char| c.is_ascii_digit())?;
        rest = rest.strip_prefix(|c: char| c.is_ascii_digit())?;
    }
    Some(text.len() - rest.len())
}

/// After `+` or `00`: France's code, a zero that should not be there, maybe in parentheses, and the number.
fn french_abroad(text: &str) -> Option<usize> {
    let mut rest = text.strip_prefix("33")?;
    rest = rest.strip_prefix(SEPARATORS).unwrap_or(rest);
    rest = rest
        .strip_prefix("(0)")
        .or_else(|| rest.strip_prefix('0'))
        .unwrap_or(rest);
    rest = rest.strip_prefix(SEPARATORS).unwrap_or(rest);
    let length = text.len() - rest.len() + french_after_zero(rest)?;
    ends_at(text, length).then_some(length)
}

/// After `+` or `00`: a country's code and digits in groups, some in parentheses, up to a group that begins another number.
fn international(text: &str) -> Option<usize> {
    let mut digits = 0;
    let mut length = 0;
    let mut between = 0;
    for (at, c) in text.char_indices() {
        if between > 0 && digits >= INTERNATIONAL_DIGITS_MIN && begins_another(&text[at..]) {
            break;
        }
        if c.is_ascii_digit() && digits < INTERNATIONAL_DIGITS_MAX {
            digits += 1;
            between = 0;
            length = at + 1;
        } else if digits > 0 && between < 2 && (SEPARATORS.contains(&c) || "()/".contains(c)) {
            between += 1;
        } else {
            break;
        }
    }
    let plausible = digits >= INTERNATIONAL_DIGITS_MIN && !text.starts_with('0');
    plausible.then_some(length)
}

/// Else the first groups of a card number would pass for the end of this one, and the others go unseen.
fn begins_another(text: &str) -> bool {
    numbers::card(text).is_some()
        || numbers::nir(text).is_some()
        || text
            .strip_prefix('0')
            .and_then(french_after_zero)
            .is_some_and(|length| ends_at(text, 1 + length))
}

/// The digits, with a zero for France's code.
pub(crate) fn key(value: &str) -> String {
    let digits: String = value.chars().filter(char::is_ascii_digit).collect();
    let abroad = if value.starts_with('+') {
        Some(digits.as_str())
    } else {
        digits.strip_prefix("00")
    };
    match abroad {
        None => digits,
        Some(abroad) => match abroad.strip_prefix("33") {
            Some(national) => format!("0{}", national.trim_start_matches('0')),
            None => format!("+{abroad}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<&str>) {
        assert_eq!(
            phone(text).map(|length| &text[..length]),
            expected,
            "in \"{text}\""
        );
    }

    #[test]
    fn french_numbers() {
        for number in [
            "0612345678",
            "06 12 34 56 78",
            "01.23.45.67.89",
            "01-23-45-67-89",
            "06\u{a0}12\u{a0}34\u{a0}56\u{a0}78",
            "+33612345678",
            "+33 6 12 34 56 78",
            "+33 (0)6 12 34 56 78",
            "+33(0)612345678",
            "+33 06 12 34 56 78",
            "0033 6 12 34 56 78",
        ] {
            check(number, Some(number));
            check(&format!("{number}, 12 rue"), Some(number));
            check(&format!("{number} 12"), Some(number));
        }
    }

    #[test]
    fn numbers_of_other_countries() {
        for number in [
            "+1 (415) 555-2671",
            "+44 20 7946 0958",
            "+49 (0)30/901820",
            "+4930901820",
            "0049 30 901820",
            "+33 612 345 678",
        ] {
            check(number, Some(number));
            check(&format!("{number}. And"), Some(number));
        }
        for other in ["4111-1111-1111-1111", "06 12 34 56 78", "2 55 08 14 168 025 38"] {
            check(&format!("+4930901820 {other}"), Some("+4930901820"));
        }
    }

    #[test]
    fn what_is_none() {
        for text in [
            "0012",
            "00 12 34 56 78",
            "06 12 34 56",
            "06 12 34 56 7",
            "06123456789",
            "06 12-34 56 78",
            "01.02.2003 12:30",
            "+1",
            "+12345678",
            "+0612345678",
            "+1234567890123456",
            "+ 33612345678",
            "1612345678",
            "0000000000",
        ] {
            check(text, None);
        }
    }

    #[test]
    fn spellings_of_one_number_have_one_key() {
        for spelling in [
            "06 12 34 56 78",
            "+33612345678",
            "+33 (0)6 12 34 56 78",
            "0033 612345678",
        ] {
            assert_eq!(key(spelling), "0612345678", "{spelling}");
        }
        assert_eq!(key("+1 (415) 555-2671"), key("001 415 555 2671"));
        assert_ne!(key("+41 61 234 56 78"), key("0041 61 234 56 79"));
    }
}
