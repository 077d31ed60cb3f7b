//! One stream of tokens: what it holds, how far it is computed, and what its owner is told.
//! Knows nothing of other sequences.

use std::time::Instant;

use galerne_core::grammar::TokenMask;
use galerne_core::ids::{BlockId, SequenceId, TenantId, TokenId};

use crate::constraint::Constraint;
use crate::prefix::PrefixKey;
use crate::request::{Event, EventSink, FinishReason, Request, SequenceError, Usage};
use crate::sampler::Sampler;
use galerne_core::sampling::TokenLogprobs;

/// A sequence from submission to its last event.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) tenant: TenantId,
    /// Prompt, then output.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_tokens: usize,
    /// Tokens whose keys and values are in `blocks`.
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<BlockId>,
    /// Of `blocks`, how many the prefix index has been told of.
    pub(crate) indexed_blocks: usize,
    pub(crate) logprobs: Option<u32>,
    pub(crate) seed: u64,
    pub(crate) sampler: Sampler,
    /// The request's own grammar.
    constraint: Option<Constraint>,
    /// Whether it has been in the batch before.
    pub(crate) admitted: bool,
    pub(crate) usage: Usage,
    /// Most guesses the next step computes: as many as lately were right, and some more.
    pub(crate) guesses_max: usize,
    output_tokens_max: usize,
    stop_tokens: Vec<TokenId>,
    root: Option<PrefixKey>,
    keys: Vec<PrefixKey>,
    submitted: Instant,
    sink: Box<dyn EventSink>,
}

impl Sequence {
    /// `output_tokens_max` is what request, context and pool allow together.
    pub(crate) fn new(
        id: SequenceId,
        request: Request,
        output_tokens_max: usize,
        sink: Box<dyn EventSink>,
        now: Instant,
    ) -> Self {
        let prompt_tokens = request.prompt.len();
        Self {
            id,
            tenant: request.tenant,
            prompt_tokens,
            computed: 0,
            blocks: Vec::new(),
            indexed_blocks: 0,
            logprobs: request.logprobs,
            seed: request.seed,
            sampler: Sampler::new(request.sampling),
            constraint: request.grammar.map(Constraint::new),
            admitted: false,
            usage: Usage {
                prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
                ..Usage::default()
            },
            guesses_max: usize::MAX,
            output_tokens_max,
            stop_tokens: if request.ignore_eos {
                Vec::new()
            } else {
                request.stop_tokens
            },
            root: request
                .use_prefix_cache
                .then(|| PrefixKey::root(request.tenant, request.salt)),
            keys: Vec::new(),
            submitted: now,
            sink,
            tokens: request.prompt,
        }
    }

    /// Output tokens so far.
    pub(crate) fn output_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens not yet computed; 0 while a guest chooses the next one.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether it works through its prompt, or once more through all it had: it has generated nothing yet, or more than its
    /// last token is not computed.
    pub(crate) fn prefills(&self) -> bool {
        self.output_tokens() == 0 || self.pending() > 1
    }

    /// Output tokens that may still come.
    pub(crate) fn output_left(&self) -> usize {
        self.output_tokens_max.saturating_sub(self.output_tokens())
    }

    /// Whether something was asked for without which a step could not draw.
    pub(crate) fn awaits_step(&self) -> bool {
        self.sampler.awaits_plan() || self.constraint().is_some_and(Constraint::awaits)
    }

    /// Whether the request has its own grammar.
    pub(crate) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// The grammar in force: the request's own, or else the plan's. There are never both.
    pub(crate) fn constraint(&self) -> Option<&Constraint> {
        self.constraint.as_ref().or_else(|| self.sampler.constraint())
    }

    /// The same, to ask it.
    pub(crate) fn constraint_mut(&mut self) -> Option<&mut Constraint> {
        self.constraint.as_mut().or_else(|| self.sampler.constraint_mut())
    }

    /// Whether a step would be for nothing: what it needs to draw was asked for during another step and has not come.
    pub(crate) fn sits_out(&self) -> bool {
        self.pending() == 1 && self.awaits_step() && !self.sampler.was_asked_ahead()
    }

    /// The tokens that may come next, where a grammar says so.
    pub(crate) fn mask(&self) -> Option<&TokenMask> {
        self.constraint().and_then(Constraint::mask)
    }

    /// Keys of the first `count` whole blocks of tokens; none if the prefix cache is not used.
    pub(crate) fn keys(&mut self, count: usize, block_tokens: usize) -> &[PrefixKey] {
        let Some(root) = self.root else { return &[] };
        while self.keys.len() < count {
            let first = self.keys.len() * block_tokens;
            let before = self.keys.last().copied().unwrap_or(root);
            self.keys
                .push(before.child(&self.tokens[first..first + block_tokens]));
        }
        &self.keys[..count]
    }

    /// The keys that were asked for so far.
    pub(crate) fn known_keys(&self) -> &[PrefixKey] {
        &self.keys
    }

    /// Notes the first admission.
    pub(crate) fn admit(&mut self, now: Instant) {
        if !self.admitted {
            self.admitted = true;
            self.usage.queue = now.saturating_duration_since(self.submitted);
        }
    }

    /// Appends an output token and tells the owner. The reason if it was the last one.
    pub(crate) fn push(
        &mut self,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        now: Instant,
    ) -> Option<FinishReason> {
        self.tokens.push(token);
        self.sampler.accept(token);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
        }
        self.usage.completion_tokens += 1;
        let elapsed = now.saturating_duration_since(self.submitted);
        self.usage.first_token.get_or_insert(elapsed);
        self.sink.send(Event::Token { token, logprobs });
        if self.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.output_tokens() >= self.output_tokens_max {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// The last event of a sequence that ended well or was cancelled.
    pub(crate) fn finish(mut self, reason: FinishReason, now: Instant) {
        self.usage.total = now.saturating_duration_since(self.submitted);
        self.sink.send(Event::Finished {
            reason,
            usage: self.usage,
        });
    }

    /// The last event of a sequence that failed.
    pub(crate) fn fail(self, error: SequenceError) {
        self.sink.send(Event::Failed(error));
    }
}
