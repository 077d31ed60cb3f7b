//! Where engine and guests meet: traits the plugin crate implements and the engine and server call.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::capability::{Capabilities, CapabilitySession};
use crate::chat::{ChatError, ChatOptions, Delta, Message, Segment, ToolSpec};
use crate::filter::{Channel, FilterError, FilterRequest, RequestInfo, Verdict};
use crate::grammar::{GrammarFactory, GrammarSession};
use crate::graph::Graph;
use crate::ids::TokenId;
use crate::pipeline::{PipelineError, PipelineFinish};
use crate::sampling::{Candidate, PlanError, SamplingPlan};
use crate::tool::ToolError;

/// Why a guest's call failed. It ends the request it served and nothing else.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
pub enum GuestError {
    /// The guest executed `unreachable`, overflowed its stack, or broke the component ABI.
    #[error("guest \"{guest}\" trapped in {call}: {reason}")]
    Trap {
        /// The guest's name.
        guest: String,
        /// The called function.
        call: Cow<'static, str>,
        /// The runtime's description.
        reason: String,
    },
    /// The call did not end in time.
    #[error("guest \"{guest}\" ran past its limit of {limit_ms} ms in {call} ({raise})")]
    Deadline {
        /// The guest's name.
        guest: String,
        /// The called function.
        call: Cow<'static, str>,
        /// The limit.
        limit_ms: u64,
        /// Its name, and who can raise it.
        raise: String,
    },
    /// The guest asked for more of something than it may have.
    #[error("guest \"{guest}\" exceeded its limit in {call}: {limit}")]
    Limit {
        /// The guest's name.
        guest: String,
        /// The called function.
        call: Cow<'static, str>,
        /// Which limit, and its value.
        limit: String,
    },
    /// The guest refused, with its own words.
    #[error("guest \"{guest}\" refused in {call}: {message}")]
    Refused {
        /// The guest's name.
        guest: String,
        /// The called function.
        call: Cow<'static, str>,
        /// The guest's message.
        message: String,
    },
    /// The guest's plan cannot be executed.
    #[error("guest \"{guest}\": {error}")]
    Plan {
        /// The guest's name.
        guest: String,
        /// What is wrong with it.
        error: PlanError,
    },
    /// The guest's answer is not one its contract allows.
    #[error("guest \"{guest}\" answered {call} with {got}; expected {expected}")]
    Answer {
        /// The guest's name.
        guest: String,
        /// The called function.
        call: Cow<'static, str>,
        /// What the contract asks for.
        expected: Cow<'static, str>,
        /// What came.
        got: String,
    },
    /// The file is not a component of the expected world.
    #[error("guest \"{guest}\" does not fit the world {world}: {reason}")]
    Link {
        /// The guest's name.
        guest: String,
        /// Package, world and version.
        world: Cow<'static, str>,
        /// Missing or unexpected imports and exports.
        reason: String,
    },
    /// The process the guest ran in is gone, and with it every request it served.
    #[error("guest \"{guest}\" lost its process in {call}: {reason}; try again")]
    Process {
        /// The guest's name.
        guest: String,
        /// The called function.
        call: Cow<'static, str>,
        /// How it ended.
        reason: String,
    },
}

/// What a sampling guest is told before a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanStep {
    /// Output tokens so far.
    pub position: u32,
    /// Tokens accepted since the last call, oldest first (the guest's feedback).
    pub accepted: Vec<TokenId>,
}

/// The answer to a question that is worked on elsewhere, ready or not.
#[derive(Debug)]
pub enum Answer<T, E = GuestError> {
    /// Still running; the sequence sits out the step.
    Pending,
    /// Done.
    Ready(Result<T, E>),
}

