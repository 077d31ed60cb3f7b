//! Which tokens of which sequences are in the next step: decode first, then prefill in chunks, then new
//! sequences in order of arrival; preemption by recompute. Knows nothing of sampling or devices.

use std::time::Instant;

use galerne_core::ids::{BlockId, SequenceId};
use galerne_kernels::device::{SequenceSlice, StepBatch};

use crate::engine::{Draw, Engine, Entry, Step};
use crate::sequence::Sequence;

/// A step being put together.
pub(crate) struct Draft {
    /// Tokens that still fit.
    pub(crate) budget: usize,
    pub(crate) planned: Vec<Planned>,
    pub(crate) zero: Vec<BlockId>,
    /// Whether some sequence had to give up its blocks.
    pub(crate) preempted: bool,
}

/// A sequence's part in a draft.
pub(crate) struct Planned {
    pub(crate) id: SequenceId,
    /// Of its tokens, how many.
    pub(crate) tokens: usize,
    /// Behind its last token, so many guesses.
    pub(crate) guesses: usize,
}

impl Draft {
    fn plan(&mut self, id: SequenceId, tokens: usize) {
        self.budget -= tokens;
        self.planned.push(Planned {
            id,
            tokens,
            guesses: 0,
        });
    }
}

impl Engine {
    /// Puts the next step together, or `None` if there is nothing to compute now: no sequences, or all of them
    /// wait for guests.
    ///
    /// # Panics
    /// If the step before has not been completed.
    pub fn schedule(&mut self, now: Instant) -> Option<Step> {
        assert!(
            self.entries.is_none(),
            "schedule is called while a step is under way"
        );
        self.poll_all(now);
        let mut draft = Draft {
            budget: self.admission.limits.step_tokens_max,
            planned: Vec::new(),
            zero: Vec::new(),
            preempted: false,
        };
        self.plan_running(&mut draft, |pending| pending == 1);
        self.plan_running(&mut draft, |pending| pending > 1);
        if !draft.preempted {
            self.admit_waiting(&mut draft, now);
            // Last: what is sure goes before what is guessed.
            self.plan_guesses(&mut draft);
        }
        if draft.planned.is_empty() {
            return None;
        }
        Some(self.build_step(draft))
    }

    /// Plans the running sequences whose number of pending tokens is wanted, oldest first.
    fn plan_running(&mut self, draft: &mut Draft, wanted: impl Fn(usize) -> bool) {
        for id in self.running.clone() {
            let sequence = &self.sequences[&id];
            let pending = sequence.pending();
            if draft.budget == 0 || !wanted(pending) || sequence.sits_out() || !self.running.contains(&id) {
                continue;
            }
            let tokens = pending.min(draft.budget);
            if self.reserve(draft, id, tokens) {
                draft.plan(id, tokens);
            }
        }
    }

    /// Admits waiting sequences in order while places, tokens and blocks last. One whose beginning is on its way lets the
    /// next go first.
    fn admit_waiting(&mut self, draft: &mut Draft, now: Instant) {
        let mut place = 0;
        while draft.budget > 0 && self.running.len() < self.admission.limits.sequences_max {
            let Some(&id) = self.waiting.get(place) else {
                return;
            };
            let hits = self.prefix_hits(id);
            if self.prefix_is_coming(id, hits.len()) {
                place += 1;
                continue;
            }
            if !self.has_room(id, &hits) {
                return;
            }
            self.waiting.remove(place);
            self.running.push(id);
            self.start(id, &hits, now);
            let tokens = self.sequences[&id].pending().min(draft.budget);
            if self.reserve(draft, id, tokens) {
                draft.plan(id, tokens);
            }
        }
    }

