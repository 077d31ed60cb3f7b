//! The engine as a pure state machine: sequences go in, steps and events come out, time is an argument.
//! Knows no thread, no clock and no device; [`crate::handle`] drives it.
//!
//! One step: [`Engine::schedule`], unless [`Engine::schedule_next`] has been there before, then (while the device computes) [`Engine::ask_guests`], then
//! [`Engine::settle_plans`], [`Engine::sample_requests`], [`Engine::complete`], [`Engine::settle_choices`] and
//! [`Engine::settle_ahead`].

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use galerne_core::grammar::TokenMask;
use galerne_core::ids::{BlockId, SequenceId, TokenId};
use galerne_core::sampling::SamplingPlan;
use galerne_core::sampling::TokenLogprobs;
use galerne_kernels::device::{DeviceError, SampleOutcome, SampleRequest, StepBatch};

use crate::admission::Admission;
use crate::blocks::BlockPool;
use crate::constraint::Allowed;
use crate::prefix::PrefixIndex;
use crate::request::{EventSink, FinishReason, Request, SequenceError, SubmitError};
use crate::sampler::{PlanBounds, Polled, uniform};
use crate::sequence::Sequence;
use crate::stats::{EngineStats, IntegrityError};

/// Work for the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Blocks that came from another tenant, to be zeroed before the step.
    pub zero: Vec<BlockId>,
    /// The tokens.
    pub batch: StepBatch,
}

/// One sequence's part in the step under way.
pub(crate) struct Entry {
    pub(crate) id: SequenceId,
    pub(crate) tokens: usize,
    /// Its first row of the output, if its last token is in the step.
    pub(crate) row: Option<usize>,
    /// Tokens computed behind the last, each with a row, because the plan proposes them.
    pub(crate) guesses: Vec<TokenId>,
    pub(crate) draw: Draw,
}

/// How an entry's token comes about.
pub(crate) enum Draw {
    /// Not decided, or no output is wanted.
    None,
    /// By the sequence's plan on the device.
    Plan,
    /// The plan says which, or the grammar leaves one; the device is not asked.
    Forced(TokenId),
    /// The same, but log-probabilities are wanted: the device is made to draw this token.
    ForcedPlan(TokenId, Box<SamplingPlan>),
    /// The guest or the grammar is late.
    SatOut,
}

/// A token and its log-probabilities, if one came about and if they are wanted.
type Drawn = Option<(TokenId, Option<TokenLogprobs>)>;

/// Sequences, the KV pool, and the step under way.
pub struct Engine {
    pub(crate) admission: Admission,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    /// In the batch, in order of admission.
    pub(crate) running: Vec<SequenceId>,
    pub(crate) waiting: VecDeque<SequenceId>,
    pub(crate) pool: BlockPool,
    pub(crate) index: PrefixIndex,
    /// The step under way.
    pub(crate) entries: Option<Vec<Entry>>,
    /// The step behind it, if it was put together already.
    pub(crate) next_entries: Option<Vec<Entry>>,
    pub(crate) stats: EngineStats,
    /// Sequences that have left the queue for the first time, into the batch or to their end.
    pub(crate) left_queue: u64,
    /// Sequences whose guest was asked to choose in the last step.
    choosing: Vec<SequenceId>,
    /// Sequences whose guest was asked ahead of the next step.
    pub(crate) ahead: Vec<SequenceId>,
    seed: u64,
    next_id: u64,
    ends: EndRate,
}

impl Engine {
    /// An engine without sequences. `seed` is mixed into every draw.
    ///
    /// # Panics
    /// If a limit is 0 under which no step could ever be put together.
    #[must_use]
    pub fn new(admission: Admission, seed: u64) -> Self {
        let limits = admission.limits;
        let smallest = [
            limits.step_tokens_max,
            limits.sequences_max,
            limits.block_tokens,
            limits.blocks,
        ]
        .into_iter()
        .min();
        assert!(smallest > Some(0), "engine limits must be at least 1: {limits:?}");
        Self {
            admission,
            sequences: BTreeMap::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            pool: BlockPool::new(admission.limits.blocks),
            index: PrefixIndex::default(),
            entries: None,
            next_entries: None,
            stats: EngineStats::default(),
            left_queue: 0,
            choosing: Vec::new(),
            ahead: Vec::new(),
            seed,
            next_id: 0,
            ends: EndRate::default(),
        }
    }

