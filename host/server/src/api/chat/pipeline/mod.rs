//! A deployment's pipeline at work on one request: its thread, what it emits, and the filters behind it.

mod branch;
mod inference;
mod shared;

use std::sync::Arc;

use galerne_core::chat::Delta;
use galerne_core::filter::{FilterRequest, RequestInfo};
use galerne_core::pipeline::{PipelineError, PipelineFinish};
use serde_json::Value;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::JoinHandle;

use self::inference::Inference;
use self::shared::Shared;
use super::super::blocking;
use super::super::error::ApiError;
use super::super::generation::{Piece, Usage};
use super::super::state::{ApiState, ServedModel, Target};
use super::answer::{Part, Writer};
use super::filters::FilterChain;
use super::request::ChatRequest;
use super::tools::{ToolCalls, functions};

/// What a pipeline may have emitted before somebody reads it.
const EMITTED_MAX: usize = 64;

/// Something a pipeline emitted.
enum Emitted {
    Delta(Delta),
    Event { name: String, data: Value },
}

/// A pipeline that answers one request. Dropping it ends the pipeline at its next question.
pub(super) struct PipelineRun {
    model: Arc<ServedModel>,
    shared: Arc<Shared>,
    emitted: Receiver<Emitted>,
    /// What has been taken from `emitted` and not given out.
    first: Option<Emitted>,
    /// Until it has been waited for.
    running: Option<JoinHandle<Result<PipelineFinish, PipelineError>>>,
    /// Away while a filter's call runs; gone after a failed one.
    filters: Option<FilterChain>,
}

impl Drop for PipelineRun {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl PipelineRun {
    /// Runs the filters over the request and starts the pipeline. Blocks for the filters.
    ///
    /// # Errors
    /// A filter refused or failed.
    pub(super) fn start(
        state: &Arc<ApiState>,
        target: Target,
        request: ChatRequest,
        info: RequestInfo,
    ) -> Result<Self, ApiError> {
        let Some(live) = target.live.clone() else {
            return Err(ApiError::internal("a pipeline without a deployment"));
        };
        let ChatRequest {
            params,
            messages,
            mut tools,
            logprobs: _,
        } = request;
        tools.extend(functions(&live));
        let mut filters = FilterChain::start(&live, &info)?;
        let request = filters.on_request(FilterRequest { messages, tools })?;
        let shared = Arc::new(Shared::default());
        let (sender, emitted) = channel(EMITTED_MAX);
        let model = Arc::clone(&target.model);
        let inference = Inference::new(
            Arc::clone(state),
            target,
            params,
            ToolCalls::new(&live, info.clone()),
            sender,
            Arc::clone(&shared),
        );
        let running = tokio::task::spawn_blocking(move || {
            let Some(pipeline) = &live.pipeline else {
                return Ok(PipelineFinish::Stop);
            };
            let inference = Box::new(inference);
            pipeline
                .guest
                .run(&pipeline.params_json, &info, request, inference)
        });
        Ok(Self {
            model,
            shared,
            emitted,
            first: None,
            running: Some(running),
            filters: Some(filters),
        })
    }

    /// Waits until the pipeline emits or ends: until then a refusal is a response of its own.
    ///
    /// # Errors
    /// It ended without an answer.
    pub(super) async fn begun(mut self) -> Result<Self, ApiError> {
        self.first = self.emitted.recv().await;
        if self.first.is_none() {
            let ended = self.ended().await;
            // Whoever asks next is told the same.
            let finish = ended?;
            self.running = Some(tokio::spawn(async move { Ok(finish) }));
        }
        Ok(self)
    }

    /// How the pipeline ended, once it has.
    async fn ended(&mut self) -> Result<PipelineFinish, ApiError> {
        let Some(running) = self.running.take() else {
            return Err(ApiError::internal("the pipeline has ended before"));
        };
        let ended = running
            .await
            .map_err(|error| ApiError::internal(format!("a task of the host failed: {error}")))?;
        // Where the host ended it, its own reason says more than the guest's trap.
        ended.map_err(|error| self.shared.failure().unwrap_or_else(|| error.into()))
    }

    /// Passes what came through the filters, and `last` says that nothing more does.
    async fn filter(&mut self, came: Vec<Emitted>, last: bool) -> Result<Vec<Part>, ApiError> {
        let Some(mut filters) = self.filters.take() else {
            return Err(ApiError::internal("the answer's filters are gone"));
        };
        let (filters, parts) = blocking(move || {
            let mut parts = Vec::new();
            for emitted in came {
                match emitted {
                    Emitted::Delta(delta) => parts.extend(filters.on_delta(delta)?.map(Part::Delta)),
                    Emitted::Event { name, data } => parts.push(Part::Event { name, data }),
                }
            }
            if last {
                parts.extend(filters.finish()?.into_iter().map(Part::Delta));
            }
            Ok::<_, ApiError>((filters, parts))
        })
        .await?;
        self.filters = Some(filters);
        Ok(parts)
    }
}

impl Writer for PipelineRun {
    async fn next(&mut self) -> Result<Option<(Piece, Vec<Part>)>, ApiError> {
        if self.running.is_none() {
            return Ok(None);
        }
        let first = match self.first.take() {
            Some(first) => Some(first),
            None => self.emitted.recv().await,
        };
        let mut came: Vec<Emitted> = first.into_iter().collect();
        while let Ok(more) = self.emitted.try_recv() {
            came.push(more);
        }
        let mut piece = Piece::default();
        let mut finish = None;
        if came.is_empty() {
            finish = Some(self.ended().await?);
        }
        let parts = self.filter(came, finish.is_some()).await?;
        piece.finish = finish.map(|finish| match finish {
            PipelineFinish::Stop => "stop",
            PipelineFinish::Length => "length",
            PipelineFinish::ToolCalls => "tool_calls",
        });
        Ok(Some((piece, parts)))
    }

    fn usage(&self) -> Usage {
        self.shared.usage()
    }

    fn model(&self) -> &ServedModel {
        &self.model
    }
}
