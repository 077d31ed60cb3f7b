//! Answers what a pipeline asks of the model: its contexts, its generations, its limits. Believes nothing of what comes: it
//! may come from a process that lies. Calls block.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_core::capability::{Ask, CapabilityError, CapabilitySession, Reply};
use galerne_core::chat::{ChatOptions, Delta, Message, Segment, ToolSpec};
use galerne_core::filter::{FilterRequest, RequestError};
use galerne_core::ids::TokenId;
use galerne_core::limits::{Allowance, PipelineLimits};
use galerne_core::pipeline::{ContextId, GenerateOptions, GenerationId, Next, PipelineAsk, PipelineReply};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use super::super::super::error::ApiError;
use super::super::super::format::Verbatim;
use super::super::super::generation::Generation;
use super::super::super::params::Params;
use super::super::super::state::{ApiState, Target};
use super::super::tools::ToolCalls;
use super::Emitted;
use super::branch::Branch;
use super::shared::{Shared, Waited};

/// How often a full channel to the client is looked at.
const FULL_WAIT: Duration = Duration::from_millis(5);
/// Bytes of an event's name.
const EVENT_NAME_BYTES_MAX: usize = 64;

type Answer = Result<PipelineReply, CapabilityError>;

/// Tokens, and how they came about.
struct Tokens {
    tokens: Vec<TokenId>,
    /// Whether what follows is an answer in the model's chat format.
    is_conversation: bool,
    /// Forks since it all began.
    depth: u32,
}

/// What one request's pipeline has of the model.
pub(super) struct Inference {
    state: Arc<ApiState>,
    target: Target,
    params: Params,
    limits: PipelineLimits,
    /// Who can raise them.
    allowance: Allowance,
    tools: ToolCalls,
    contexts: BTreeMap<ContextId, Tokens>,
    branches: BTreeMap<GenerationId, Branch>,
    /// For numbers that are never used twice.
    next_id: u32,
    /// Generations so far.
    generations: u32,
    /// Output tokens of generations that are no more.
    tokens_before: usize,
    emitted_bytes: usize,
    /// Time this host worked for the pipeline. A cell may lie about its guest's time, and not about this.
    worked: Duration,
    out: Sender<Emitted>,
    shared: Arc<Shared>,
}

impl Inference {
    pub(super) fn new(
        state: Arc<ApiState>,
        target: Target,
        params: Params,
        tools: ToolCalls,
        out: Sender<Emitted>,
        shared: Arc<Shared>,
    ) -> Self {
        let allowance = tools.live().capabilities.allowance().clone();
        Self {
            limits: allowance.limits.pipeline,
            allowance,
            state,
            target,
            params,
            tools,
            contexts: BTreeMap::new(),
            branches: BTreeMap::new(),
            next_id: 0,
            generations: 0,
            tokens_before: 0,
            emitted_bytes: 0,
            worked: Duration::ZERO,
            out,
            shared,
        }
    }

    fn answer(&mut self, ask: PipelineAsk, time_left: Duration) -> Answer {
        let until = Instant::now() + time_left;
        match ask {
            PipelineAsk::FromMessages { messages, tools } => self.conversation(messages, tools),
            PipelineAsk::FromText(text) => self.plain_text(&text),
            PipelineAsk::Fork(id) => self.fork(id),
            PipelineAsk::Append(id, text) => self.append(id, &text),
            PipelineAsk::Truncate(id, tokens) => self.truncate(id, tokens),
            PipelineAsk::Length(id) => {
                let length = self.context(id)?.tokens.len();
                Ok(PipelineReply::Length(u32::try_from(length).unwrap_or(u32::MAX)))
            }
            PipelineAsk::DropContext(id) => {
                self.contexts.remove(&id);
                Ok(PipelineReply::Done)
            }
            PipelineAsk::Generate(id, options) => self.generate(id, options),
            PipelineAsk::Next(id) => self.next(id, until),
            PipelineAsk::Ready(ids) => self.ready(&ids, until).map(PipelineReply::Ready),
            PipelineAsk::DropGeneration(id) => {
                self.close(id);
                Ok(PipelineReply::Done)
            }
            PipelineAsk::CallTool { name, arguments_json } => {
                Ok(PipelineReply::Tool(self.tools.call(&name, &arguments_json)))
            }
            PipelineAsk::Emit(delta) => self.emit(delta, until),
            PipelineAsk::EmitEvent { name, data_json } => self.emit_event(name, &data_json, until),
        }
    }