    /// Checks and queues a request.
    ///
    /// # Errors
    /// The request can never be served, or too many wait. No event is sent then.
    pub fn add(
        &mut self,
        now: Instant,
        request: Request,
        sink: Box<dyn EventSink>,
    ) -> Result<SequenceId, SubmitError> {
        self.admission.check(&request)?;
        let waiting = self
            .waiting
            .iter()
            .filter(|id| !self.sequences[id].admitted)
            .count();
        if waiting >= self.admission.limits.queue_max {
            return Err(SubmitError::QueueFull {
                waiting,
                retry_after_ms: self.retry_after_ms(),
            });
        }
        let id = SequenceId(self.next_id);
        self.insert(now, id, request, sink);
        Ok(id)
    }

    /// Queues a request that was checked, under an id that is new and larger than those before.
    pub(crate) fn insert(
        &mut self,
        now: Instant,
        id: SequenceId,
        request: Request,
        sink: Box<dyn EventSink>,
    ) {
        let output_tokens_max = self.admission.output_tokens_max(&request);
        self.next_id = id.0 + 1;
        self.sequences
            .insert(id, Sequence::new(id, request, output_tokens_max, sink, now));
        self.waiting.push_back(id);
    }

    /// Ends a sequence now, wherever it is; its blocks are free for the next step. Unknown ids are ignored.
    pub fn cancel(&mut self, now: Instant, id: SequenceId) {
        // Safe in the middle of a step: whoever gets the blocks writes to them in a later one.
        if let Some(sequence) = self.remove(now, id) {
            sequence.finish(FinishReason::Cancelled, now);
        }
    }

    /// Asks the guests whose plan is due for the step under way, and the grammars what may follow. Call right after the
    /// step was submitted.
    pub fn ask_guests(&mut self) {
        for entry in self.entries.iter().flatten().filter(|entry| entry.row.is_some()) {
            if let Some(sequence) = self.sequences.get_mut(&entry.id) {
                let position = u32::try_from(sequence.output_tokens()).unwrap_or(u32::MAX);
                sequence.sampler.ask_plan(position);
                if let Some(constraint) = sequence.constraint_mut() {
                    constraint.ask();
                }
            }
        }
        let asked = self.entries.iter().flatten().filter(|entry| entry.row.is_some());
        let asked: Vec<_> = asked.map(|entry| entry.id).collect();
        self.flush_guests(&asked);
    }