/// Called from another thread whenever an answer becomes ready; wakes the engine.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A sampling guest's state for one sequence. Calls never block: they start work on the guest's own threads,
/// and the answer is taken later. At most one question is open at a time. Questions of several sessions may travel
/// together, and leave at the latest with a [`flush`](Self::flush) of one of them.
pub trait SamplerSession: Send {
    /// Asks for the plan of the next step. Answered through [`take_plan`](Self::take_plan).
    fn request_plan(&mut self, step: PlanStep);
    /// The plan, if it is there. Ready once per request.
    fn take_plan(&mut self) -> Answer<SamplingPlan>;
    /// The grammar that the plan just taken brings, if it does: what is drawn as long as the plan is valid is kept to it. The
    /// session learns from [`PlanStep::accepted`] what was drawn, and tells the grammar what this did not hear itself.
    fn take_grammar(&mut self) -> Option<Box<dyn GrammarSession>> {
        None
    }
    /// Shows candidates, most likely first. Answered through [`take_choice`](Self::take_choice).
    fn request_choice(&mut self, candidates: Vec<Candidate>);
    /// Called on every session that was asked something, when all of them have been.
    fn flush(&mut self) {}
    /// Takes in an answer that has come, if that takes this thread next to no time. It comes without that too, a little later. Called
    /// again and again while answers are watched for.
    fn hear(&mut self) {}
    /// The index into the candidates, if it is there. Ready once per request; already bounds-checked.
    fn take_choice(&mut self) -> Answer<usize>;
}

/// What a sampling guest's session begins with.
#[derive(Clone, Copy)]
pub struct SequenceInfo<'a> {
    /// The parameters of the request, as JSON text; `{}` if it gave none.
    pub params_json: &'a str,
    /// Number of tokens in the vocabulary.
    pub vocabulary: u32,
    /// Seed for the guest's own randomness.
    pub seed: u64,
    /// The tokens before the output.
    pub prompt: &'a [TokenId],
    /// Whether the request itself says what the output must match. A plan that brings another grammar ends it.
    pub constrained: bool,
    /// Makes the grammars the guest asks for, if its deployment grants them.
    pub grammars: Option<&'a Arc<dyn GrammarFactory>>,
}

impl<'a> SequenceInfo<'a> {
    /// Of a sequence with an empty prompt and without grammars.
    #[must_use]
    pub fn new(params_json: &'a str, vocabulary: u32, seed: u64) -> Self {
        Self {
            params_json,
            vocabulary,
            seed,
            prompt: &[],
            constrained: false,
            grammars: None,
        }
    }
}

/// A sampling guest that is loaded and can serve sequences.
pub trait SamplerFactory: Send + Sync {
    /// A session for one sequence. Blocks for at most the per-request deadline.
    ///
    /// # Errors
    /// The guest refused the parameters, trapped or ran late.
    fn session(&self, info: &SequenceInfo<'_>, waker: Waker) -> Result<Box<dyn SamplerSession>, GuestError>;
}

/// An architecture guest that is loaded.
pub trait Architecture: Send + Sync {
    /// The `model_type` values of `config.json` this guest builds. Blocks for at most the per-request deadline.
    ///
    /// # Errors
    /// The guest trapped, ran late or exceeded a limit.
    fn model_types(&self) -> Result<Vec<String>, GuestError>;

    /// The graph of the model with this `config.json`: foreign data, to be validated. Blocks for at most the
    /// per-model deadline.
    ///
    /// # Errors
    /// The guest refused the configuration, trapped, ran late or exceeded a limit.
    fn build(&self, config_json: &str) -> Result<Graph, GuestError>;
}

/// A chat format guest that is loaded.
pub trait ChatFormat: Send + Sync {
    /// Whether a model with this template text and these special tokens speaks this format. Blocks for at most the
    /// per-request deadline.
    ///
    /// # Errors
    /// The guest trapped, ran late or exceeded a limit.
    fn recognises(&self, template: Option<&str>, special_tokens: &[String]) -> Result<bool, GuestError>;

    /// The conversation as segments of text and special tokens, ready to be tokenized. Blocks.
    ///
    /// # Errors
    /// The guest refused the messages, trapped or ran late.
    fn render(
        &self,
        messages: &[Message],
        tools: &[ToolSpec],
        options: &ChatOptions,
    ) -> Result<Vec<Segment>, ChatError>;

