//! Which placeholder stands for what, within one request; and placeholders turned back in a stream.

use std::collections::{BTreeMap, BTreeSet};

use crate::find::{Kind, find};

/// What was redacted from one request.
#[derive(Debug, Default)]
pub(crate) struct Vault {
    /// Placeholders by the key of a value.
    placeholders: BTreeMap<(Kind, String), String>,
    /// Values, as first spelled, by placeholder.
    originals: BTreeMap<String, String>,
    /// What looks like a placeholder in the request already; it stays what it is.
    taken: BTreeSet<String>,
}

impl Vault {
    /// Keeps what looks like a placeholder in `text` from being made one. To be called with all texts before the first is
    /// redacted.
    pub(crate) fn reserve(&mut self, text: &str) {
        for (at, _) in text.match_indices('[') {
            if let Some(end) = text[at..].find(']') {
                let literal = &text[at..=at + end];
                if Kind::ALL.iter().any(|kind| is_placeholder(*kind, literal)) {
                    self.taken.insert(literal.to_owned());
                }
            }
        }
    }

    /// `text` with placeholders in the place of personal data, if there is any.
    pub(crate) fn redact(&mut self, text: &str, kinds: &[Kind]) -> Option<String> {
        let found = find(text, kinds);
        if found.is_empty() {
            return None;
        }
        let mut redacted = String::with_capacity(text.len());
        let mut at = 0;
        for found in found {
            redacted.push_str(&text[at..found.range.start]);
            redacted.push_str(self.placeholder(found.kind, &text[found.range.clone()]));
            at = found.range.end;
        }
        redacted.push_str(&text[at..]);
        Some(redacted)
    }

    /// Whether nothing was redacted.
    pub(crate) fn is_empty(&self) -> bool {
        self.originals.is_empty()
    }

    fn placeholder(&mut self, kind: Kind, value: &str) -> &str {
        let originals = &mut self.originals;
        let taken = &self.taken;
        self.placeholders
            .entry((kind, kind.key(value)))
            .or_insert_with(|| {
                let name = kind.name().to_uppercase();
                let free = (1_usize..)
                    .map(|number| format!("[{name}_{number}]"))
                    .find(|placeholder| !taken.contains(placeholder) && !originals.contains_key(placeholder))
                    .unwrap_or_default();
                originals.insert(free.clone(), value.to_owned());
                free
            })
    }

    /// The beginning of `text` that can be let out, with values in the place of placeholders, and its length
    /// before that. What remains is the beginning of a placeholder, and no more than that.
    pub(crate) fn restore(&self, text: &str) -> (String, usize) {
        let mut restored = String::with_capacity(text.len());
        let mut at = 0;
        while let Some(open) = text[at..].find('[').map(|found| at + found) {
            restored.push_str(&text[at..open]);
            at = open;
            if let Some((placeholder, value)) = self.placeholder_at(&text[open..]) {
                restored.push_str(value);
                at += placeholder.len();
            } else if self.may_become_placeholder(&text[open..]) {
                return (restored, at);
            } else {
                restored.push('[');
                at += 1;
            }
        }
        restored.push_str(&text[at..]);
        (restored, text.len())
    }

    fn placeholder_at(&self, text: &str) -> Option<(&str, &str)> {
        let end = text.find(']')?;
        let (placeholder, value) = self.originals.get_key_value(&text[..=end])?;
        Some((placeholder, value))
    }

    fn may_become_placeholder(&self, text: &str) -> bool {
        let next = self.originals.range(text.to_owned()..).next();
        next.is_some_and(|(placeholder, _)| placeholder.starts_with(text))
    }
}

fn is_placeholder(kind: Kind, literal: &str) -> bool {
    literal
        .strip_prefix('[')
        .and_then(|rest| rest.strip_prefix(kind.name().to_uppercase().as_str()))
        .and_then(|rest| rest.strip_prefix('_'))
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vault(texts: &[&str]) -> (Vault, Vec<String>) {
        let mut vault = Vault::default();
        for text in texts {
            vault.reserve(text);
        }
        let redacted = texts
            .iter()
            .map(|text| {
                vault
                    .redact(text, &Kind::ALL)
                    .unwrap_or_else(|| (*text).to_owned())
            })
            .collect();
        (vault, redacted)
    }

    #[test]
    fn one_value_has_one_placeholder() {
        let (_, redacted) = vault(&["a@b.fr and C@d.fr", "A@B.fr, 0612345678, +33 6 12 34 56 78"]);
        assert_eq!(
            redacted,
            ["[EMAIL_1] and [EMAIL_2]", "[EMAIL_1], [PHONE_1], [PHONE_1]"]
        );
    }

    #[test]
    fn values_come_back_as_they_were_first_spelled() {
        let (vault, _) = vault(&["A@b.fr a@B.fr"]);
        assert_eq!(
            vault.restore("[EMAIL_1].[EMAIL_1]"),
            ("A@b.fr.A@b.fr".to_owned(), 19)
        );
    }

    #[test]
    fn what_looks_like_a_placeholder_stays() {
        let (vault, redacted) = vault(&["a@b.fr", "not [EMAIL_1] nor [EMAIL_3], c@d.fr e@f.fr"]);
        assert_eq!(
            redacted,
            ["[EMAIL_2]", "not [EMAIL_1] nor [EMAIL_3], [EMAIL_4] [EMAIL_5]"]
        );
        let text = "[EMAIL_1] [EMAIL_9] [PHONE_1]";
        assert_eq!(vault.restore(text), (text.to_owned(), text.len()));
    }

    #[test]
    fn no_more_is_held_back_than_may_become_a_placeholder() {
        let (vault, _) = vault(&["a@b.fr"]);
        for (text, out) in [
            ("x [", "x "),
            ("x [EMAIL_", "x "),
            ("x [EMAIL_1", "x "),
            ("x [EMAIL_2", "x [EMAIL_2"),
            ("x [email", "x [email"),
            ("x [[EM", "x ["),
            ("[EMAIL_1] [E", "a@b.fr "),
            ("[1] [a](b)", "[1] [a](b)"),
        ] {
            assert_eq!(vault.restore(text).0, out, "{text}");
        }
        let empty = Vault::default();
        assert_eq!(empty.restore("["), ("[".to_owned(), 1));
    }
}
