//! The next step before this one's tokens are known, so that a device that can go from one to the other by itself is not kept
//! waiting. Knows nothing of devices.

use galerne_core::ids::{SequenceId, TokenId};
use galerne_kernels::device::{SequenceSlice, StepBatch};

use crate::engine::{Draw, Engine, Entry, Step};

/// A step whose tokens the one under way draws.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextStep {
    /// The step; its tokens say nothing.
    pub step: Step,
    /// By token, which of the requests of the step under way draws it.
    pub drawn: Vec<usize>,
}

impl Engine {
    /// Puts together the step behind the one under way: one more token of each of its sequences. Call when
    /// [`Engine::settle_plans`] is done; the step is under way as soon as [`Engine::complete`] has ended this one. A sequence
    /// that ends with this step has then computed one token for nothing.
    ///
    /// `None` if [`Engine::schedule`] might put another one together, or needs to know the tokens: sequences wait or sit out, a
    /// rule depends on this step's tokens, or blocks are short.
    pub fn schedule_next(&mut self) -> Option<NextStep> {
        let draws = self.draws_by_plan()?;
        // Who may have no more tokens than this step's is done with it.
        let more = |(_, id): &(usize, SequenceId)| self.sequences[id].output_left() > 1;
        let next: Vec<_> = draws.into_iter().enumerate().filter(more).collect();
        let lacking = next.iter().filter(|(_, id)| self.lacks_block(*id)).count();
        if next.is_empty() || lacking > self.pool.free() {
            return None;
        }
        let (mut batch, mut entries, mut zero) = (StepBatch::default(), vec![], vec![]);
        for (row, (_, id)) in next.iter().enumerate() {
            if self.lacks_block(*id) {
                self.take_block(&mut zero, *id);
            }
            let sequence = &self.sequences[id];
            batch.tokens.push(TokenId(0));
            batch.output_rows.push(row);
            batch.sequences.push(SequenceSlice {
                first_token: row,
                tokens: 1,
                position: u32::try_from(sequence.tokens.len()).unwrap_or(u32::MAX),
                blocks: sequence.blocks.clone(),
            });
            entries.push(Entry {
                id: *id,
                tokens: 1,
                row: Some(row),
                guesses: Vec::new(),
                draw: Draw::None,
            });
        }
        batch.generating = batch.sequences.len();
        self.next_entries = Some(entries);
        self.stats.steps_ahead += 1;
        Some(NextStep {
            step: Step { zero, batch },
            drawn: next.into_iter().map(|(request, _)| request).collect(),
        })
    }

    /// Whether a step has been put together and not completed.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.entries.is_some()
    }

    /// The sequences of the step under way in the order of its requests, if all that run are among them and each draws this
    /// token and the next by a plan that is in force.
    fn draws_by_plan(&self) -> Option<Vec<SequenceId>> {
        let entries = self.entries.as_ref()?;
        // Some may have ended while the step was on its way.
        let left = entries
            .iter()
            .filter(|entry| self.sequences.contains_key(&entry.id));
        let left: Vec<_> = left.collect();
        let draws = |entry: &&Entry| {
            let sequence = &self.sequences[&entry.id];
            let is_free = sequence.constraint().is_none() && sequence.sampler.draws_the_next_too();
            entry.row.is_some() && entry.guesses.is_empty() && is_free
        };
        let all = self.waiting.is_empty() && left.len() == self.running.len() && left.iter().all(draws);
        all.then(|| left.iter().map(|entry| entry.id).collect())
    }

    /// Whether the token that the step under way draws has no place yet.
    fn lacks_block(&self, id: SequenceId) -> bool {
        let sequence = &self.sequences[&id];
        sequence.blocks.len() * self.admission.limits.block_tokens <= sequence.tokens.len()
    }
}
