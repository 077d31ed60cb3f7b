//! What plans propose: which guesses a step computes, what became of them, and asking for plans before the step. Knows
//! nothing of how a token is drawn.

use std::time::Instant;

use galerne_core::ids::SequenceId;

use crate::engine::Engine;
use crate::scheduler::{Draft, Planned};

impl Engine {
    /// Adds guesses to the sequences of a draft, oldest first, while tokens and free blocks last.
    pub(crate) fn plan_guesses(&mut self, draft: &mut Draft) {
        for place in 0..draft.planned.len() {
            let guesses = self.room_for_guesses(draft, place);
            draft.budget -= guesses;
            draft.planned[place].guesses = guesses;
        }
    }

    /// How many guesses are behind a planned sequence's last token; takes the blocks they need.
    fn room_for_guesses(&mut self, draft: &mut Draft, place: usize) -> usize {
        let Planned { id, tokens, .. } = draft.planned[place];
        let wanted = self.guesses_wanted(id, tokens).min(draft.budget);
        loop {
            let sequence = &self.sequences[&id];
            let room = sequence.blocks.len() * self.admission.limits.block_tokens;
            let free = room - (sequence.computed + tokens);
            if free >= wanted || !self.take_block(&mut draft.zero, id) {
                return wanted.min(free);
            }
        }
    }

    fn guesses_wanted(&self, id: SequenceId, tokens: usize) -> usize {
        let sequence = &self.sequences[&id];
        // A guess would need the grammar's mask behind it, which is found only once the token is known.
        if tokens < sequence.pending() || sequence.constraint().is_some() {
            return 0;
        }
        let max = self.admission.limits.guesses_max.min(sequence.guesses_max);
        // Behind the guesses one more token is drawn; it must be wanted too, and never needs a place.
        let left = sequence.output_left().saturating_sub(1);
        sequence.sampler.guesses().len().min(max).min(left)
    }

    /// Asks the guests that propose and have no plan in force for the next step's.
    pub(crate) fn ask_ahead(&mut self) {
        for id in &self.running {
            if let Some(sequence) = self.sequences.get_mut(id)
                && !sequence.is_constrained()
            {
                let position = u32::try_from(sequence.output_tokens()).unwrap_or(u32::MAX);
                if sequence.sampler.ask_ahead(position) {
                    self.ahead.push(*id);
                }
            }
        }
    }

    /// Takes the plans that have come ahead of the next step. How many are still missing; they may come while it runs.
    pub fn settle_ahead(&mut self, now: Instant) -> usize {
        let mut ahead = std::mem::take(&mut self.ahead);
        ahead.retain(|id| self.poll(now, *id));
        let missing = ahead.len();
        self.ahead = ahead;
        missing
    }

    /// Counts guesses that were computed.
    pub(crate) fn note_proposed(&mut self, id: SequenceId, guesses: usize) {
        if let Some(sequence) = self.sequences.get_mut(&id)
            && guesses > 0
        {
            self.stats.tokens_proposed += guesses as u64;
            sequence.usage.proposed_tokens += u32::try_from(guesses).unwrap_or(u32::MAX);
            // Whoever guesses badly takes little of the others' time, whoever guesses well soon gets all it wants.
            sequence.guesses_max = 1;
        }
    }

    /// Counts a guess that was drawn.
    pub(crate) fn note_accepted(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.stats.tokens_accepted += 1;
            sequence.usage.accepted_tokens += 1;
            sequence.guesses_max += 2;
        }
    }
}