    /// A parser for one answer. Blocks for at most the per-request deadline.
    ///
    /// # Errors
    /// The guest trapped or ran late.
    fn parser(&self, options: &ChatOptions) -> Result<Box<dyn ChatParser>, ChatError>;
}

/// Splits one streamed answer into content, reasoning and tool calls. Calls block for at most the per-token deadline.
pub trait ChatParser: Send {
    /// The deltas that `text` completes; text that might begin a marker is held back.
    ///
    /// # Errors
    /// The guest trapped or ran late; the parser is unusable afterwards.
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ChatError>;
    /// What was held back.
    ///
    /// # Errors
    /// As for [`push`](Self::push).
    fn finish(&mut self) -> Result<Vec<Delta>, ChatError>;
}

/// A filter guest that is loaded and can serve requests.
pub trait FilterFactory: Send + Sync {
    /// A session for one request and its answer. `params_json` is what the deployment gives this filter, `{}` if
    /// nothing. Blocks for at most the per-request deadline.
    ///
    /// # Errors
    /// The guest refused the parameters, trapped or ran late.
    fn session(&self, params_json: &str, info: &RequestInfo) -> Result<Box<dyn FilterSession>, GuestError>;
}

/// A filter's state for one request and its answer. Calls block: [`on_request`](Self::on_request) for at most the
/// per-request deadline, the others for at most the per-token deadline. After its first error, which may be a refusal,
/// a session answers every call with that error.
pub trait FilterSession: Send {
    /// Decides on the request. Called once, before any text.
    ///
    /// # Errors
    /// The filter refuses the request; or the guest trapped, ran late, exceeded a limit, or its rewritten request
    /// is empty or has an unknown role.
    fn on_request(&mut self, request: &FilterRequest) -> Result<Verdict, FilterError>;

    /// The text that may be let out now that `text` came on `channel`; what the filter holds back comes with a later
    /// call. Empty text lets out nothing and calls nobody.
    ///
    /// # Errors
    /// The filter refuses the answer; or the guest failed, also by holding back or letting out more than its limits.
    /// Then nothing of this answer may be let out any more, on any channel.
    fn on_text(&mut self, channel: Channel, text: &str) -> Result<String, FilterError>;

    /// What is let out at the end of `channel`, in place of all that was held back. Called once for every channel that
    /// had text, and for [`Channel::Content`] in any case; no text of the channel follows.
    ///
    /// # Errors
    /// As for [`on_text`](Self::on_text).
    fn finish(&mut self, channel: Channel) -> Result<String, FilterError>;
}

/// A tool guest that is loaded: functions that a model may call and the host runs.
pub trait ToolFactory: Send + Sync {
    /// The functions it offers with these parameters of the deployment (`{}` if it gives none). Names are unique and
    /// fit [`is_tool_name`](crate::tool::is_tool_name); each schema is a JSON object. Blocks for at most the per-request
    /// deadline; ask once per deployment.
    ///
    /// # Errors
    /// The guest refused the parameters, trapped or ran late; or its list is not one the contract allows.
    fn list(&self, params_json: &str) -> Result<Vec<ToolSpec>, GuestError>;

    /// The calls of one request, which share its limits.
    ///
    /// # Errors
    /// The host has no room for it, or what runs the guest is gone.
    fn session(&self, params_json: &str, info: &RequestInfo) -> Result<Box<dyn ToolSession>, GuestError>;
}

/// The tool calls of one request. Each call starts with nothing left of earlier ones: a call that failed says nothing
/// about the next.
pub trait ToolSession: Send {
    /// Runs a function and gives its answer, which is text for the model and bounded. Blocks for at most the tools'
    /// deadline and the time a call may wait for capabilities, together.
    ///
    /// # Errors
    /// See [`ToolError`]: most are for the model to read, and end nothing.
    fn call(&mut self, name: &str, arguments_json: &str) -> Result<String, ToolError>;
}

/// A pipeline guest that is loaded.
pub trait PipelineFactory: Send + Sync {
    /// Answers one request. `model` answers every [`Ask::Pipeline`](crate::capability::Ask::Pipeline), and nothing else is
    /// asked of it. Blocks until the pipeline ends: for at most its deadline and the time it may wait, together.
    ///
    /// # Errors
    /// See [`PipelineError`]; also if `model` says that the request is over.
    fn run(
        &self,
        params_json: &str,
        info: &RequestInfo,
        request: FilterRequest,
        model: Box<dyn CapabilitySession>,
    ) -> Result<PipelineFinish, PipelineError>;
}

/// A world of the contract. A component may export several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum World {
    /// Architectures.
    Model,
    /// Chat formats.
    Chat,
    /// Samplers.
    Sampler,
    /// Filters.
    Filter,
    /// Tools.
    Tool,
    /// Pipelines.
    Pipeline,
}

