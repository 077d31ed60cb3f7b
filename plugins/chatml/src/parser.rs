//! Splits a streamed answer into content, reasoning and tool calls.

use galerne_sdk::chat::{CalledTool, Delta, Parse};
use galerne_sdk::json::{Value, from_str};

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
/// A call whose end does not come within so many bytes is given out as content rather than held for ever.
const CALL_BYTES_MAX: usize = 64 << 10;

#[derive(Default)]
enum State {
    #[default]
    Content,
    Reasoning,
    Call,
}

/// Holds back only text that may begin a marker, or lies inside a tool call.
#[derive(Default)]
pub(crate) struct Parser {
    state: State,
    held: String,
}

impl Parse for Parser {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        let mut deltas = Vec::new();
        while self.advance(&mut deltas) {}
        merge(deltas)
    }

    fn finish(&mut self) -> Vec<Delta> {
        let rest = std::mem::take(&mut self.held);
        let delta = match std::mem::take(&mut self.state) {
            State::Content => Delta::Content(rest),
            State::Reasoning => Delta::Reasoning(rest),
            State::Call => {
                return merge(vec![
                    call(&rest).unwrap_or_else(|| Delta::Content(format!("{CALL}{rest}"))),
                ]);
            }
        };
        merge(vec![delta])
    }
}

impl Parser {
    /// Takes one piece off the held text; false if more text is needed first.
    fn advance(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Content => {
                let Some((before, marker)) = self.until(&[THINK, CALL]) else {
                    deltas.push(Delta::Content(self.release(&[THINK, CALL])));
                    return false;
                };
                deltas.push(Delta::Content(before));
                self.state = if marker == THINK {
                    State::Reasoning
                } else {
                    State::Call
                };
            }
            State::Reasoning => {
                let Some((before, _)) = self.until(&[THINK_END]) else {
                    deltas.push(Delta::Reasoning(self.release(&[THINK_END])));
                    return false;
                };
                deltas.push(Delta::Reasoning(before));
                self.state = State::Content;
            }
            State::Call => {
                if self.call_is_too_long() {
                    deltas.push(Delta::Content(CALL.to_owned()));
                    self.state = State::Content;
                    return true;
                }
                let Some((body, _)) = self.until(&[CALL_END]) else {
                    return false;
                };
                deltas.push(call(&body).unwrap_or_else(|| Delta::Content(format!("{CALL}{body}{CALL_END}"))));
                self.state = State::Content;
            }
        }
        true
    }

    /// Decided by the text alone and never by how it was cut: the end would have been seen by now.
    fn call_is_too_long(&self) -> bool {
        self.held.len() >= CALL_BYTES_MAX + CALL_END.len()
            && self.held.find(CALL_END).is_none_or(|at| at > CALL_BYTES_MAX)
    }

    /// Text up to the first of these markers, which is dropped.
    fn until(&mut self, markers: &[&'static str]) -> Option<(String, &'static str)> {
        let (at, marker) = markers
            .iter()
            .filter_map(|marker| Some((self.held.find(marker)?, *marker)))
            .min_by_key(|(at, _)| *at)?;
        let rest = self.held.split_off(at + marker.len());
        let mut before = std::mem::replace(&mut self.held, rest);
        before.truncate(at);
        Some((before, marker))
    }

    /// Everything but a tail that may begin one of these markers.
    fn release(&mut self, markers: &[&str]) -> String {
        let tail = markers
            .iter()
            .flat_map(|marker| (1..marker.len()).map(move |length| &marker[..length]))
            .filter(|start| self.held.ends_with(start))
            .map(str::len)
            .max()
            .unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - tail);
        std::mem::replace(&mut self.held, tail)
    }
}

/// The call in this text, if it is `{"name": …, "arguments": {…}}`.
fn call(body: &str) -> Option<Delta> {
    let value: Value = from_str(body.trim()).ok()?;
    let name = value["name"].as_str()?.to_owned();
    let arguments_json = match &value["arguments"] {
        Value::Null => "{}".to_owned(),
        arguments if arguments.is_object() => arguments.to_string(),
        _ => return None,
    };
    Some(Delta::ToolCall(CalledTool { name, arguments_json }))
}

