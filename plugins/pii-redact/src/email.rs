//! E-mail addresses, as people write them (RFC 5322 allows more than anybody uses), with letters of any script.

/// Characters of the part before `@` (RFC 5321, 4.5.3.1).
const LOCAL_MAX: usize = 64;
/// Characters of a label of a domain (RFC 1035, 2.3.4); one more is read to see that a label is too long.
const LABEL_MAX: usize = 63;
/// Bytes of a domain.
const DOMAIN_MAX: usize = 253;

/// The length in bytes of the address that `text` begins with.
pub(crate) fn email(text: &str) -> Option<usize> {
    let local = prefix(text, LOCAL_MAX + 1, |c| {
        c.is_alphanumeric() || "._%+-".contains(c)
    });
    let domain = text[local..].strip_prefix('@')?;
    let fits = (1..=LOCAL_MAX).contains(&text[..local].chars().count()) && !text[..local].ends_with('.');
    let domain = domain_length(domain).filter(|_| fits)?;
    Some(local + 1 + domain)
}

/// The length of the longest domain with a top level that `text` begins with.
fn domain_length(text: &str) -> Option<usize> {
    let mut length = None;
    let mut at = 0;
    for labels in 1.. {
        let read = prefix(&text[at..], LABEL_MAX + 1, |c| c.is_alphanumeric() || c == '-');
        let label = text[at..at + read].trim_end_matches('-');
        let end = at + label.len();
        if label.is_empty() || label.chars().count() > LABEL_MAX || end > DOMAIN_MAX {
            break;
        }
        if labels > 1 && is_top_level(label) {
            length = Some(end);
        }
        at += read;
        // A label does not end with a hyphen.
        if label.len() < read || !text[at..].starts_with('.') {
            break;
        }
        at += 1;
    }
    length
}

fn is_top_level(label: &str) -> bool {
    label.starts_with("xn--") || (label.chars().count() >= 2 && label.chars().all(char::is_alphabetic))
}

/// The length in bytes of the leading characters that `accept`, at most `characters_max`.
fn prefix(text: &str, characters_max: usize, accept: impl Fn(char) -> bool) -> usize {
    text.chars()
        .take(characters_max)
        .take_while(|c| accept(*c))
        .map(char::len_utf8)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<&str>) {
        assert_eq!(
            email(text).map(|length| &text[..length]),
            expected,
            "in \"{text}\""
        );
    }

    #[test]
    fn addresses_end_where_they_end() {
        check("a@b.fr", Some("a@b.fr"));
        check("a.b+c_d%e-f@g-h.co.uk, and", Some("a.b+c_d%e-f@g-h.co.uk"));
        check("josé@exämple.de.", Some("josé@exämple.de"));
        check("a@b.xn--p1ai/", Some("a@b.xn--p1ai"));
        check("a@b.fr- no", Some("a@b.fr"));
        check("a@b.fr.2", Some("a@b.fr"));
        check("a@b.fr@c", Some("a@b.fr"));
    }

    #[test]
    fn what_is_none() {
        for text in [
            "a", "a@", "@b.fr", "a@b", "a@b.", "a@b.c", "a@b.12", "a@.fr", "a.@b.fr", "a b@c.fr",
        ] {
            check(text, None);
        }
        check(&format!("{}@b.fr", "a".repeat(65)), None);
        check(&format!("a@{}.fr", "b".repeat(64)), None);
        check(
            &format!("a@{}fr", "bc.".repeat(100)),
            Some(&format!("a@{}bc", "bc.".repeat(83))),
        );
    }
}