    fn conversation(&mut self, messages: Vec<Message>, tools: Vec<ToolSpec>) -> Answer {
        let bytes = messages.iter().map(message_bytes).sum::<usize>()
            + tools
                .iter()
                .map(|tool| tool.parameters_json.len() + tool.description.len())
                .sum::<usize>();
        self.check_text(bytes)?;
        let request = FilterRequest { messages, tools };
        request
            .check()
            .map_err(|error| invalid(format!("expected {}, got {error}", RequestError::EXPECTED)))?;
        let model = &self.target.model;
        let options = ChatOptions {
            add_generation_prompt: true,
            template: model.template.clone(),
        };
        let tokens = model
            .chat
            .render(&request.messages, &request.tools, &options)
            .map_err(ApiError::from)
            .and_then(|segments| Ok(model.tokenizer.encode_segments(&segments)?));
        let tokens = tokens.map_err(|error| self.refused(error))?;
        self.open(Tokens {
            tokens,
            is_conversation: true,
            depth: 0,
        })
    }

    fn plain_text(&mut self, text: &str) -> Answer {
        let mut tokens: Vec<TokenId> = self.target.model.prompt_prefix.into_iter().collect();
        tokens.extend(self.encode(text)?);
        self.open(Tokens {
            tokens,
            is_conversation: false,
            depth: 0,
        })
    }

    fn fork(&mut self, id: ContextId) -> Answer {
        let context = self.idle_context(id)?;
        let depth = context.depth + 1;
        let depth_max = self.limits.fork_depth_max;
        if depth > depth_max {
            return Err(self.limit(
                &format!("forks of at most {depth_max} generations"),
                "pipeline_fork_depth_max",
            ));
        }
        let tokens = Tokens {
            tokens: context.tokens.clone(),
            is_conversation: context.is_conversation,
            depth,
        };
        self.open(tokens)
    }

    fn append(&mut self, id: ContextId, text: &str) -> Answer {
        self.idle_context(id)?;
        let more = self.encode(text)?;
        let length = self.context(id)?.tokens.len() + more.len();
        self.check_length(length)?;
        if let Some(context) = self.contexts.get_mut(&id) {
            context.tokens.extend(more);
        }
        Ok(PipelineReply::Done)
    }

    fn truncate(&mut self, id: ContextId, tokens: u32) -> Answer {
        let length = self.idle_context(id)?.tokens.len();
        if tokens as usize > length {
            return Err(invalid(format!(
                "expected at most the context's {length} tokens, got {tokens}"
            )));
        }
        if let Some(context) = self.contexts.get_mut(&id) {
            context.tokens.truncate(tokens as usize);
        }
        Ok(PipelineReply::Done)
    }

    fn generate(&mut self, id: ContextId, options: GenerateOptions) -> Answer {
        let context = self.idle_context(id)?;
        let (prompt, is_conversation) = (context.tokens.clone(), context.is_conversation);
        let running = self
            .branches
            .values()
            .filter(|branch| !branch.has_ended())
            .count();
        let running_max = self.limits.generations_max;
        if running >= running_max {
            return Err(self.limit(
                &format!("at most {running_max} generations at once"),
                "pipeline_generations_max",
            ));
        }
        let logprobs = options.logprobs;
        let begun = self.begin(prompt, is_conversation, options);
        let (generation, parser) = begun.map_err(|error| self.refused(error))?;
        let branch = Branch::new(id, generation, parser, logprobs);
        let number = GenerationId(self.number());
        self.generations += 1;
        self.branches.insert(number, branch);
        self.check_use()?;
        Ok(PipelineReply::Generation(number))
    }

    fn begin(
        &self,
        prompt: Vec<TokenId>,
        is_conversation: bool,
        options: GenerateOptions,
    ) -> Result<(Generation, Option<Box<dyn galerne_core::guest::ChatParser>>), ApiError> {
        let logprobs = options.logprobs.then_some(0);
        let params = self.params.of_output(options, self.generations, &self.target)?;
        let model = &self.target.model;
        let decoding = params.decoding(model, &prompt)?;
        let parser: Option<Box<dyn galerne_core::guest::ChatParser>> =
            match (is_conversation, &decoding.grammar) {
                (false, _) => None,
                (true, Some(_)) => Some(Box::new(Verbatim)),
                (true, None) => {
                    let options = ChatOptions {
                        add_generation_prompt: true,
                        template: model.template.clone(),
                    };
                    Some(model.chat.parser(&options)?)
                }
            };
        let shared = Arc::clone(&self.shared);
        let wake = move || shared.wake();
        let generation =
            Generation::start_waking(&self.state, model, &params, prompt, decoding, logprobs, wake)?;
        Ok((generation, parser))
    }

