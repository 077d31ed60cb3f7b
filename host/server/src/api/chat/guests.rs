//! The guests around the model's text within one request: chat format, filters, tools. Calls block.

use galerne_core::chat::{ChatOptions, Delta, Message, ToolSpec};
use galerne_core::filter::{FilterRequest, RequestInfo};
use galerne_core::guest::ChatParser;
use galerne_core::ids::TokenId;

use super::super::error::ApiError;
use super::super::format::Verbatim;
use super::super::params::{Decoding, Params};
use super::super::state::Target;
use super::agent::Agent;
use super::answer::Part;
use super::filters::FilterChain;
use super::request::ChatRequest;
use super::tools::functions;

/// What the engine needs for one answer of the model.
pub(super) struct Turn {
    pub(super) prompt: Vec<TokenId>,
    pub(super) decoding: Decoding,
}

/// What became of a piece of the model's text.
pub(super) struct Passed {
    pub(super) parts: Vec<Part>,
    /// The model goes on with this; the request is not over.
    pub(super) next: Option<Turn>,
}

/// The guests of one request.
pub(super) struct Guests {
    target: Target,
    params: Params,
    tools: Vec<ToolSpec>,
    parser: Box<dyn ChatParser>,
    filters: FilterChain,
    agent: Option<Agent>,
}

impl Guests {
    /// Runs everything that comes before the first token.
    ///
    /// # Errors
    /// A guest refused or failed, or the prompt cannot be made.
    pub(super) fn start(
        target: Target,
        request: ChatRequest,
        info: &RequestInfo,
    ) -> Result<(Self, Turn), ApiError> {
        let ChatRequest {
            params,
            messages,
            mut tools,
            logprobs: _,
        } = request;
        let mut filters = FilterChain::default();
        if let Some(live) = &target.live {
            tools.extend(functions(live));
            filters = FilterChain::start(live, info)?;
        }
        let FilterRequest { messages, tools } = filters.on_request(FilterRequest { messages, tools })?;
        let (turn, parser) = prompt(&target, &params, &messages, &tools)?;
        let live = target.live.as_ref();
        let agent = live.and_then(|live| Agent::new(live, info.clone(), messages));
        let guests = Self {
            params,
            tools,
            parser,
            filters,
            agent,
            target,
        };
        Ok((guests, turn))
    }

    /// What may be let out now that `text` came; `finish` is the reason if the model's answer ends with it.
    ///
    /// # Errors
    /// A guest refused or failed; nothing more may be let out.
    pub(super) fn pass(&mut self, text: &str, finish: Option<&'static str>) -> Result<Passed, ApiError> {
        let mut deltas = Vec::new();
        if !text.is_empty() {
            deltas = self.parser.push(text)?;
        }
        if finish.is_some() {
            deltas.extend(self.parser.finish()?);
        }
        let mut parts = Vec::new();
        for delta in deltas {
            self.hear(delta, &mut parts)?;
        }
        let mut next = None;
        if let Some(reason) = finish {
            match &mut self.agent {
                // An answer that was cut off may have been about to say more than its calls.
                Some(agent) if reason == "stop" && agent.is_asked() => {
                    parts.extend(agent.call()?.into_iter().map(Part::HostCall));
                    let messages = agent.messages();
                    let (turn, parser) = prompt(&self.target, &self.params, messages, &self.tools)?;
                    self.parser = parser;
                    next = Some(turn);
                }
                _ => parts.extend(self.filters.finish()?.into_iter().map(Part::Delta)),
            }
        }
        Ok(Passed { parts, next })
    }

    /// Passes one delta through the filters; a call of a host's tool goes to the agent and not to the client.
    fn hear(&mut self, delta: Delta, parts: &mut Vec<Part>) -> Result<(), ApiError> {
        let Some(agent) = &mut self.agent else {
            parts.extend(self.filters.on_delta(delta)?.map(Part::Delta));
            return Ok(());
        };
        agent.hear(&delta);
        match self.filters.on_delta(delta)? {
            Some(Delta::ToolCall { arguments_json, .. }) => agent.filtered(arguments_json),
            other => parts.extend(other.map(Part::Delta)),
        }
        Ok(())
    }
}

fn prompt(
    target: &Target,
    params: &Params,
    messages: &[Message],
    tools: &[ToolSpec],
) -> Result<(Turn, Box<dyn ChatParser>), ApiError> {
    let model = &target.model;
    let options = ChatOptions {
        add_generation_prompt: true,
        template: model.template.clone(),
    };
    let segments = model.chat.render(messages, tools, &options)?;
    let prompt = model.tokenizer.encode_segments(&segments)?;
    let decoding = params.decoding(model, &prompt)?;
    let parser = match decoding.grammar {
        None => model.chat.parser(&options)?,
        Some(_) => Box::new(Verbatim),
    };
    Ok((Turn { prompt, decoding }, parser))
}
