//! A filter that misbehaves: how, by the parameter `misbehave`; in which call, by the parameter `in`.

use galerne_sdk::filter::{
    Channel, Passage, Refusal, Request, RequestInfo, Session, Verdict, all_of, instead_of,
};
use galerne_sdk::json::Value;

use crate::{hoard, recurse, spin};

/// More than one call may pass to the host.
const GIGANTIC_BYTES: usize = 20 << 20;
/// Within what one call may pass, but not again and again.
const FLOOD_BYTES: usize = 1 << 20;

struct HostileFilter {
    how: String,
    call: String,
}

impl Session for HostileFilter {
    fn create(params: &Value, _: &RequestInfo) -> Result<Self, String> {
        let word = |name: &str| {
            let word = params[name].as_str().map(str::to_owned);
            word.ok_or_else(|| format!("params.{name}: expected a word, got {}", params[name]))
        };
        let session = Self {
            how: word("misbehave")?,
            call: word("in")?,
        };
        session.misbehave("create");
        Ok(session)
    }

    fn on_request(&mut self, request: Request) -> Verdict {
        self.misbehave("on-request");
        match self.how.as_str() {
            "empty" => Verdict::Rewrite(Request {
                messages: vec![],
                ..request
            }),
            _ => Verdict::Pass,
        }
    }

    fn on_text(&mut self, _: Channel, text: &str) -> Result<Passage, Refusal> {
        self.misbehave("on-text");
        match self.how.as_str() {
            "hold" => Ok(instead_of("", String::new())),
            "gigantic" => Ok(instead_of(text, "x".repeat(GIGANTIC_BYTES))),
            "flood" => Ok(instead_of(text, "x".repeat(FLOOD_BYTES))),
            "overtake" => Ok(Passage {
                taken_bytes: u32::MAX,
                ..all_of(text)
            }),
            "status" => Err(Refusal {
                status: 200,
                reason: "all is well".to_owned(),
            }),
            _ => Ok(all_of(text)),
        }
    }

    fn finish(&mut self, _: Channel, held: &str) -> Result<String, Refusal> {
        self.misbehave("finish");
        Ok(held.to_owned())
    }
}

impl HostileFilter {
    /// Does what any call can do, if this is the one.
    fn misbehave(&self, call: &str) {
        if call != self.call {
            return;
        }
        match self.how.as_str() {
            "loop" => spin(),
            "trap" => panic!("the guest gives up"),
            "alloc" => hoard(),
            "recurse" => {
                recurse(1);
            }
            _ => {}
        }
    }
}

galerne_sdk::export_filter!(HostileFilter);