    fn next(&mut self, id: GenerationId, until: Instant) -> Answer {
        self.ready(&[id], until)?;
        let next = self.branches.get_mut(&id).map(Branch::next);
        match next {
            Some(Ok(Some(next))) => {
                if matches!(next, Next::End(_)) {
                    self.close(id);
                }
                Ok(PipelineReply::Next(next))
            }
            Some(Err(error)) => {
                self.close(id);
                Err(self.refused(error))
            }
            Some(Ok(None)) | None => Err(unknown("generation")),
        }
    }

    /// Blocks until one of them has something to say.
    fn ready(&mut self, ids: &[GenerationId], until: Instant) -> Result<Vec<u32>, CapabilityError> {
        if ids.is_empty() || !ids.iter().all(|id| self.branches.contains_key(id)) {
            return Err(unknown("generation"));
        }
        loop {
            for branch in self.branches.values_mut() {
                branch.poll();
            }
            self.check_use()?;
            let is_ready = |id: &GenerationId| self.branches.get(id).is_some_and(Branch::is_ready);
            let places = (0..).zip(ids).filter(|(_, id)| is_ready(id));
            let places: Vec<u32> = places.map(|(place, _)| place).collect();
            if !places.is_empty() {
                return Ok(places);
            }
            match self.shared.wait(until.saturating_duration_since(Instant::now())) {
                Waited::Woken => {}
                Waited::Over => return Err(gone()),
                Waited::TimedOut => return Err(self.too_long()),
            }
        }
    }

    /// Makes the output a part of its context, which may be changed again; a generation that runs ends.
    fn close(&mut self, id: GenerationId) {
        let Some(mut branch) = self.branches.remove(&id) else {
            return;
        };
        branch.poll();
        self.shared.spend(branch.spent());
        self.tokens_before += branch.len();
        if let Some(context) = self.contexts.get_mut(&branch.context) {
            context.tokens.extend_from_slice(branch.output());
        }
    }

    fn emit(&mut self, delta: Delta, until: Instant) -> Answer {
        let bytes = match &delta {
            Delta::Content(text) | Delta::Reasoning(text) => text.len(),
            Delta::ToolCall { name, arguments_json } => name.len() + arguments_json.len(),
        };
        if bytes == 0 {
            return Ok(PipelineReply::Done);
        }
        self.send(Emitted::Delta(delta), bytes, until)
    }

