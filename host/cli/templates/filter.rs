//! A filter: refuses requests that mention a word, and writes the word as stars in answers.

use galerne_sdk::filter::{
    Channel, Passage, Refusal, Request, RequestInfo, Session, Verdict, all_of, instead_of,
};
use galerne_sdk::json::Value;

/// The state of one request and its answer.
struct Censor {
    /// In lower case.
    word: String,
}

impl Session for Censor {
    /// `params` is the table `params` of the filter in `deployment.toml`.
    fn create(params: &Value, _: &RequestInfo) -> Result<Self, String> {
        let word = params["word"].as_str().unwrap_or("secret").to_lowercase();
        if word.is_empty() {
            return Err("params.word: expected a word, got nothing".to_owned());
        }
        Ok(Self { word })
    }

    fn on_request(&mut self, request: Request) -> Verdict {
        let mentions = |text: &str| text.to_lowercase().contains(&self.word);
        if request.messages.iter().any(|message| mentions(&message.content)) {
            return Verdict::Refuse(Refusal {
                status: 403,
                reason: "this is not to be talked about".to_owned(),
            });
        }
        Verdict::Pass
    }

    /// `text` is what was held back and what came since. What may be the beginning of the word is held back again.
    fn on_text(&mut self, _: Channel, text: &str) -> Result<Passage, Refusal> {
        let lower = text.to_lowercase();
        if lower.len() != text.len() {
            // A letter whose lower case has another length: places in one are not places in the other.
            return Ok(all_of(text));
        }
        let begun = (1..self.word.len()).rev().find(|&length| {
            self.word.is_char_boundary(length) && lower.ends_with(&self.word[..length])
        });
        let taken = text.len() - begun.unwrap_or(0);
        Ok(instead_of(&text[..taken], self.censor(&text[..taken], &lower[..taken])))
    }
}

impl Censor {
    fn censor(&self, text: &str, lower: &str) -> String {
        let mut out = String::new();
        let mut done = 0;
        for (place, found) in lower.match_indices(&self.word) {
            out.push_str(&text[done..place]);
            out.push_str(&"*".repeat(found.chars().count()));
            done = place + found.len();
        }
        out.push_str(&text[done..]);
        out
    }
}

galerne_sdk::export_filter!(Censor);

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client reads if the answer comes in these pieces.
    fn read(pieces: &[&str]) -> String {
        let mut censor = Censor {
            word: "secret".to_owned(),
        };
        let (mut out, mut held) = (String::new(), String::new());
        for piece in pieces {
            held.push_str(piece);
            let passage = censor.on_text(Channel::Content, &held).expect("no refusal");
            out.push_str(&passage.text);
            held.drain(..passage.taken_bytes as usize);
        }
        out + &held
    }

    #[test]
    fn the_word_is_starred_however_it_is_cut() {
        assert_eq!(read(&["The Secret is out"]), "The ****** is out");
        assert_eq!(read(&["The sec", "re", "t is out"]), "The ****** is out");
        assert_eq!(read(&["a second", " sec"]), "a second sec");
    }
}
