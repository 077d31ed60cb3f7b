//! The gate every batch and every request to sample passes before a device acts on it. Knows no kernel.

use galerne_core::graph::{EmbeddingIndex, Rows};
use galerne_core::ids::BlockId;

use crate::device::{DeviceError, LoadOptions, SampleRequest, SequenceSlice, StepBatch};
use crate::program::{Instr, Program};

/// What batches of a loaded program must keep to.
#[derive(Debug)]
pub(crate) struct BatchGate {
    options: LoadOptions,
    /// Entries a token id must stay below, if tokens are looked up.
    vocabulary: Option<usize>,
    /// Most tokens of a sequence.
    positions: usize,
    has_layers: bool,
    output_rows: Rows,
    /// By block, the last step that writes it.
    writers: Vec<u64>,
    steps: u64,
}

type Checked = Result<(), DeviceError>;

fn batch_error(what: &'static str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Checked {
    Err(DeviceError::Batch {
        what,
        expected: expected.to_string(),
        got: got.to_string(),
    })
}

impl BatchGate {
    /// For a program that has passed its own gate.
    ///
    /// # Errors
    /// Options that leave no room.
    pub(crate) fn new(program: &Program, options: LoadOptions) -> Result<Self, DeviceError> {
        let numbers = [
            ("step_tokens_max", options.step_tokens_max),
            ("sequences_max", options.sequences_max),
            ("kv.block_tokens", options.kv.block_tokens),
            ("kv.blocks", options.kv.blocks),
        ];
        for (what, got) in numbers {
            if got == 0 {
                batch_error(what, "at least 1", got)?;
            }
        }
        let tables = program.instrs.iter().filter_map(|instr| match instr {
            Instr::Embedding { table, index, .. } => {
                Some((*index, program.weights[table.index()].rows as usize))
            }
            _ => None,
        });
        let (mut vocabulary, mut positions) = (None, program.context_tokens_max as usize);
        for (index, rows) in tables {
            match index {
                EmbeddingIndex::Tokens => vocabulary = Some(vocabulary.map_or(rows, |v: usize| v.min(rows))),
                EmbeddingIndex::Positions(offset) => {
                    positions = positions.min(rows.saturating_sub(offset as usize));
                }
                EmbeddingIndex::Constant(_) => {}
            }
        }
        Ok(Self {
            options,
            vocabulary,
            positions,
            has_layers: !program.layers.is_empty(),
            output_rows: program.buffers[program.output.buffer.index()].rows,
            writers: vec![0; options.kv.blocks],
            steps: 0,
        })
    }

    /// Most tokens of a sequence.
    pub(crate) fn positions(&self) -> usize {
        self.positions
    }

    /// Checked batches so far.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// Rows of the output after a step.
    pub(crate) fn outputs(&self, batch: &StepBatch) -> usize {
        match self.output_rows {
            Rows::Tokens => batch.tokens.len(),
            Rows::Outputs => batch.output_rows.len(),
            Rows::Sequences => batch.sequences.len(),
        }
    }

    /// Checks a whole batch.
    pub(crate) fn check(&mut self, batch: &StepBatch) -> Checked {
        let tokens = batch.tokens.len();
        if tokens == 0 || tokens > self.options.step_tokens_max {
            let expected = format!("1 to {}", self.options.step_tokens_max);
            return batch_error("tokens", expected, tokens);
        }
        if batch.sequences.len() > self.options.sequences_max {
            let expected = format!("at most {}", self.options.sequences_max);
            return batch_error("sequences", expected, batch.sequences.len());
        }
        if let Some(entries) = self.vocabulary
            && let Some(token) = batch.tokens.iter().find(|token| token.index() >= entries)
        {
            return batch_error("token", format!("below {entries}"), token);
        }
        if batch.generating > batch.sequences.len() {
            let expected = format!("at most {}", batch.sequences.len());
            return batch_error("generating", expected, batch.generating);
        }
        let mut next = 0;
        self.steps += 1;
        for slice in &batch.sequences {
            if slice.first_token != next || slice.tokens == 0 {
                let got = format!("{} from {}", slice.tokens, slice.first_token);
                return batch_error("slice", format!("at least one token from {next}"), got);
            }
            next = next.saturating_add(slice.tokens);
            self.check_slice(slice)?;
        }
        if next != tokens {
            return batch_error("slices", format!("{tokens} tokens in all"), next);
        }
        let ascending = batch.output_rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || batch.output_rows.last().is_some_and(|&row| row >= tokens) {
            let expected = format!("ascending rows below {tokens}");
            return batch_error("output_rows", expected, format!("{:?}", batch.output_rows));
        }
        Ok(())
    }