impl std::fmt::Display for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Chat => "chat",
            Self::Sampler => "sampler",
            Self::Filter => "filter",
            Self::Tool => "tool",
            Self::Pipeline => "pipeline",
        })
    }
}

/// What a component says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFacts {
    /// The worlds it fits, at least one.
    pub worlds: Vec<World>,
    /// The capabilities it imports, as `package/interface@version`.
    pub imports: Vec<String>,
}

/// What became of guests' calls since the host started, and where tenants' guests run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// Calls that ran past their deadline.
    pub deadlines: u64,
    /// Calls that went beyond another limit.
    pub limits: u64,
    /// Calls that trapped.
    pub traps: u64,
    /// Answers the contract does not allow, bad plans among them.
    pub bad_answers: u64,
    /// Calls whose process ended.
    pub lost: u64,
    /// Time of calls in this process, without what they waited for the host, in microseconds.
    pub busy_us: u64,
    /// The most memory an instance of this process had after a call, in bytes.
    pub memory_peak_bytes: u64,
    /// Cells that run.
    pub cells: u64,
    /// Cells that were started, those that were started again among them.
    pub cells_started: u64,
}

/// A component to be loaded.
#[derive(Debug, Clone, Copy)]
pub struct GuestSource<'a> {
    /// Whose it is.
    pub tenant: &'a str,
    /// For messages.
    pub name: &'a str,
    /// The component's bytes.
    pub component: &'a [u8],
}

/// Loads tenants' guests. Calls block: they compile components that were not seen before.
pub trait GuestLoader: Send + Sync {
    /// Checks that the component fits at least one world, and loads it once in each that it fits.
    ///
    /// # Errors
    /// No component, or it does not fit; says what is wrong and what to do.
    fn inspect(&self, source: GuestSource<'_>) -> Result<GuestFacts, GuestError>;

    /// Loads a sampler.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    fn load_sampler(&self, source: GuestSource<'_>) -> Result<Arc<dyn SamplerFactory>, GuestError>;

    /// Loads a filter.
    ///
    /// # Errors
    /// As for [`load_sampler`](Self::load_sampler).
    fn load_filter(&self, source: GuestSource<'_>) -> Result<Arc<dyn FilterFactory>, GuestError>;

    /// Loads tools.
    ///
    /// # Errors
    /// As for [`load_sampler`](Self::load_sampler).
    fn load_tool(&self, source: GuestSource<'_>) -> Result<Arc<dyn ToolFactory>, GuestError>;

    /// Loads a pipeline.
    ///
    /// # Errors
    /// As for [`load_sampler`](Self::load_sampler).
    fn load_pipeline(&self, source: GuestSource<'_>) -> Result<Arc<dyn PipelineFactory>, GuestError>;

    /// The same loader for one deployment: filters, tools and pipelines loaded by it may import what is granted, and ask for it.
    /// Without this, nothing is granted.
    fn with_capabilities(&self, capabilities: Arc<dyn Capabilities>) -> Arc<dyn GuestLoader>;

    /// What became of guests' calls.
    fn stats(&self) -> GuestStats;

    /// What guests have executed, by their names: about one unit for each WebAssembly instruction. Empty where that is not
    /// counted.
    fn fuel(&self) -> Vec<(String, u64)>;
}
