//! What pipelines ask of the model and are told, as plain data. Knows no engine and no guest runtime.

use serde::{Deserialize, Serialize};

use crate::chat::{Delta, Message, ToolSpec};
use crate::filter::Refusal;
use crate::grammar::GrammarText;
use crate::guest::GuestError;
use crate::sampling::SamplingPlan;

/// A context of one request. The host numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContextId(pub u32);

/// A generation of one request. The host numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GenerationId(pub u32);

/// How an output is generated. What is left out is as the client asked, or as the deployment says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerateOptions {
    /// Most output tokens.
    pub tokens_max: Option<u32>,
    /// Texts that end the output.
    pub stop: Option<Vec<String>>,
    /// How tokens are drawn; without forced tokens and candidates.
    pub plan: Option<SamplingPlan>,
    /// What the output must match.
    pub grammar: Option<GrammarText>,
    /// Decides every draw.
    pub seed: Option<u64>,
    /// Whether the outcome tells the output's log-probability.
    pub logprobs: bool,
}

/// Why an output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputFinish {
    /// By the model, a stop text or the grammar.
    Stop,
    /// It is as long as it may be.
    Length,
}

/// What a generation came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Why it ended.
    pub finish: OutputFinish,
    /// Output tokens.
    pub tokens: u32,
    /// Natural logarithm of the output's probability under the raw logits, if it was asked for.
    pub logprob: Option<f64>,
}

/// What a pipeline asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum PipelineAsk {
    /// A context of a conversation, up to where its answer begins. Answered by [`PipelineReply::Context`].
    FromMessages {
        /// Oldest first.
        messages: Vec<Message>,
        /// Functions the model may call.
        tools: Vec<ToolSpec>,
    },
    /// A context of plain text. Answered by [`PipelineReply::Context`].
    FromText(String),
    /// A copy. Answered by [`PipelineReply::Context`].
    Fork(ContextId),
    /// Text behind a context's tokens. Answered by [`PipelineReply::Done`].
    Append(ContextId, String),
    /// Keeps so many tokens. Answered by [`PipelineReply::Done`].
    Truncate(ContextId, u32),
    /// How many tokens. Answered by [`PipelineReply::Length`].
    Length(ContextId),
    /// Forgets a context. Answered by [`PipelineReply::Done`].
    DropContext(ContextId),
    /// Starts an output. Answered by [`PipelineReply::Generation`].
    Generate(ContextId, GenerateOptions),
    /// What came, once something has. Answered by [`PipelineReply::Next`].
    Next(GenerationId),
    /// Which of these have something. Answered by [`PipelineReply::Ready`].
    Ready(Vec<GenerationId>),
    /// Ends an output, or forgets one that has ended. Answered by [`PipelineReply::Done`].
    DropGeneration(GenerationId),
    /// Runs a function of the deployment's tools. Answered by [`PipelineReply::Tool`].
    CallTool {
        /// Which.
        name: String,
        /// With what.
        arguments_json: String,
    },
    /// A part of the answer. Answered by [`PipelineReply::Done`].
    Emit(Delta),
    /// Something for the client beside the answer. Answered by [`PipelineReply::Done`].
    EmitEvent {
        /// What it is.
        name: String,
        /// JSON.
        data_json: String,
    },
}

impl PipelineAsk {
    /// Whether the host works to answer, and waits for nobody: such time is the guest's own.
    #[must_use]
    pub fn is_work(&self) -> bool {
        match self {
            Self::FromMessages { .. }
            | Self::FromText(_)
            | Self::Fork(_)
            | Self::Append(..)
            | Self::Truncate(..)
            | Self::Length(_)
            | Self::DropContext(_)
            | Self::Generate(..)
            | Self::DropGeneration(_) => true,
            Self::Next(_)
            | Self::Ready(_)
            | Self::CallTool { .. }
            | Self::Emit(_)
            | Self::EmitEvent { .. } => false,
        }
    }
}

/// What a pipeline is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum PipelineReply {
    /// It is done.
    Done,
    /// A new context.
    Context(ContextId),
    /// Tokens of a context.
    Length(u32),
    /// An output that has begun.
    Generation(GenerationId),
    /// What came, or how it ended.
    Next(Next),
    /// Places in the list that was asked about.
    Ready(Vec<u32>),
    /// A function's answer, or why there is none.
    Tool(Result<String, String>),
}

/// What came of a generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Next {
    /// At least one.
    Deltas(Vec<Delta>),
    /// Nothing more comes.
    End(Outcome),
}

/// Why an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PipelineFinish {
    /// It is complete.
    Stop,
    /// It is cut off.
    Length,
    /// The client is to call functions.
    ToolCalls,
}

/// Why a request has no answer, or no more of it.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
pub enum PipelineError {
    /// The pipeline does not want to.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The pipeline failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
}
