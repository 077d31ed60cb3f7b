//! One running answer: from a prompt's tokens to text, stopped and counted. Dropping it cancels the sequence.

use std::sync::Arc;
use std::time::Instant;

use galerne_core::ids::{SequenceId, TokenId};
use galerne_core::sampling::TokenLogprobs;
use galerne_engine::handle::EngineHandle;
use galerne_engine::request::{Event, FinishReason, Request};
use galerne_store::tokenizer::TokenStream;
use serde_json::{Value, json};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::ApiError;
use super::params::{Decoding, Params};
use super::state::{ApiState, ServedModel};
use super::stop::StopMatcher;

/// Tokens that came together, and the text they completed.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenId>,
    pub(super) logprobs: Vec<(TokenId, TokenLogprobs)>,
    /// OpenAI's finish reason, with the last piece.
    pub(super) finish: Option<&'static str>,
}

/// Tokens of a request.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Usage {
    prompt_tokens: usize,
    cached_tokens: u32,
    pub(super) completion_tokens: u32,
    /// Computed because a sampler proposed them, and drawn.
    accepted_tokens: u32,
    /// Computed and not drawn.
    rejected_tokens: u32,
}

impl Usage {
    /// OpenAI's `usage`.
    pub(super) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens as usize,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted_tokens,
                "rejected_prediction_tokens": self.rejected_tokens,
            },
        })
    }
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            completion_tokens: self.completion_tokens + other.completion_tokens,
            accepted_tokens: self.accepted_tokens + other.accepted_tokens,
            rejected_tokens: self.rejected_tokens + other.rejected_tokens,
        }
    }
}

/// A running answer.
pub(super) struct Generation {
    state: Arc<ApiState>,
    model: Arc<ServedModel>,
    events: UnboundedReceiver<Event>,
    guard: CancelGuard,
    text: TokenStream,
    stop: StopMatcher,
    ignore_eos: bool,
    begin: Instant,
    spent: Usage,
    over: bool,
}

/// Cancels its sequence when dropped: a client that goes away drops the future or body that owns this.
struct CancelGuard {
    engine: EngineHandle,
    id: SequenceId,
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.engine.cancel(self.id);
    }
}

impl Generation {
    /// Checks the length and submits.
    pub(super) fn start(
        state: &Arc<ApiState>,
        model: &Arc<ServedModel>,
        params: &Params,
        prompt: Vec<TokenId>,
        decoding: Decoding,
        logprobs: Option<u32>,
    ) -> Result<Self, ApiError> {
        Self::start_waking(state, model, params, prompt, decoding, logprobs, || ())
    }

