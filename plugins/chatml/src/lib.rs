//! The ChatML format as a guest: `<|im_start|>role`, text, `<|im_end|>`. Tools in the style of Hermes and Qwen.

mod parser;
mod render;

use galerne_sdk::chat::{Error, Format, Message, Options, Segment, Tool};

pub(crate) const START: &str = "<|im_start|>";
pub(crate) const END: &str = "<|im_end|>";

struct ChatMl;

impl Format for ChatMl {
    type Parser = parser::Parser;

    fn recognises(template: Option<&str>, special_tokens: &[String]) -> bool {
        let knows = |token: &str| special_tokens.iter().any(|special| special == token);
        knows(START) && knows(END) && template.is_none_or(|template| template.contains(START))
    }

    fn render(messages: &[Message], tools: &[Tool], options: &Options) -> Result<Vec<Segment>, Error> {
        render::render(messages, tools, options)
    }

    fn parser(_: &Options) -> Self::Parser {
        parser::Parser::default()
    }
}

galerne_sdk::export_chat!(ChatMl);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_by_special_tokens_and_template() {
        let special = [START.to_owned(), END.to_owned()];
        assert!(ChatMl::recognises(None, &special));
        assert!(ChatMl::recognises(Some("{{ '<|im_start|>' }}"), &special));
        assert!(!ChatMl::recognises(
            Some("[INST] {{ message }} [/INST]"),
            &special
        ));
        assert!(!ChatMl::recognises(Some("{{ '<|im_start|>' }}"), &special[..1]));
    }
}