    /// Lets questions leave that were asked together.
    pub(crate) fn flush_guests(&mut self, asked: &[SequenceId]) {
        for id in asked {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.sampler.flush();
            }
        }
    }

    /// Takes in what has come for the first sequence whose guest was asked: with it comes what others of its tenant were asked, and
    /// all are waited for.
    pub(crate) fn hear(&mut self) {
        let _ = self
            .sequences
            .values_mut()
            .any(|sequence| sequence.sampler.hear());
    }

    /// Takes the plans and masks that have come for the step under way. How many sequences still miss one.
    pub fn settle_plans(&mut self, now: Instant) -> usize {
        let wanted = self.entries.iter().flatten().filter(|entry| entry.row.is_some());
        let ids: Vec<_> = wanted.map(|entry| entry.id).collect();
        ids.into_iter().filter(|id| self.poll(now, *id)).count()
    }

    /// Takes the choices that have come for the last step. How many are still missing.
    pub fn settle_choices(&mut self, now: Instant) -> usize {
        let mut choosing = std::mem::take(&mut self.choosing);
        choosing.retain(|id| self.poll(now, *id));
        let missing = choosing.len();
        self.choosing = choosing;
        missing
    }

    /// Takes whatever answers have come. Called by `schedule`.
    pub(crate) fn poll_all(&mut self, now: Instant) {
        self.choosing.clear();
        self.ahead.clear();
        let open = |s: &&Sequence| s.awaits_step() || s.sampler.awaits_choice();
        let ids: Vec<_> = self.sequences.values().filter(open).map(|s| s.id).collect();
        for id in ids {
            self.poll(now, id);
        }
    }

    /// Takes the answers of one sequence's guest and grammar, if they have come. Whether one is still missing.
    pub(crate) fn poll(&mut self, now: Instant, id: SequenceId) -> bool {
        // Both are looked at each time: the guest's answer is in force from when it came, and may bring a grammar.
        let guest_is_late = self.poll_guest(now, id);
        match self.poll_grammar(id) {
            Ok(Allowed::End) => {
                if let Some(sequence) = self.remove(now, id) {
                    sequence.finish(FinishReason::Stop, now);
                }
                false
            }
            Ok(allowed) => guest_is_late || allowed == Allowed::Pending,
            Err(error) => {
                self.fail(now, id, error);
                false
            }
        }
    }

    /// Takes a grammar's answer, if one is awaited and has come.
    fn poll_grammar(&mut self, id: SequenceId) -> Result<Allowed, SequenceError> {
        let sequence = self.sequences.get_mut(&id);
        let constraint = sequence.and_then(Sequence::constraint_mut);
        constraint.map_or(Ok(Allowed::Known), |constraint| Ok(constraint.poll()?))
    }

    /// Takes a guest's answer, if one is awaited and has come. Whether it is still missing.
    fn poll_guest(&mut self, now: Instant, id: SequenceId) -> bool {
        let limits = self.admission.limits;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let bounds = PlanBounds {
            vocabulary: self.admission.vocabulary,
            candidates_max: limits.candidates_max,
            constrained: sequence.is_constrained(),
        };
        match sequence.sampler.poll(bounds, sequence.logprobs) {
            Ok(Polled::Pending) => true,
            Ok(Polled::Idle | Polled::Plan) => false,
            Ok(Polled::Choice { token, logprobs }) => {
                self.accept(now, id, token, logprobs);
                false
            }
            Err(error) => {
                self.fail(now, id, error);
                false
            }
        }
    }

    /// Decides how each token of the step under way comes about, and what the device must draw, in order.
    /// Sequences whose plan or mask is missing sit the step out.
    pub fn sample_requests(&mut self) -> Vec<SampleRequest<'_>> {
        let Some(entries) = &mut self.entries else {
            return Vec::new();
        };
        for entry in entries.iter_mut().filter(|entry| entry.row.is_some()) {
            if let Some(sequence) = self.sequences.get_mut(&entry.id) {
                sequence
                    .sampler
                    .prepare_seen(&sequence.tokens, sequence.prompt_tokens);
                entry.draw = decide(sequence);
            }
        }
        let (seed, sequences) = (self.seed, &self.sequences);
        let request = |entry: &'_ Entry| -> Option<(usize, SequenceId)> { Some((entry.row?, entry.id)) };
        let mut requests = Vec::new();
        for entry in entries.iter() {
            let Some((row, id)) = request(entry) else { continue };
            let Some(sequence) = sequences.get(&id) else {
                continue;
            };
            let (plan, seen, mask) = match &entry.draw {
                Draw::None | Draw::Forced(_) | Draw::SatOut => continue,
                Draw::ForcedPlan(_, plan) => (&**plan, [].as_slice(), None),
                Draw::Plan => match sequence.sampler.plan() {
                    Some(plan) => (plan, sequence.sampler.seen(), sequence.mask()),
                    None => continue,
                },
            };
            requests.extend((0..=entry.guesses.len()).map(|ahead| SampleRequest {
                row: row + ahead,
                plan,
                mask: mask.map(TokenMask::words),
                seen,
                uniform: uniform(seed, sequence.seed, (sequence.output_tokens() + ahead) as u64),
                logprobs: sequence.logprobs,
            }));
        }
        requests
    }

    /// Ends the step under way with what the device drew, in the order of the requests: appends tokens, shows
    /// candidates to guests, asks those that propose for their next plan, and ends sequences.
    ///
    /// # Errors
    /// The device did not answer every request, or with a token outside the vocabulary. The sequences
    /// concerned have failed.
    pub fn complete(&mut self, now: Instant, outcomes: Vec<SampleOutcome>) -> Result<(), DeviceError> {
        let entries = self.entries.take().unwrap_or_default();
        self.stats.steps += 1;
        let mut outcomes = outcomes.into_iter();
        let mut broken = None;
        for entry in entries {
            // A sequence that ended meanwhile had no request: it is skipped there and here.
            let ended = !self.sequences.contains_key(&entry.id);
            let draws = match &entry.draw {
                Draw::Plan | Draw::ForcedPlan(..) => 1 + entry.guesses.len(),
                Draw::None | Draw::Forced(_) | Draw::SatOut => 0,
            };
            let outcomes: Vec<_> = outcomes.by_ref().take(draws).collect();
            if ended {
                continue;
            }
            let id = entry.id;
            if let Err(error) = self.settle_entry(now, &entry, outcomes) {
                self.fail(now, id, error.clone().into());
                broken = Some(error);
            }
        }
        self.ask_ahead();
        let asked = [&self.choosing[..], &self.ahead].concat();
        self.flush_guests(&asked);
        self.entries = self.next_entries.take();
        broken.map_or(Ok(()), Err)
    }

    /// Ends the step under way because the device failed; its sequences fail.
    pub fn fail_step(&mut self, now: Instant, error: &DeviceError) {
        for entry in self.entries.take().unwrap_or_default() {
            self.fail(now, entry.id, error.clone().into());
        }
    }

    /// Fails every sequence.
    pub fn fail_all(&mut self, now: Instant, error: &SequenceError) {
        (self.entries, self.next_entries) = (None, None);
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.fail(now, id, error.clone());
        }
    }

    /// Whether no sequence is left.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// When a place in the queue may be free: the recent mean time between ends of sequences.
    #[must_use]
    pub fn retry_after_ms(&self) -> u64 {
        self.ends.mean_ms().clamp(50, 30_000)
    }

    /// The numbers now.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            blocks_total: self.pool.total(),
            blocks_free: self.pool.free(),
            blocks_cached: self.pool.cached(),
            blocks_used: self.pool.total() - self.pool.free(),
            ..self.stats.clone()
        }
    }

    /// Keeps what the self-check found, for the statistics.
    pub(crate) fn note_integrity(&mut self, error: IntegrityError) {
        self.stats.integrity = Some(error);
    }

    /// Counts tokens that are now computed and tells the prefix index of blocks that are whole.
    fn note_computed(&mut self, id: SequenceId, tokens: usize) {
        let block_tokens = self.admission.limits.block_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.computed += tokens;
        let whole = sequence.computed / block_tokens;
        let first = sequence.indexed_blocks;
        if whole > first {
            sequence.indexed_blocks = whole;
            let blocks = sequence.blocks[first..whole].to_vec();
            let keys = sequence.keys(whole, block_tokens);
            for (key, block) in keys.iter().skip(first).zip(blocks) {
                self.index.insert(*key, block);
            }
        }
    }

    /// Ends a sequence's part in the step. Its guesses are looked at one after the other, each as if it had been the token
    /// of a step of its own, up to the first that was not drawn; what was computed behind that is written over later.
    fn settle_entry(
        &mut self,
        now: Instant,
        entry: &Entry,
        outcomes: Vec<SampleOutcome>,
    ) -> Result<(), DeviceError> {
        let id = entry.id;
        if matches!(entry.draw, Draw::SatOut) {
            // The last token is fed again for its logits; its KV is the same again. Its block counts as not
            // whole until then, so nobody shares a block that is still written to.
            self.note_computed(id, entry.tokens - 1);
            self.note_sat_out(id);
            return Ok(());
        }
        self.note_computed(id, entry.tokens);
        let mut outcomes = outcomes.into_iter();
        let mut guesses = entry.guesses.iter();
        self.note_proposed(id, guesses.len());
        while let Some((token, logprobs)) = self.settle_draw(entry, outcomes.next())? {
            let is_right = guesses.next() == Some(&token);
            if is_right {
                self.note_accepted(id);
            }
            self.accept(now, id, token, logprobs);
            if !is_right || !self.sequences.contains_key(&id) {
                break;
            }
            self.note_computed(id, 1);
        }
        Ok(())
    }

    fn note_sat_out(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.usage.sat_out_steps += 1;
            self.stats.sat_out_steps += 1;
        }
    }

    /// The token that was drawn, if one was; shows candidates to the guest.
    fn settle_draw(&mut self, entry: &Entry, outcome: Option<SampleOutcome>) -> Result<Drawn, DeviceError> {
        match (&entry.draw, outcome) {
            (Draw::None | Draw::SatOut, _) => Ok(None),
            (Draw::Forced(token), _) => Ok(Some((*token, None))),
            (Draw::ForcedPlan(token, _), Some(SampleOutcome::Token { logprobs, .. })) => {
                Ok(Some((*token, logprobs)))
            }
            (Draw::Plan, Some(SampleOutcome::Token { token, logprobs }))
                if token.0 < self.admission.vocabulary =>
            {
                Ok(Some((token, logprobs)))
            }
            (Draw::Plan, Some(SampleOutcome::Candidates(candidates))) if !candidates.is_empty() => {
                if let Some(sequence) = self.sequences.get_mut(&entry.id) {
                    sequence.sampler.ask_choice(candidates);
                    self.choosing.push(entry.id);
                }
                Ok(None)
            }
            (Draw::Plan | Draw::ForcedPlan(..), outcome) => Err(DeviceError::Batch {
                what: "sample outcome",
                expected: "a token of the vocabulary or candidates for each request".to_owned(),
                got: format!("{outcome:?}"),
            }),
        }
    }

    /// Appends an output token and ends the sequence if it was the last one.
    fn accept(&mut self, now: Instant, id: SequenceId, token: TokenId, logprobs: Option<TokenLogprobs>) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        self.stats.tokens_decoded += 1;
        if let Some(reason) = sequence.push(token, logprobs, now)
            && let Some(sequence) = self.remove(now, id)
        {
            sequence.finish(reason, now);
        }
    }

    fn fail(&mut self, now: Instant, id: SequenceId, error: SequenceError) {
        if let Some(sequence) = self.remove(now, id) {
            sequence.fail(error);
        }
    }

    /// Takes a sequence out of every list and frees its blocks.
    fn remove(&mut self, now: Instant, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.running.retain(|other| *other != id);
        self.waiting.retain(|other| *other != id);
        self.release_blocks(&mut sequence);
        self.left_queue += u64::from(!sequence.admitted);
        self.stats.sequences_ended += 1;
        self.ends.note(now);
        Some(sequence)
    }

    /// Frees a sequence's blocks, the last first: of a prefix the end is evicted before the beginning.
    pub(crate) fn release_blocks(&mut self, sequence: &mut Sequence) {
        for block in sequence.blocks.drain(..).rev() {
            self.pool.release(block, self.index.contains(block));
        }
        sequence.indexed_blocks = 0;
        sequence.computed = 0;
    }
}

