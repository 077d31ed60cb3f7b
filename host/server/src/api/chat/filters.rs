//! A deployment's filters around one answer: the request from the first to the last, the text from the last to the first.
//! Knows no tokens. Calls block.

use std::collections::BTreeSet;

use galerne_core::chat::Delta;
use galerne_core::filter::{Channel, FilterError, FilterRequest, RequestInfo, Verdict};
use galerne_core::guest::FilterSession;

use crate::deployments::Live;

/// The filters' sessions of one request; none without a deployment.
#[derive(Default)]
pub(super) struct FilterChain {
    sessions: Vec<Box<dyn FilterSession>>,
    /// Channels that had text and are not finished.
    open: BTreeSet<Channel>,
    calls: u32,
}

impl FilterChain {
    /// Starts a session of each filter.
    ///
    /// # Errors
    /// A filter refused its parameters or failed.
    pub(super) fn start(live: &Live, info: &RequestInfo) -> Result<Self, FilterError> {
        let sessions = live
            .filters
            .iter()
            .map(|filter| filter.guest.session(&filter.params_json, info))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            sessions,
            ..Self::default()
        })
    }

    /// The request as the model is to see it.
    ///
    /// # Errors
    /// A filter refuses it or failed.
    pub(super) fn on_request(&mut self, mut request: FilterRequest) -> Result<FilterRequest, FilterError> {
        for session in &mut self.sessions {
            if let Verdict::Rewrite(rewritten) = session.on_request(&request)? {
                request = rewritten;
            }
        }
        Ok(request)
    }

    /// What may be let out now that `delta` came, if anything.
    ///
    /// # Errors
    /// A filter refuses the answer or failed; nothing more may be let out.
    pub(super) fn on_delta(&mut self, delta: Delta) -> Result<Option<Delta>, FilterError> {
        if self.sessions.is_empty() {
            return Ok(Some(delta));
        }
        Ok(match delta {
            Delta::Content(text) => self.on_text(Channel::Content, text)?.map(Delta::Content),
            Delta::Reasoning(text) => self.on_text(Channel::Reasoning, text)?.map(Delta::Reasoning),
            Delta::ToolCall { name, arguments_json } => {
                let channel = Channel::ToolArguments(self.calls);
                self.calls += 1;
                // A call comes whole, so its channel ends with it.
                let mut arguments_json = self.on_text(channel, arguments_json)?.unwrap_or_default();
                arguments_json.push_str(&self.finish_channel(channel)?);
                Some(Delta::ToolCall { name, arguments_json })
            }
        })
    }

    /// What the filters held back, at the answer's end.
    ///
    /// # Errors
    /// As for [`on_delta`](Self::on_delta).
    pub(super) fn finish(&mut self) -> Result<Vec<Delta>, FilterError> {
        if self.sessions.is_empty() {
            return Ok(Vec::new());
        }
        let mut deltas = Vec::new();
        if self.open.contains(&Channel::Reasoning) {
            let rest = self.finish_channel(Channel::Reasoning)?;
            deltas.push(Delta::Reasoning(rest));
        }
        let rest = self.finish_channel(Channel::Content)?;
        deltas.push(Delta::Content(rest));
        deltas.retain(
            |delta| !matches!(delta, Delta::Content(text) | Delta::Reasoning(text) if text.is_empty()),
        );
        Ok(deltas)
    }

    fn on_text(&mut self, channel: Channel, mut text: String) -> Result<Option<String>, FilterError> {
        self.open.insert(channel);
        for session in self.sessions.iter_mut().rev() {
            text = session.on_text(channel, &text)?;
        }
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// What one filter lets out at its end, those before it still have to see.
    fn finish_channel(&mut self, channel: Channel) -> Result<String, FilterError> {
        self.open.remove(&channel);
        let mut text = String::new();
        for session in self.sessions.iter_mut().rev() {
            text = session.on_text(channel, &text)?;
            text.push_str(&session.finish(channel)?);
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts its mark around every text, holds back the last character, and lets it out at the end with its mark.
    struct Marks {
        mark: char,
        held: String,
    }

    impl FilterSession for Marks {
        fn on_request(&mut self, request: &FilterRequest) -> Result<Verdict, FilterError> {
            let mut request = request.clone();
            request.messages[0].content.push(self.mark);
            Ok(Verdict::Rewrite(request))
        }

        fn on_text(&mut self, _: Channel, text: &str) -> Result<String, FilterError> {
            self.held.push_str(text);
            let Some(last) = self.held.pop() else {
                return Ok(String::new());
            };
            Ok(std::mem::replace(&mut self.held, last.to_string()))
        }

        fn finish(&mut self, _: Channel) -> Result<String, FilterError> {
            let mut rest = std::mem::take(&mut self.held);
            rest.push(self.mark);
            Ok(rest)
        }
    }

    fn chain() -> FilterChain {
        let session = |mark| -> Box<dyn FilterSession> {
            Box::new(Marks {
                mark,
                held: String::new(),
            })
        };
        FilterChain {
            sessions: vec![session('1'), session('2')],
            ..FilterChain::default()
        }
    }

    fn content(delta: &Delta) -> &str {
        match delta {
            Delta::Content(text) => text,
            other => panic!("expected content, got {other:?}"),
        }
    }

    #[test]
    fn the_request_passes_forwards_and_the_answer_backwards() {
        let mut chain = chain();
        let message = galerne_core::chat::Message {
            role: "user".to_owned(),
            content: "hi".to_owned(),
            tool_calls: Vec::new(),
            tool_call_id: None,
        };
        let request = FilterRequest {
            messages: vec![message],
            tools: Vec::new(),
        };
        let seen = chain.on_request(request).expect("no refusal");
        assert_eq!(seen.messages[0].content, "hi12");

        let mut text = String::new();
        for piece in ["ab", "c", "de"] {
            let delta = chain
                .on_delta(Delta::Content(piece.to_owned()))
                .expect("no refusal");
            text.push_str(delta.as_ref().map_or("", content));
        }
        assert_eq!(text, "abc", "each filter holds one character");
        for delta in chain.finish().expect("no refusal") {
            text.push_str(content(&delta));
        }
        assert_eq!(text, "abcde21", "the second filter's end passes the first");
    }

    #[test]
    fn a_tool_call_passes_whole() {
        let mut chain = chain();
        let call = Delta::ToolCall {
            name: "f".to_owned(),
            arguments_json: "{}".to_owned(),
        };
        let passed = chain.on_delta(call).expect("no refusal");
        assert!(
            matches!(&passed, Some(Delta::ToolCall { arguments_json, .. }) if arguments_json == "{}21"),
            "{passed:?}"
        );
    }

    #[test]
    fn without_filters_everything_passes() {
        let mut chain = FilterChain::default();
        let delta = Delta::Content(String::new());
        assert_eq!(chain.on_delta(delta.clone()).expect("no refusal"), Some(delta));
        assert_eq!(chain.finish().expect("no refusal"), []);
    }
}