    /// Blocks of the longest known prefix. At least one token is left to compute: its logits are wanted.
    fn prefix_hits(&mut self, id: SequenceId) -> Vec<BlockId> {
        let block_tokens = self.admission.limits.block_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Vec::new();
        };
        let whole = (sequence.tokens.len() - 1) / block_tokens;
        let keys = sequence.keys(whole, block_tokens);
        keys.iter().map_while(|key| self.index.get(*key)).collect()
    }

    /// Whether a running sequence is about to compute at least half of what a waiting one lacks: forks that start together
    /// then share it instead of each computing it. The running one advances with every step, so nobody waits for ever.
    fn prefix_is_coming(&self, id: SequenceId, hits: usize) -> bool {
        let block_tokens = self.admission.limits.block_tokens;
        let sequence = &self.sequences[&id];
        let lacking = sequence.tokens.len() - hits * block_tokens;
        let mut others = self.running.iter().map(|other| &self.sequences[other]);
        others.any(|other| {
            let alike = sequence.known_keys().iter().zip(other.known_keys());
            let common = alike.take_while(|(own, theirs)| own == theirs).count();
            let coming = common.saturating_sub(hits) * block_tokens;
            other.computed < common * block_tokens && coming * 2 >= lacking
        })
    }

    /// Whether all tokens of a waiting sequence fit beside what the running ones have yet to take. Admitting
    /// on less would only preempt it again.
    fn has_room(&self, id: SequenceId, hits: &[BlockId]) -> bool {
        let missing = |sequence: &Sequence, held: usize| {
            sequence
                .tokens
                .len()
                .div_ceil(self.admission.limits.block_tokens)
                .saturating_sub(held)
        };
        let promised: usize = self
            .running
            .iter()
            .map(|id| &self.sequences[id])
            .map(|sequence| missing(sequence, sequence.blocks.len()))
            .sum();
        // Hits that are free now will be held: they cannot be taken by others.
        let revived = hits.iter().filter(|block| self.pool.is_free(**block)).count();
        promised + revived + missing(&self.sequences[&id], hits.len()) <= self.pool.free()
    }

    /// Gives a sequence the blocks of its known prefix.
    fn start(&mut self, id: SequenceId, hits: &[BlockId], now: Instant) {
        let block_tokens = self.admission.limits.block_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        for block in hits {
            self.pool.hold(*block);
        }
        sequence.blocks.extend_from_slice(hits);
        sequence.indexed_blocks = hits.len();
        sequence.computed = hits.len() * block_tokens;
        if !sequence.admitted {
            sequence.admit(now);
            self.left_queue += 1;
            sequence.usage.cached_tokens = u32::try_from(sequence.computed).unwrap_or(u32::MAX);
            self.stats.prefix_hit_tokens += sequence.computed as u64;
            self.stats.prefix_query_tokens += sequence.prompt_tokens as u64;
        }
    }

    /// Makes sure a sequence has blocks for `tokens` more tokens, at the cost of the youngest ones. `false` if
    /// the sequence itself was the youngest and gave up its place.
    fn reserve(&mut self, draft: &mut Draft, id: SequenceId, tokens: usize) -> bool {
        let block_tokens = self.admission.limits.block_tokens;
        loop {
            let Some(sequence) = self.sequences.get(&id) else {
                return false;
            };
            if sequence.blocks.len() * block_tokens >= sequence.computed + tokens {
                return true;
            }
            if self.take_block(&mut draft.zero, id) {
                continue;
            }
            let youngest = self.running[self.running.len() - 1];
            self.preempt(draft, youngest);
            if youngest == id {
                return false;
            }
        }
    }

    /// Gives a sequence one more block, if one is free; notes it in `zero` if it must be zeroed.
    pub(crate) fn take_block(&mut self, zero: &mut Vec<BlockId>, id: SequenceId) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let Some(taken) = self.pool.take(sequence.tenant) else {
            return false;
        };
        sequence.blocks.push(taken.block);
        if taken.was_cached {
            self.index.remove(taken.block);
        }
        if taken.needs_zero {
            zero.push(taken.block);
        }
        true
    }

    /// Frees a running sequence's blocks and puts it, with all its tokens, at the front of the queue. The
    /// prefix index keeps what was whole, so that often little is computed again.
    fn preempt(&mut self, draft: &mut Draft, id: SequenceId) {
        let Some(mut sequence) = self.sequences.remove(&id) else {
            return;
        };
        self.release_blocks(&mut sequence);
        sequence.usage.preemptions += 1;
        self.sequences.insert(id, sequence);
        self.running.retain(|other| *other != id);
        self.waiting.push_front(id);
        self.stats.preemptions += 1;
        draft.preempted = true;
        draft.planned.retain(|planned| {
            if planned.id == id {
                draft.budget += planned.tokens;
            }
            planned.id != id
        });
    }

    fn build_step(&mut self, draft: Draft) -> Step {
        let mut batch = StepBatch::default();
        let mut entries = Vec::with_capacity(draft.planned.len());
        let mut planned = draft.planned;
        let prefills = |planned: &Planned| self.sequences.get(&planned.id).is_some_and(Sequence::prefills);
        planned.sort_by_key(prefills);
        batch.generating = planned.iter().filter(|planned| !prefills(planned)).count();
        for Planned { id, tokens, guesses } in planned {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            sequence.sampler.begin_step();
            let guesses = sequence.sampler.guesses()[..guesses].to_vec();
            let (first, last) = (sequence.computed, sequence.computed + tokens);
            let slice = SequenceSlice {
                first_token: batch.tokens.len(),
                tokens: tokens + guesses.len(),
                position: u32::try_from(first).unwrap_or(u32::MAX),
                blocks: sequence.blocks.clone(),
            };
            batch.tokens.extend_from_slice(&sequence.tokens[first..last]);
            batch.tokens.extend_from_slice(&guesses);
            batch.sequences.push(slice);
            let wanted = last == sequence.tokens.len() && !sequence.sampler.awaits_choice();
            let row = wanted.then_some(batch.output_rows.len());
            if wanted {
                let rows = batch.tokens.len() - 1 - guesses.len()..batch.tokens.len();
                batch.output_rows.extend(rows);
            }
            if sequence.prefills() {
                self.stats.tokens_prefilled += tokens as u64;
            }
            entries.push(Entry {
                id,
                tokens,
                row,
                guesses,
                draw: Draw::None,
            });
        }
        self.entries = Some(entries);
        Step {
            zero: draft.zero,
            batch,
        }
    }
}
