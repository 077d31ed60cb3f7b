//! One output of a pipeline on its way: tokens from the engine, parts for the guest. Calls the chat format's parser.

use galerne_core::chat::Delta;
use galerne_core::guest::ChatParser;
use galerne_core::ids::TokenId;
use galerne_core::pipeline::{ContextId, Next, Outcome, OutputFinish};

use super::super::super::error::ApiError;
use super::super::super::generation::{Generation, Piece, Usage};

/// A generation of a pipeline.
pub(super) struct Branch {
    /// What it goes on from, and becomes a part of.
    pub(super) context: ContextId,
    generation: Generation,
    /// None for plain text.
    parser: Option<Box<dyn ChatParser>>,
    /// Not yet given to the guest.
    came: Vec<Delta>,
    /// The tokens it was made of.
    came_tokens: usize,
    tokens: Vec<TokenId>,
    /// Of the tokens so far, if it was asked for.
    logprob: Option<f64>,
    ended: Option<Outcome>,
    failed: Option<ApiError>,
}

impl Branch {
    pub(super) fn new(
        context: ContextId,
        generation: Generation,
        parser: Option<Box<dyn ChatParser>>,
        logprobs: bool,
    ) -> Self {
        Self {
            context,
            generation,
            parser,
            came: Vec::new(),
            came_tokens: 0,
            tokens: Vec::new(),
            logprob: logprobs.then_some(0.0),
            ended: None,
            failed: None,
        }
    }

    /// Takes what has come from the engine.
    pub(super) fn poll(&mut self) {
        let tokens_max = self.generation.piece_tokens_max();
        // Tokens that are no text yet are nothing to give.
        while !self.has_ended() && (self.came.is_empty() || self.came_tokens < tokens_max) {
            match self.generation.try_next() {
                Ok(None) => return,
                Ok(Some(piece)) => {
                    if let Err(error) = self.take(piece) {
                        self.failed = Some(error);
                    }
                }
                Err(error) => self.failed = Some(error),
            }
        }
    }

    fn take(&mut self, piece: Piece) -> Result<(), ApiError> {
        if let Some(sum) = &mut self.logprob {
            *sum += piece
                .logprobs
                .iter()
                .map(|(_, logprobs)| f64::from(logprobs.logprob))
                .sum::<f64>();
        }
        self.came_tokens += piece.tokens.len();
        self.tokens.extend(piece.tokens);
        if !piece.text.is_empty() {
            match &mut self.parser {
                Some(parser) => self.came.extend(parser.push(&piece.text)?),
                None => self.came.push(Delta::Content(piece.text)),
            }
        }
        if let Some(reason) = piece.finish {
            if let Some(parser) = &mut self.parser {
                self.came.extend(parser.finish()?);
            }
            self.ended = Some(Outcome {
                finish: match reason {
                    "length" => OutputFinish::Length,
                    _ => OutputFinish::Stop,
                },
                tokens: self.generation.spent().completion_tokens,
                logprob: self.logprob,
            });
        }
        Ok(())
    }

    /// Whether nothing more comes from the engine.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.is_some() || self.failed.is_some()
    }

    /// Whether [`next`](Self::next) has something to say.
    pub(super) fn is_ready(&self) -> bool {
        !self.came.is_empty() || self.has_ended()
    }

    /// What came, or the end, if it is ready.
    ///
    /// # Errors
    /// It failed.
    pub(super) fn next(&mut self) -> Result<Option<Next>, ApiError> {
        self.came_tokens = 0;
        if !self.came.is_empty() {
            return Ok(Some(Next::Deltas(std::mem::take(&mut self.came))));
        }
        match (&self.failed, self.ended) {
            (Some(error), _) => Err(error.clone()),
            (None, ended) => Ok(ended.map(Next::End)),
        }
    }

    /// Output tokens so far.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn spent(&self) -> Usage {
        self.generation.spent()
    }

    /// What goes into its context: the output without the token that ended it.
    pub(super) fn output(&self) -> &[TokenId] {
        let ends = |token: &TokenId| self.generation.model().stop_tokens.contains(token);
        match self.tokens.split_last() {
            Some((last, before)) if ends(last) => before,
            _ => &self.tokens,
        }
    }
}
