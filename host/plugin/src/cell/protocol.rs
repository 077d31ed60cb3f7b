//! What a host and a cell say to each other. Plain data; knows no socket and no guest.

use std::time::Duration;

use galerne_core::capability::{self, Ask, CapabilityError, Grants};
use galerne_core::chat::{ChatError, ChatOptions, Delta, Message, Segment, ToolSpec};
use galerne_core::filter::{Channel, FilterError, FilterRequest, RequestInfo, Verdict};
use galerne_core::graph::Graph;
use galerne_core::guest::{GuestError, PlanStep, World};
use galerne_core::ids::TokenId;
use galerne_core::limits::{Allowance, GuestLimits};
use galerne_core::pipeline::{PipelineError, PipelineFinish};
use galerne_core::sampling::Candidate;
use galerne_core::tool::ToolError;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::sampler::GuestPlan;
use crate::workers::WORKERS_MAX;

/// Threads a cell has for calls that block, each of which may ask the host one thing at a time. More calls wait for one; a
/// guest that loops or asks holds one until its deadline.
pub(crate) const BLOCKING_THREADS: usize = 64;

/// Threads a cell has for pipelines, one each for as long as it runs. They are not those of other calls: a pipeline waits
/// for tools, which must find a thread.
pub(crate) const PIPELINE_THREADS: usize = 64;

/// Questions a cell may have open: one for each of its threads that call guests.
pub(crate) const QUESTIONS_MAX: usize = BLOCKING_THREADS + PIPELINE_THREADS + WORKERS_MAX;

/// Numbers a question of a cell; its answer has the same.
pub(crate) type AskId = u64;

/// Numbers a call; its answer has the same.
pub(crate) type CallId = u64;

/// A guest loaded in a cell. The host numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct GuestId(pub(crate) u32);

/// A session, parser or filter in a cell. The host numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct SessionId(pub(crate) u64);

/// From the host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Do this and answer.
    Call(CallId, Call),
    /// Drop a session; an open question of it is answered first.
    Close(SessionId),
    /// What a guest asked.
    Reply(AskId, Result<capability::Reply, CapabilityError>),
    /// Drop a guest; its sessions live on.
    Unload(GuestId),
}

/// What a cell is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    /// First of all, once.
    Start(Settings),
    Load {
        guest: GuestId,
        world: World,
        name: String,
        /// What it may import, if its world may.
        grants: Grants,
        /// Its bounds, and who can raise them.
        allowance: Box<Allowance>,
        /// Compiled code.
        artifact: ByteBuf,
    },
    Facts {
        name: String,
        artifact: ByteBuf,
    },
    ModelTypes(GuestId),
    Build(GuestId, String),
    Recognises {
        guest: GuestId,
        template: Option<String>,
        special_tokens: Vec<String>,
    },
    Render {
        guest: GuestId,
        messages: Vec<Message>,
        tools: Vec<ToolSpec>,
        options: ChatOptions,
    },
    Parser(GuestId, SessionId, ChatOptions),
    Push(SessionId, String),
    ParserFinish(SessionId),
    Sampler {
        guest: GuestId,
        session: SessionId,
        params_json: String,
        vocabulary: u32,
        seed: u64,
        prompt: Vec<TokenId>,
        constrained: bool,
    },
    Plan(SessionId, PlanStep),
    Choose(SessionId, Vec<Candidate>),
    Filter {
        guest: GuestId,
        session: SessionId,
        params_json: String,
        info: RequestInfo,
    },
    OnRequest(SessionId, FilterRequest),
    OnText(SessionId, Channel, String),
    Finish(SessionId, Channel),
    ToolList(GuestId, String),
    Tool {
        guest: GuestId,
        /// For what it asks the host.
        session: SessionId,
        params_json: String,
        info: RequestInfo,
        name: String,
        arguments_json: String,
    },
    Pipeline {
        guest: GuestId,
        /// For what it asks the host.
        session: SessionId,
        params_json: String,
        info: RequestInfo,
        request: FilterRequest,
    },
}

/// The plugin host in a cell.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) limits: GuestLimits,
    pub(crate) workers: usize,
    pub(crate) instances_max: u32,
    pub(crate) candidates_max: usize,
}

/// From a cell. The host believes nothing of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    /// The answer to a call.
    Answer(CallId, Result<Reply, Failure>),
    /// What a guest asks; answered by [`Order::Reply`].
    Ask(Question),
}

/// A guest's question to the host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    pub(crate) id: AskId,
    pub(crate) session: SessionId,
    pub(crate) ask: Ask,
    /// What the guest's call may still wait.
    pub(crate) time_left: Duration,
}

/// What a call gives.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Facts(Vec<World>, Vec<String>),
    Types(Vec<String>),
    Graph(Graph),
    Recognised(bool),
    Segments(Vec<Segment>),
    Deltas(Vec<Delta>),
    Plan(GuestPlan),
    Choice(u32),
    Verdict(Verdict),
    Text(String),
    Tools(Vec<ToolSpec>),
    Finish(PipelineFinish),
}

/// Why a call gives nothing.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Failure {
    Guest(GuestError),
    Filter(FilterError),
    Chat(ChatError),
    Tool(ToolError),
    Pipeline(PipelineError),
    /// The cell itself, which ends.
    Cell(String),
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

impl From<FilterError> for Failure {
    fn from(error: FilterError) -> Self {
        Self::Filter(error)
    }
}

impl From<ChatError> for Failure {
    fn from(error: ChatError) -> Self {
        Self::Chat(error)
    }
}

impl From<ToolError> for Failure {
    fn from(error: ToolError) -> Self {
        Self::Tool(error)
    }
}

impl From<PipelineError> for Failure {
    fn from(error: PipelineError) -> Self {
        Self::Pipeline(error)
    }
}
