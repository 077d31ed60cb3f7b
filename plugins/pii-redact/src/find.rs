//! Finds personal data in text. What it finds is letters, digits, `@`, `+`, parentheses and single separators, so that
//! it can stand in a JSON string as it is. Knows nothing of placeholders.

use std::ops::Range;

use crate::{email, numbers, phone};

/// Kinds of personal data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Email,
    Iban,
    Nir,
    Card,
    Phone,
}

impl Kind {
    /// All, those with a checksum before those that could be taken for them.
    pub(crate) const ALL: [Self; 5] = [Self::Email, Self::Iban, Self::Nir, Self::Card, Self::Phone];

    /// The name in parameters; in capitals, that of placeholders.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Email => "email",
            Self::Iban => "iban",
            Self::Nir => "nir",
            Self::Card => "card",
            Self::Phone => "phone",
        }
    }

    /// The length in bytes of one that `text` begins with.
    fn at_start_of(self, text: &str) -> Option<usize> {
        match self {
            Self::Email => email::email(text),
            Self::Iban => numbers::iban(text),
            Self::Nir => numbers::nir(text),
            Self::Card => numbers::card(text),
            Self::Phone => phone::phone(text),
        }
    }

    /// The same for all spellings of one value.
    pub(crate) fn key(self, value: &str) -> String {
        match self {
            Self::Email => value.to_lowercase(),
            Self::Phone => phone::key(value),
            Self::Iban | Self::Nir | Self::Card => value
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .map(|c| c.to_ascii_uppercase())
                .collect(),
        }
    }
}

/// One piece of personal data.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) kind: Kind,
    /// Bytes of the text.
    pub(crate) range: Range<usize>,
}

/// All of these kinds in `text`, in order and apart. Every kind is of bounded length, so that time is linear.
pub(crate) fn find(text: &str, kinds: &[Kind]) -> Vec<Found> {
    let mut found = Vec::new();
    let mut before = Before::default();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let hit = kinds
            .iter()
            .filter(|kind| before.may_precede(**kind, first))
            .find_map(|kind| Some((*kind, kind.at_start_of(&text[at..])?)));
        let end = at + hit.map_or(first.len_utf8(), |(_, length)| length);
        for c in text[at..end].chars() {
            before.push(c);
        }
        if let Some((kind, _)) = hit {
            found.push(Found { kind, range: at..end });
        }
        at = end;
    }
    found
}

/// The two characters before a position.
#[derive(Default)]
struct Before {
    last: Option<char>,
    last_but_one: Option<char>,
}

impl Before {
    fn push(&mut self, c: char) {
        self.last_but_one = self.last.replace(c);
    }

    /// Whether something of this kind may begin with `first` here: not in the middle of a word or number.
    fn may_precede(&self, kind: Kind, first: char) -> bool {
        if kind == Kind::Email {
            return first.is_alphanumeric() && !self.last.is_some_and(char::is_alphanumeric);
        }
        let in_word = self.last.is_some_and(|c| c.is_ascii_alphanumeric());
        let in_decimals =
            matches!(self.last, Some('.' | ',')) && self.last_but_one.is_some_and(|c| c.is_ascii_digit());
        match kind {
            Kind::Phone if first == '+' => !in_word,
            Kind::Iban => first.is_ascii_alphabetic() && !in_word,
            _ => first.is_ascii_digit() && !in_word && !in_decimals,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[(Kind, &str)]) {
        let found = find(text, &Kind::ALL);
        let got: Vec<_> = found
            .iter()
            .map(|found| (found.kind, &text[found.range.clone()]))
            .collect();
        assert_eq!(got, expected, "in \"{text}\"");
    }

    #[test]
    fn kinds_are_found_side_by_side() {
        check(
            "Anne <anne.b@exemple.fr>, 06 12 34 56 78, IBAN FR76 3000 6000 0112 3456 7890 189, carte 4111-1111-1111-1111.",
            &[
                (Kind::Email, "anne.b@exemple.fr"),
                (Kind::Phone, "06 12 34 56 78"),
                (Kind::Iban, "FR76 3000 6000 0112 3456 7890 189"),
                (Kind::Card, "4111-1111-1111-1111"),
            ],
        );
        check(
            "a@b.fr,c@d.fr",
            &[(Kind::Email, "a@b.fr"), (Kind::Email, "c@d.fr")],
        );
    }

    #[test]
    fn an_address_of_digits_is_an_address() {
        check("0612345678@exemple.fr", &[(Kind::Email, "0612345678@exemple.fr")]);
    }

    #[test]
    fn parts_of_words_and_numbers_are_left() {
        for text in [
            "x0612345678",
            "3.0612345678",
            "3,0612345678",
            "10612345678",
            "XFR7630006000011234567890189",
            "0612345678z",
            "7+33612345678",
        ] {
            check(text, &[]);
        }
    }

    #[test]
    fn writing_without_spaces_hides_no_number() {
        check("电话0612345678。", &[(Kind::Phone, "0612345678")]);
    }

    #[test]
    fn only_the_kinds_asked_for_are_found() {
        assert_eq!(find("a@b.fr 0612345678", &[Kind::Iban]), []);
        assert_eq!(find("a@b.fr 0612345678", &[Kind::Phone]).len(), 1);
    }
}