/// Drops empty deltas and joins neighbours of one kind.
fn merge(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut merged: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (merged.last_mut(), delta) {
            (_, Delta::Content(text) | Delta::Reasoning(text)) if text.is_empty() => {}
            (Some(Delta::Content(last)), Delta::Content(text))
            | (Some(Delta::Reasoning(last)), Delta::Reasoning(text)) => last.push_str(&text),
            (_, delta) => merged.push(delta),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<'a>(chunks: impl IntoIterator<Item = &'a str>) -> String {
        let mut parser = Parser::default();
        let mut deltas: Vec<Delta> = chunks.into_iter().flat_map(|chunk| parser.push(chunk)).collect();
        deltas.extend(parser.finish());
        format!("{:?}", merge(deltas))
    }

    const ANSWERS: [&str; 8] = [
        "plain text with < and <t and a > b",
        "<think>hm, let me see</think>The answer is 4.",
        "I call. <tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": \"</think>\"}}\n</tool_call> Done.",
        "<tool_call>{\"name\": \"a\"}</tool_call><tool_call>{\"name\": \"b\", \"arguments\": {}}</tool_call>",
        "<tool_call>not json</tool_call> after",
        "<tool_call>{\"name\": \"cut\", \"argu",
        "ends in a marker's start <tool_ca",
        "é<think>日本</think>œ<tool_call>{\"name\": \"ß\"}</tool_call>✓",
    ];

    #[test]
    fn parts_are_told_apart() {
        assert_eq!(parse([ANSWERS[0]]), format!("[Delta::Content({:?})]", ANSWERS[0]));
        let thought = parse([ANSWERS[1]]);
        assert!(
            thought.contains("Reasoning(\"hm, let me see\")")
                && thought.contains("Content(\"The answer is 4.\")"),
            "{thought}"
        );
        assert_eq!(parse([ANSWERS[3]]).matches("ToolCall").count(), 2);
        let malformed = parse([ANSWERS[4]]);
        assert!(
            malformed.contains("<tool_call>not json</tool_call> after"),
            "{malformed}"
        );
        assert!(parse([ANSWERS[5]]).contains("<tool_call>{"));
        assert!(parse([ANSWERS[6]]).contains("start <tool_ca"));
    }

    #[test]
    fn every_way_to_cut_an_answer_gives_the_same_parts() {
        for answer in ANSWERS {
            let whole = parse([answer]);
            let places: Vec<usize> = (0..=answer.len())
                .filter(|at| answer.is_char_boundary(*at))
                .collect();
            for (index, &first) in places.iter().enumerate() {
                for &second in &places[index..] {
                    let cut = parse([&answer[..first], &answer[first..second], &answer[second..]]);
                    assert_eq!(cut, whole, "cut at {first} and {second}");
                }
            }
            let single: Vec<&str> = places.windows(2).map(|at| &answer[at[0]..at[1]]).collect();
            assert_eq!(parse(single), whole);
        }
    }

    #[test]
    fn a_call_that_does_not_end_is_given_out_the_same_however_it_is_cut() {
        let body = format!("{{\"name\": \"{}\"}}", "é".repeat(CALL_BYTES_MAX));
        let answer = format!("{CALL}{body}{CALL_END}<think>so</think>after");
        let whole = parse([answer.as_str()]);
        assert!(!whole.contains("ToolCall"), "past the bound it is no call");
        assert!(
            whole.contains("Reasoning(\"so\")"),
            "what follows is still told apart"
        );
        for size in [7, 4_096, CALL_BYTES_MAX + 3] {
            let mut rest = answer.as_str();
            let mut chunks = Vec::new();
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(rest.floor_char_boundary(size.min(rest.len())));
                chunks.push(chunk);
                rest = tail;
            }
            assert_eq!(parse(chunks), whole, "chunks of {size} bytes");
        }
    }

    #[test]
    fn plain_text_is_not_held_back() {
        let mut parser = Parser::default();
        assert_eq!(
            format!("{:?}", parser.push("hello")),
            "[Delta::Content(\"hello\")]"
        );
        assert!(parser.push("<").is_empty());
        assert_eq!(format!("{:?}", parser.push("3")), "[Delta::Content(\"<3\")]");
    }
}
