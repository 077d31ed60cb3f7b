//! Reads Rust source as code alone, for the rules in `tests/tidy.rs`. Knows no rule itself.

/// The source with the insides of comments, strings and character literals blanked; lines stay where they are.
#[must_use]
pub fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let after_word = code.ends_with(is_word);
        let length = skipped_length(rest, after_word);
        if length == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.push(' ');
            code.extend(rest[..length].matches('\n'));
            rest = &rest[length..];
        }
    }
    code
}

/// Whether `code` has `word` as a word of its own (`unsafe`, not `unsafe_code`).
#[must_use]
pub fn has_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(start, _)| {
        !code[..start].ends_with(is_word) && !code[start + word.len()..].starts_with(is_word)
    })
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Bytes of the comment or literal that `text` begins with; 0 if it begins with code.
fn skipped_length(text: &str, after_word: bool) -> usize {
    if text.starts_with("//") {
        text.find('\n').unwrap_or(text.len())
    } else if text.starts_with("/*") {
        block_comment_length(text)
    } else if let Some(quoted) = text.strip_prefix('"') {
        1 + quoted_length(quoted, '"')
    } else if text.starts_with('\'') {
        character_length(text)
    } else if !after_word {
        prefixed_string_length(text)
    } else {
        0
    }
}

fn block_comment_length(text: &str) -> usize {
    let (mut position, mut depth) = (0, 0_usize);
    while position < text.len() {
        let rest = &text[position..];
        if rest.starts_with("/*") {
            depth += 1;
            position += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            position += 2;
            if depth == 0 {
                break;
            }
        } else {
            position += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    position
}

/// Bytes up to and with the closing quote.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (position, character) in text.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return position + 1,
            _ => {}
        }
    }
    text.len()
}

/// A character literal's bytes; 0 for a lifetime.
fn character_length(text: &str) -> usize {
    let mut characters = text[1..].chars();
    match (characters.next(), characters.next()) {
        (Some('\\'), _) => 1 + quoted_length(&text[1..], '\''),
        (Some(inner), Some('\'')) => 2 + inner.len_utf8(),
        _ => 0,
    }
}

/// Byte, C and raw strings.
fn prefixed_string_length(text: &str) -> usize {
    let Some(prefix) = ["br", "cr", "r", "b", "c"]
        .into_iter()
        .find(|prefix| text.starts_with(prefix))
    else {
        return 0;
    };
    let rest = &text[prefix.len()..];
    if !prefix.ends_with('r') {
        let quoted = rest.strip_prefix('"');
        return quoted.map_or(0, |quoted| prefix.len() + 1 + quoted_length(quoted, '"'));
    }
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    if !rest[hashes..].starts_with('"') {
        return 0;
    }
    let body = prefix.len() + hashes + 1;
    let end = format!("\"{}", "#".repeat(hashes));
    text[body..]
        .find(&end)
        .map_or(text.len(), |found| body + found + end.len())
}

#[cfg(test)]
mod tests {
    use super::{code_only, has_word};

    fn check(source: &str, expected: bool) {
        assert_eq!(has_word(&code_only(source), "unsafe"), expected, "{source}");
    }

    #[test]
    fn code_is_seen() {
        check("unsafe { x }", true);
        check("fn f<'a>(x: &'a u8) { unsafe {} }", true);
        check("let c = '\\''; unsafe {}", true);
        check("let c = '\"'; unsafe {}", true);
        check("/* /* */ */ unsafe impl Send for X {}", true);
        check("let s = \"\\\"\"; #[unsafe(no_mangle)]", true);
        check("let s = r#\"\"\"#; unsafe {}", true);
        check("let number = 1; unsafe {}", true);
        check("let s = b\"\\\\\"; unsafe {}", true);
    }

    #[test]
    fn comments_strings_and_longer_words_are_not_code() {
        check("// unsafe", false);
        check("/* /* */ unsafe */", false);
        check("let s = \"unsafe \\\" unsafe\";", false);
        check("let s = r##\"unsafe \"# unsafe\"##;", false);
        check("let s = br\"unsafe\"; let t = c\"unsafe\";", false);
        check("#![allow(unsafe_code, reason = \"unsafe\")]", false);
        check("let not_unsafe = 1;", false);
    }

    #[test]
    fn lines_stay_where_they_are() {
        let source = "a\n\"b\nc\"\n/* d\n\n */ e\n// f\ng";
        assert_eq!(code_only(source).lines().count(), source.lines().count());
        assert_eq!(code_only(source).lines().nth(5).map(str::trim), Some("e"));
    }
}
