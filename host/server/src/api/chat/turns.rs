//! The model's own answers as a chat answer: one, or more where it calls the deployment's tools in between.

use std::sync::Arc;

use super::super::blocking;
use super::super::error::ApiError;
use super::super::generation::{Generation, Piece, Usage};
use super::super::params::Params;
use super::super::state::{ApiState, ServedModel};
use super::answer::{Part, Writer};
use super::guests::{Guests, Passed, Turn};

/// The answers of the model in one request.
pub(super) struct Turns {
    generation: Generation,
    /// What earlier answers used.
    spent: Usage,
    /// Away while a guest call runs; gone after a failed one.
    guests: Option<Guests>,
    params: Params,
    logprobs: Option<u32>,
}

impl Turns {
    /// Starts the first.
    pub(super) fn start(
        state: &Arc<ApiState>,
        model: &Arc<ServedModel>,
        guests: Guests,
        turn: Turn,
        params: Params,
        logprobs: Option<u32>,
    ) -> Result<Self, ApiError> {
        let generation = Generation::start(state, model, &params, turn.prompt, turn.decoding, logprobs)?;
        Ok(Self {
            generation,
            spent: Usage::default(),
            guests: Some(guests),
            params,
            logprobs,
        })
    }
}

impl Writer for Turns {
    /// A piece that ends one answer of the model, while the request goes on with another, has no finish reason.
    async fn next(&mut self) -> Result<Option<(Piece, Vec<Part>)>, ApiError> {
        let Some(mut piece) = self.generation.next().await? else {
            return Ok(None);
        };
        if piece.text.is_empty() && piece.finish.is_none() {
            return Ok(Some((piece, Vec::new())));
        }
        let Some(mut guests) = self.guests.take() else {
            return Err(ApiError::internal("the answer's guests are gone"));
        };
        let (text, finish) = (piece.text.clone(), piece.finish);
        let (guests, passed) = blocking(move || {
            let passed = guests.pass(&text, finish)?;
            Ok::<_, ApiError>((guests, passed))
        })
        .await?;
        self.guests = Some(guests);
        let Passed { parts, next } = passed;
        if let Some(turn) = next {
            self.spent = self.spent + self.generation.spent();
            let params = self.params.after(self.spent.completion_tokens)?;
            let model = Arc::clone(self.generation.model());
            let state = Arc::clone(self.generation.state());
            self.generation =
                Generation::start(&state, &model, &params, turn.prompt, turn.decoding, self.logprobs)?;
            piece.finish = None;
        }
        Ok(Some((piece, parts)))
    }

    fn usage(&self) -> Usage {
        self.spent + self.generation.spent()
    }

    fn model(&self) -> &ServedModel {
        self.generation.model()
    }
}