    fn emit_event(&mut self, name: String, data_json: &str, until: Instant) -> Answer {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if !(1..=EVENT_NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(fits) {
            return Err(invalid(
                "expected an event's name of 1 to 64 letters, digits, _, - and .".to_owned(),
            ));
        }
        let (bytes, bytes_max) = (data_json.len(), self.limits.event_bytes_max);
        if bytes > bytes_max {
            return Err(self.limit(
                &format!("an event of at most {bytes_max} bytes, got {bytes}"),
                "pipeline_event_bytes_max",
            ));
        }
        let data = serde_json::from_str(data_json)
            .map_err(|error| invalid(format!("expected an event's data as JSON: {error}")))?;
        let bytes = name.len() + bytes;
        self.send(Emitted::Event { name, data }, bytes, until)
    }

    fn send(&mut self, emitted: Emitted, bytes: usize, until: Instant) -> Answer {
        self.emitted_bytes = self.emitted_bytes.saturating_add(bytes);
        let bytes_max = self.limits.emitted_bytes_max;
        if self.emitted_bytes > bytes_max {
            return Err(self.limit(
                &format!("at most {bytes_max} bytes emitted"),
                "pipeline_emitted_bytes_max",
            ));
        }
        let mut emitted = emitted;
        loop {
            emitted = match self.out.try_send(emitted) {
                Ok(()) => return Ok(PipelineReply::Done),
                Err(TrySendError::Closed(_)) => return Err(gone()),
                Err(TrySendError::Full(emitted)) => emitted,
            };
            if Instant::now() >= until {
                return Err(self.too_long());
            }
            std::thread::sleep(FULL_WAIT);
        }
    }

    fn open(&mut self, tokens: Tokens) -> Answer {
        let (contexts, contexts_max) = (self.contexts.len(), self.limits.contexts_max);
        if contexts >= contexts_max {
            return Err(self.limit(
                &format!("at most {contexts_max} contexts at once"),
                "pipeline_contexts_max",
            ));
        }
        self.check_length(tokens.tokens.len())?;
        let id = ContextId(self.number());
        self.contexts.insert(id, tokens);
        Ok(PipelineReply::Context(id))
    }

    fn number(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    fn context(&self, id: ContextId) -> Result<&Tokens, CapabilityError> {
        self.contexts.get(&id).ok_or_else(|| unknown("context"))
    }

    /// A context no generation goes on from.
    fn idle_context(&self, id: ContextId) -> Result<&Tokens, CapabilityError> {
        if self.branches.values().any(|branch| branch.context == id) {
            return Err(invalid(
                "a generation of this context runs: take all it gives, or drop it, first".to_owned(),
            ));
        }
        self.context(id)
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, CapabilityError> {
        self.check_text(text.len())?;
        let segment = [Segment::Text(text.to_owned())];
        let tokens = self.target.model.tokenizer.encode_segments(&segment);
        tokens.map_err(|error| self.refused(error.into()))
    }

    fn check_text(&self, bytes: usize) -> Result<(), CapabilityError> {
        let bytes_max = self.limits.text_bytes_max;
        if bytes > bytes_max {
            return Err(self.limit(
                &format!("text of at most {bytes_max} bytes at once, got {bytes}"),
                "pipeline_text_bytes_max",
            ));
        }
        Ok(())
    }

    fn check_length(&self, tokens: usize) -> Result<(), CapabilityError> {
        let tokens_max = self.target.model.engine.context_tokens_max() as usize;
        if tokens > tokens_max {
            return Err(invalid(format!(
                "expected at most the model's {tokens_max} tokens in a context, got {tokens}"
            )));
        }
        Ok(())
    }

    /// What all generations use together.
    fn check_use(&self) -> Result<(), CapabilityError> {
        let tokens: usize = self.tokens_before + self.branches.values().map(Branch::len).sum::<usize>();
        let tokens_max = self.limits.tokens_max;
        if tokens > tokens_max as usize {
            return Err(self.limit(
                &format!("at most {tokens_max} output tokens in one request"),
                "pipeline_tokens_max",
            ));
        }
        let block_tokens = self.target.model.engine.limits().block_tokens;
        let blocks = |branch: &Branch| {
            let context = self.contexts.get(&branch.context);
            let before = context.map_or(0, |context| context.tokens.len());
            (before + branch.len()).div_ceil(block_tokens)
        };
        let running = self.branches.values().filter(|branch| !branch.has_ended());
        let (blocks, blocks_max) = (running.map(blocks).sum::<usize>(), self.limits.blocks_max);
        if blocks > blocks_max {
            return Err(self.limit(
                &format!("generations of at most {blocks_max} KV blocks at once, got {blocks}"),
                "pipeline_blocks_max",
            ));
        }
        Ok(())
    }

    /// A limit was met: which, and who can raise it.
    fn limit(&self, what: &str, name: &str) -> CapabilityError {
        CapabilityError::Limit(format!("{what} ({})", self.allowance.who(name)))
    }

    fn too_long(&self) -> CapabilityError {
        CapabilityError::Timeout(format!(
            "a pipeline waits no longer in one request ({})",
            self.allowance.who("pipeline_wait_ms_max")
        ))
    }

    /// Why something was refused, for the guest; what no guest can help ends the request.
    fn refused(&self, error: ApiError) -> CapabilityError {
        let message = error.message.clone();
        if error.retry_after_s.is_some() {
            self.shared.fail(error);
            CapabilityError::Over(message)
        } else if error.status.is_client_error() {
            CapabilityError::Invalid(message)
        } else {
            CapabilityError::Failed(message)
        }
    }
}

impl CapabilitySession for Inference {
    fn ask(&mut self, ask: Ask, time_left: Duration) -> Result<Reply, CapabilityError> {
        let Ask::Pipeline(ask) = ask else {
            return Err(CapabilityError::Denied(
                "this answers for the model only".to_owned(),
            ));
        };
        if self.shared.is_over() {
            return Err(gone());
        }
        let (begin, is_work) = (Instant::now(), ask.is_work());
        let answer = self.answer(ask, time_left);
        if is_work {
            self.worked += begin.elapsed();
            let work_max = self.limits.work_max;
            if self.worked > work_max {
                let what = format!(
                    "at most {} ms of the host's work on contexts",
                    work_max.as_millis()
                );
                return Err(self.limit(&what, "pipeline_work_ms_max"));
            }
        }
        answer.map(Reply::Pipeline)
    }
}

impl Drop for Inference {
    fn drop(&mut self) {
        for id in self.branches.keys().copied().collect::<Vec<_>>() {
            self.close(id);
        }
    }
}

fn message_bytes(message: &Message) -> usize {
    let calls = message.tool_calls.iter().map(|call| call.arguments_json.len());
    message.content.len() + calls.sum::<usize>()
}

fn invalid(text: String) -> CapabilityError {
    CapabilityError::Invalid(text)
}

fn unknown(what: &str) -> CapabilityError {
    invalid(format!(
        "expected a {what} of this request that has not been dropped"
    ))
}

fn gone() -> CapabilityError {
    CapabilityError::Over("nobody waits for the answer any more".to_owned())
}
