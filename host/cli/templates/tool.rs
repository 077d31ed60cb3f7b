//! A tool: counts the letters of a word, which models cannot see.

use galerne_sdk::json::{Value, json};
use galerne_sdk::tool::{Error, RequestInfo, Tool, Tools, text_argument, tool};

struct Letters;

impl Tools for Letters {
    fn list(_: &Value) -> Result<Vec<Tool>, String> {
        let text = |description: &str| json!({"type": "string", "description": description});
        let schema = json!({
            "type": "object",
            "properties": {"text": text("where to count"), "letter": text("what to count, one letter")},
            "required": ["text", "letter"],
            "additionalProperties": false,
        });
        Ok(vec![tool("count_letter", "Says how often a letter is in a text.", &schema)])
    }

    /// The answer and the errors are for the model to read.
    fn call(_: &Value, _: &RequestInfo, _: &str, arguments: &Value) -> Result<String, Error> {
        let text = text_argument(arguments, "text")?;
        let letter = text_argument(arguments, "letter")?;
        let mut letters = letter.chars();
        let (Some(letter), None) = (letters.next(), letters.next()) else {
            return Err(Error::Arguments(format!("letter: expected one letter, got \"{letter}\"")));
        };
        Ok(count(text, letter).to_string())
    }
}

fn count(text: &str, letter: char) -> usize {
    let same = |other: char| other.to_lowercase().eq(letter.to_lowercase());
    text.chars().filter(|other| same(*other)).count()
}

galerne_sdk::export_tool!(Letters);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_counted_in_either_case() {
        assert_eq!(count("Strawberry rhubarb", 'r'), 5);
        assert_eq!(count("Éclair é", 'é'), 2);
    }
}