impl Drop for Engine {
    /// Nobody is left without a last event, whatever ends the engine.
    fn drop(&mut self) {
        for (_, sequence) in std::mem::take(&mut self.sequences) {
            sequence.fail(SequenceError::EngineStopped);
        }
    }
}

fn decide(sequence: &Sequence) -> Draw {
    if sequence.sampler.plan().is_none() || (sequence.constraint().is_some() && sequence.mask().is_none()) {
        return Draw::SatOut;
    }
    // Where a grammar leaves one token there is nothing to draw. A plan's own tokens come whatever the grammar says, which
    // then fails the sequence.
    let only = || sequence.mask().and_then(TokenMask::only);
    match sequence.sampler.forced().or_else(only) {
        None => Draw::Plan,
        Some(token) if sequence.logprobs.is_none() => Draw::Forced(token),
        Some(token) => {
            // Log-probabilities are of the raw logits, so a bias no logit can outweigh does not show in them.
            let plan = SamplingPlan {
                temperature: 0.0,
                bias: vec![(token, 1e9)],
                ..SamplingPlan::default()
            };
            Draw::ForcedPlan(token, Box::new(plan))
        }
    }
}

/// An exponential mean of the time between ends of sequences.
#[derive(Debug, Default)]
struct EndRate {
    last: Option<Instant>,
    mean_ms: Option<u64>,
}

impl EndRate {
    fn note(&mut self, now: Instant) {
        if let Some(last) = self.last.replace(now) {
            let gap = now.saturating_duration_since(last).as_millis();
            let gap = u64::try_from(gap).unwrap_or(u64::MAX).min(60_000);
            self.mean_ms = Some(self.mean_ms.map_or(gap, |mean| (mean * 7 + gap) / 8));
        }
    }

    /// A second until two sequences have ended.
    fn mean_ms(&self) -> u64 {
        self.mean_ms.unwrap_or(1_000)
    }
}