    /// The same; `wake` is called on the engine's thread when something came.
    pub(super) fn start_waking(
        state: &Arc<ApiState>,
        model: &Arc<ServedModel>,
        params: &Params,
        prompt: Vec<TokenId>,
        decoding: Decoding,
        logprobs: Option<u32>,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self, ApiError> {
        if !state.is_ready() {
            return Err(ApiError::not_ready());
        }
        let context = model.engine.context_tokens_max();
        let prompt_tokens = prompt.len();
        let room = (context as usize).saturating_sub(prompt_tokens);
        let wanted = params.tokens_max.map_or(1, |tokens| tokens as usize);
        if room < wanted {
            let mut error = ApiError::invalid(format!(
                "this model's context is {context} tokens; the prompt has {prompt_tokens} and {wanted} more were asked for; \
                 shorten the prompt or lower max_tokens"
            ));
            error.code = Some("context_length_exceeded");
            return Err(error);
        }
        let (tenant, salt) = state.tenant();
        // Unbounded in form only: a sequence sends at most tokens_max events and one more.
        let (sender, events) = unbounded_channel();
        let request = Request {
            tenant,
            salt,
            prompt,
            tokens_max: params
                .tokens_max
                .unwrap_or(u32::try_from(room).unwrap_or(u32::MAX)),
            stop_tokens: model.stop_tokens.clone(),
            ignore_eos: params.ignore_eos,
            sampling: decoding.sampling,
            grammar: decoding.grammar,
            seed: params.seed,
            logprobs,
            use_prefix_cache: true,
        };
        let sink = move |event| {
            // Nobody listens once the client is gone; the cancellation is on its way.
            let _ = sender.send(event);
            wake();
        };
        let id = model.engine.submit(request, Box::new(sink))?;
        Ok(Self {
            state: Arc::clone(state),
            guard: CancelGuard {
                engine: model.engine.clone(),
                id,
            },
            text: model.tokenizer.stream(),
            stop: StopMatcher::new(params.stops.clone()),
            model: Arc::clone(model),
            events,
            ignore_eos: params.ignore_eos,
            begin: Instant::now(),
            spent: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            over: false,
        })
    }

    /// The next piece; `None` after the one that carried the finish reason.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        if self.over {
            return Ok(None);
        }
        let Some(first) = self.events.recv().await else {
            return Err(self.lost());
        };
        self.piece(first).map(Some)
    }

    /// The next piece, if something came. After the piece that carried the finish reason nothing comes.
    pub(super) fn try_next(&mut self) -> Result<Option<Piece>, ApiError> {
        if self.over {
            return Ok(None);
        }
        match self.events.try_recv() {
            Ok(first) => self.piece(first).map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(self.lost()),
        }
    }

    fn lost(&mut self) -> ApiError {
        self.end("error");
        ApiError::internal("the engine dropped the sequence without a last event")
    }

    /// What has come meanwhile goes out together, as far as the host lets it.
    fn piece(&mut self, first: Event) -> Result<Piece, ApiError> {
        let mut piece = Piece::default();
        let mut next = Some(first);
        while let Some(event) = next {
            self.take(event, &mut piece)?;
            next = if self.over || piece.tokens.len() >= self.piece_tokens_max() {
                None
            } else {
                self.events.try_recv().ok()
            };
        }
        Ok(piece)
    }

    fn take(&mut self, event: Event, piece: &mut Piece) -> Result<(), ApiError> {
        match event {
            Event::Token { token, logprobs } => {
                self.spent.completion_tokens += 1;
                if self.spent.completion_tokens == 1 {
                    self.state.metrics().first_token(self.begin.elapsed());
                }
                piece.tokens.push(token);
                piece.logprobs.extend(logprobs.map(|logprobs| (token, logprobs)));
                let ends = !self.ignore_eos && self.model.stop_tokens.contains(&token);
                if !ends {
                    let text = self.text.push(token);
                    self.release(&text, piece);
                }
            }
            Event::Finished { reason, usage } => {
                self.spent.cached_tokens = usage.cached_tokens;
                self.spent.accepted_tokens = usage.accepted_tokens;
                self.spent.rejected_tokens = usage.proposed_tokens.saturating_sub(usage.accepted_tokens);
                let rest = self.text.finish();
                self.release(&rest, piece);
                if !self.over {
                    piece.text.push_str(&self.stop.finish());
                    let reason = match reason {
                        FinishReason::Length => "length",
                        FinishReason::Stop | FinishReason::Cancelled => "stop",
                    };
                    self.end(reason);
                    piece.finish = Some(reason);
                }
            }
            Event::Failed(error) => {
                self.end("error");
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn release(&mut self, text: &str, piece: &mut Piece) {
        let matched = self.stop.push(text);
        piece.text.push_str(&matched.text);
        if matched.stopped {
            self.guard.engine.cancel(self.guard.id);
            self.end("stop");
            piece.finish = Some("stop");
        }
    }

    fn end(&mut self, reason: &str) {
        self.over = true;
        self.state.metrics().ended(reason);
        self.state.metrics().total(self.begin.elapsed());
    }

    /// Tokens that go on together at most.
    pub(super) fn piece_tokens_max(&self) -> usize {
        self.state.limits().piece_tokens_max
    }

    /// Tokens so far.
    pub(super) fn spent(&self) -> Usage {
        self.spent
    }

    pub(super) fn state(&self) -> &Arc<ApiState> {
        &self.state
    }

    pub(super) fn model(&self) -> &Arc<ServedModel> {
        &self.model
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.over {
            self.end("abort");
        }
    }
}

/// A token as text for log-probabilities: lossy where it is part of a character; `bytes` tells exactly.
pub(super) fn token_text(model: &ServedModel, token: TokenId) -> (String, Vec<u8>) {
    let bytes = model.tokenizer.token_bytes(token);
    if bytes.is_empty()
        && let Some(name) = model.tokenizer.token_name(token)
    {
        return (name.to_owned(), name.as_bytes().to_vec());
    }
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}
