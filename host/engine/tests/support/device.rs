//! A device whose logits are a hash of the sequence's tokens as read back from its own KV blocks: a wrong
//! block, position or missing entry gives other tokens. Checks the contract of every batch.

use std::collections::HashMap;

use galerne_core::ids::{BlockId, TokenId};
use galerne_core::limits::EngineLimits;
use galerne_core::sampling::{Candidate, SamplingPlan, TokenLogprobs};
use galerne_kernels::device::{
    DeviceError, LoadedProgram, MemoryUse, SampleOutcome, SampleRequest, SequenceSlice, StepBatch,
};

pub const VOCABULARY: u32 = 23;

pub struct FakeProgram {
    limits: EngineLimits,
    kv: Vec<Vec<Option<(u32, TokenId)>>>,
    rows: Vec<u64>,
    /// How many tokens of a sequence its logits depend on, from the last one back: with few its output repeats itself soon.
    pub memory: usize,
    /// Steps until the device fails.
    pub steps_left: usize,
    is_running: bool,
}

impl FakeProgram {
    pub fn new(limits: EngineLimits) -> Self {
        let kv = vec![vec![None; limits.block_tokens]; limits.blocks];
        Self {
            limits,
            kv,
            rows: Vec::new(),
            memory: usize::MAX,
            steps_left: usize::MAX,
            is_running: false,
        }
    }

    fn check(&self, batch: &StepBatch) {
        assert!(
            !batch.tokens.is_empty() && batch.tokens.len() <= self.limits.step_tokens_max,
            "{batch:?}"
        );
        assert!(batch.sequences.len() <= self.limits.sequences_max, "{batch:?}");
        assert!(batch.output_rows.is_sorted_by(|a, b| a < b), "{batch:?}");
        let mut next = 0;
        let mut writers: HashMap<BlockId, usize> = HashMap::new();
        for (index, slice) in batch.sequences.iter().enumerate() {
            assert!(slice.first_token == next && slice.tokens > 0, "{batch:?}");
            next += slice.tokens;
            let (first, end) = (slice.position as usize, slice.position as usize + slice.tokens);
            assert!(slice.blocks.len() * self.limits.block_tokens >= end, "{batch:?}");
            for block in first / self.limits.block_tokens..=(end - 1) / self.limits.block_tokens {
                let before = writers.insert(slice.blocks[block], index);
                assert_eq!(before, None, "two sequences write to one block: {batch:?}");
            }
        }
        assert_eq!(next, batch.tokens.len(), "{batch:?}");
        for (index, slice) in batch.sequences.iter().enumerate() {
            for block in &slice.blocks {
                let writer = writers.get(block).copied().unwrap_or(index);
                assert_eq!(
                    writer, index,
                    "a sequence reads a block another one writes: {batch:?}"
                );
            }
        }
    }

    fn hash(&self, slice: &SequenceSlice, last: usize) -> u64 {
        ((last + 1).saturating_sub(self.memory)..=last).fold(0xcbf2_9ce4_8422_2325, |hash: u64, position| {
            let block = slice.blocks[position / self.limits.block_tokens].index();
            let entry = self.kv[block][position % self.limits.block_tokens];
            let word = match entry {
                Some((at, token)) if at as usize == position => u64::from(token.0),
                Some((at, token)) => u64::from(at) << 32 | u64::from(token.0) | 1 << 63,
                None => u64::MAX,
            };
            mix(hash ^ word)
        })
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ (value >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Log-probabilities after the plan's bias, penalties and temperature, most likely first.
fn ranked(row: u64, request: &SampleRequest<'_>) -> Vec<Candidate> {
    let plan: &SamplingPlan = request.plan;
    let logit = |token: u32| {
        let mut logit = (mix(row ^ u64::from(token)) >> 40) as f32 / (1 << 24) as f32 * 6.0;
        logit += plan
            .bias
            .iter()
            .filter(|(t, _)| t.0 == token)
            .map(|(_, bias)| bias)
            .sum::<f32>();
        if let Some(count) = request.seen.iter().find(|count| count.token.0 == token) {
            logit /= plan.repetition_penalty;
            logit -= count.output as f32 * plan.frequency_penalty;
            logit -= f32::from(u8::from(count.output > 0)) * plan.presence_penalty;
        }
        if plan.temperature > 0.0 {
            logit / plan.temperature
        } else {
            logit
        }
    };
    let logits: Vec<f32> = (0..VOCABULARY).map(logit).collect();
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let total = logits.iter().map(|l| (l - max).exp()).sum::<f32>().ln() + max;
    let mut all: Vec<_> = (0..VOCABULARY)
        .map(|t| Candidate {
            token: TokenId(t),
            logprob: logits[t as usize] - total,
        })
        .collect();
    if let Some(mask) = request.mask {
        all.retain(|c| mask[c.token.index() / 32] >> (c.token.0 % 32) & 1 == 1);
    }
    all.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
    all
}

impl LoadedProgram for FakeProgram {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.check(batch);
        self.is_running = true;
        for slice in &batch.sequences {
            let tokens = &batch.tokens[slice.first_token..slice.first_token + slice.tokens];
            for (offset, token) in tokens.iter().enumerate() {
                let position = slice.position as usize + offset;
                let block = slice.blocks[position / self.limits.block_tokens].index();
                self.kv[block][position % self.limits.block_tokens] =
                    Some((u32::try_from(position).expect("positions are small"), *token));
            }
        }
        self.rows.clear();
        for row in &batch.output_rows {
            let slice = batch
                .sequences
                .iter()
                .find(|s| (s.first_token..s.first_token + s.tokens).contains(row))
                .expect("every output row belongs to a sequence");
            let last = slice.position as usize + row - slice.first_token;
            self.rows.push(self.hash(slice, last));
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.is_running) {
            self.steps_left = self.steps_left.saturating_sub(1);
        }
        if self.steps_left == 0 {
            return Err(DeviceError::Failed {
                device: "fake",
                reason: "as planned".to_owned(),
            });
        }
        Ok(())
    }

    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
        self.wait()?;
        let draw = |request: &SampleRequest<'_>| {
            let ranked = ranked(self.rows[request.row], request);
            if request.plan.candidates > 0 {
                let shown = ranked
                    .into_iter()
                    .take(request.plan.candidates as usize)
                    .collect();
                return SampleOutcome::Candidates(shown);
            }
            let mut left = if request.plan.temperature > 0.0 {
                request.uniform
            } else {
                0.0
            };
            let drawn = ranked.iter().find(|candidate| {
                left -= candidate.logprob.exp();
                left < 0.0
            });
            let drawn = *drawn.unwrap_or(&ranked[ranked.len() - 1]);
            let logprobs = request.logprobs.map(|top| TokenLogprobs {
                logprob: drawn.logprob,
                top: ranked.iter().take(top as usize).copied().collect(),
            });
            SampleOutcome::Token {
                token: drawn.token,
                logprobs,
            }
        };
        Ok(requests.iter().map(draw).collect())
    }

    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
        Err(DeviceError::Unsupported {
            device: "fake",
            op: "read_output".to_owned(),
        })
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
        for (from, to) in pairs {
            self.kv[to.index()] = self.kv[from.index()].clone();
        }
        Ok(())
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        for block in blocks {
            self.kv[block.index()].fill(None);
        }
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }
}