    fn check_slice(&mut self, slice: &SequenceSlice) -> Checked {
        let block_tokens = self.options.kv.block_tokens;
        let first = slice.position as usize;
        let Some(end) = first.checked_add(slice.tokens) else {
            return batch_error("position", "a sequence that ends", slice.position);
        };
        if end > self.positions {
            let expected = format!("sequences of at most {} tokens", self.positions);
            return batch_error("position", expected, end);
        }
        if !self.has_layers {
            return Ok(());
        }
        let blocks = end.div_ceil(block_tokens);
        if slice.blocks.len() < blocks {
            let expected = format!("at least {blocks} for {end} tokens");
            return batch_error("blocks", expected, slice.blocks.len());
        }
        self.check_blocks("blocks", &slice.blocks)?;
        for block in &slice.blocks[first / block_tokens..blocks] {
            // Two writers of one block would race, and one would read the other's tokens.
            if self.writers[block.index()] == self.steps {
                return batch_error("blocks", "one writer per block", format!("two of block {block}"));
            }
            self.writers[block.index()] = self.steps;
        }
        Ok(())
    }

    /// Checks blocks against the pool.
    pub(crate) fn check_blocks<'a>(
        &self,
        what: &'static str,
        blocks: impl IntoIterator<Item = &'a BlockId>,
    ) -> Checked {
        let limit = self.options.kv.blocks;
        match blocks.into_iter().find(|block| block.index() >= limit) {
            Some(block) => batch_error(what, format!("blocks below {limit}"), block),
            None => Ok(()),
        }
    }

    /// Checks pairs of blocks to copy.
    pub(crate) fn check_copies(&self, pairs: &[(BlockId, BlockId)]) -> Checked {
        self.check_blocks("copied blocks", pairs.iter().flat_map(|(from, to)| [from, to]))?;
        match pairs.iter().find(|(from, to)| from == to) {
            Some((block, _)) => {
                batch_error("copied blocks", "two different blocks", format!("{block} twice"))
            }
            None => Ok(()),
        }
    }
}

/// Checks requests to sample from `rows` rows of `width` logits.
pub(crate) fn check_requests(requests: &[SampleRequest<'_>], rows: usize, width: usize) -> Checked {
    if let Some(request) = requests.iter().find(|request| request.row >= rows) {
        return batch_error("sample row", format!("below {rows}"), request.row);
    }
    let mut masks = requests.iter().filter_map(|request| request.mask);
    match masks.find(|mask| !fits(mask, width)) {
        Some(mask) => {
            let expected = format!("{} words that allow a token", width.div_ceil(32));
            batch_error("sample mask", expected, format!("{} words", mask.len()))
        }
        None => Ok(()),
    }
}

/// Checks that each token of the next step, one of each sequence, is what one of these requests draws.
pub(crate) fn check_drawn(requests: &[SampleRequest<'_>], next: &StepBatch, drawn: &[usize]) -> Checked {
    let tokens = next.tokens.len();
    if drawn.len() != tokens || next.sequences.len() != tokens {
        let got = format!("{} of {} sequences", drawn.len(), next.sequences.len());
        return batch_error("drawn", format!("{tokens}, one of each sequence"), got);
    }
    let draws = |request: &usize| requests.get(*request).is_some_and(|r| r.plan.candidates == 0);
    match drawn.iter().find(|request| !draws(request)) {
        Some(request) => batch_error("drawn", "requests that draw a token", request),
        None => Ok(()),
    }
}

/// Whether the mask has a word for every 32 of `width` tokens and allows one of them.
fn fits(mask: &[u32], width: usize) -> bool {
    let (whole, rest) = (width / 32, width % 32);
    let allows_rest = || rest > 0 && mask[whole] & ((1 << rest) - 1) != 0;
    mask.len() == width.div_ceil(32) && (mask[..whole].iter().any(|&word| word != 0) || allows_rest())
}
