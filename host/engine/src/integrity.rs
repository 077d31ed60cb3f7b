//! The self-check: every list compared with every other. Changes nothing.

use crate::engine::Engine;
use crate::stats::IntegrityError;

impl Engine {
    /// Compares every list with every other.
    ///
    /// # Errors
    /// The first broken invariant: a host bug.
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        let check = IntegrityError::check::<usize>;
        let mut holds = vec![0; self.pool.total()];
        for sequence in self.sequences.values() {
            let running = self.running.iter().filter(|id| **id == sequence.id).count();
            let waiting = self.waiting.iter().filter(|id| **id == sequence.id).count();
            check("lists a sequence is in", &1, &(running + waiting))?;
            if waiting == 1 {
                check("blocks of a waiting sequence", &0, &sequence.blocks.len())?;
            }
            check(
                "tokens computed beyond the last",
                &0,
                &sequence.computed.saturating_sub(sequence.tokens.len()),
            )?;
            let room = sequence.blocks.len() * self.admission.limits.block_tokens;
            check(
                "tokens computed beyond the blocks",
                &0,
                &sequence.computed.saturating_sub(room),
            )?;
            if sequence.pending() == 0 && !sequence.sampler.awaits_choice() && self.entries.is_none() {
                check("tokens to compute without a choice to wait for", &1, &0)?;
            }
            for block in &sequence.blocks {
                holds[block.index()] += 1;
            }
        }
        check(
            "sequences",
            &self.sequences.len(),
            &(self.running.len() + self.waiting.len()),
        )?;
        let overfull = self
            .running
            .len()
            .saturating_sub(self.admission.limits.sequences_max);
        check("running sequences beyond the limit", &0, &overfull)?;
        self.pool.check(&holds)?;
        self.index.check()?;
        let cached = self
            .index
            .blocks()
            .filter(|block| self.pool.is_free(*block))
            .count();
        check("free blocks in the prefix index", &self.pool.cached(), &cached)
    }
}
