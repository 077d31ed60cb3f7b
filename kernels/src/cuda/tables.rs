//! What changes from step to step, in one region that is uploaded by one copy: tokens, positions, block tables. Kernels find it at
//! addresses that stay, so that a captured graph serves steps of changing content.

use crate::cuda::driver::DevicePtr;
use crate::device::{LoadOptions, StepBatch};

/// In the table of owners: a row that belongs to no sequence, there to fill a bucket.
pub const NO_SEQUENCE: u32 = u32::MAX;

/// Rows that a step computes: those of its batch, or of the bucket it is padded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepRows {
    /// Tokens.
    pub tokens: usize,
    /// Sequences.
    pub sequences: usize,
    /// Rows whose output is wanted.
    pub outputs: usize,
}

impl StepRows {
    /// Those of a batch.
    #[must_use]
    pub const fn of(batch: &StepBatch) -> Self {
        Self {
            tokens: batch.tokens.len(),
            sequences: batch.sequences.len(),
            outputs: batch.output_rows.len(),
        }
    }
}

/// Where each table begins, in bytes from the region's beginning. All elements are u32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableLayout {
    /// `[tokens]`: token ids; 0 in rows of padding.
    tokens: usize,
    /// `[tokens]`: positions in their sequences; 0 in rows of padding.
    positions: usize,
    /// `[tokens]`: index of the row's sequence, or [`NO_SEQUENCE`].
    owners: usize,
    /// `[outputs]`: rows whose output is wanted; 0 in rows of padding.
    output_rows: usize,
    /// `[sequences]`: the sequence's first row; 0 for sequences of padding.
    first_rows: usize,
    /// `[sequences]`: the sequence's rows; 0 for sequences of padding.
    row_counts: usize,
    /// `[sequences]`: requests to sample that draw the tokens, where the host does not know them yet.
    sources: usize,
    /// `[sequences, blocks_stride]`: block numbers by position; the last table, so that a copy can end where the batch does.
    blocks: usize,
    /// Most blocks of a sequence.
    pub blocks_stride: usize,
    /// Bytes of all.
    pub bytes: usize,
}

/// The tables on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableAddresses {
    /// `[tokens]`
    pub tokens: DevicePtr,
    /// `[tokens]`
    pub positions: DevicePtr,
    /// `[tokens]`
    pub owners: DevicePtr,
    /// `[outputs]`
    pub output_rows: DevicePtr,
    /// `[sequences]`
    pub first_rows: DevicePtr,
    /// `[sequences]`
    pub row_counts: DevicePtr,
    /// `[sequences]`
    pub sources: DevicePtr,
    /// `[sequences, blocks_stride]`
    pub blocks: DevicePtr,
    /// Most blocks of a sequence.
    pub blocks_stride: u32,
}

impl TableLayout {
    /// For steps within these limits, of sequences of at most `positions` tokens.
    #[must_use]
    pub fn new(options: LoadOptions, positions: usize) -> Self {
        let blocks_stride = positions
            .div_ceil(options.kv.block_tokens)
            .min(options.kv.blocks)
            .max(1);
        let mut bytes = 0;
        let mut table = |elements: usize| {
            let start = bytes;
            bytes += (elements * 4).next_multiple_of(16);
            start
        };
        let (tokens, sequences) = (options.step_tokens_max, options.sequences_max);
        Self {
            tokens: table(tokens),
            positions: table(tokens),
            owners: table(tokens),
            output_rows: table(tokens),
            first_rows: table(sequences),
            row_counts: table(sequences),
            sources: table(sequences),
            blocks: table(sequences * blocks_stride),
            blocks_stride,
            bytes,
        }
    }

    /// The tables of a region that begins here.
    #[must_use]
    pub const fn at(&self, region: DevicePtr) -> TableAddresses {
        TableAddresses {
            tokens: region.offset(self.tokens),
            positions: region.offset(self.positions),
            owners: region.offset(self.owners),
            output_rows: region.offset(self.output_rows),
            first_rows: region.offset(self.first_rows),
            row_counts: region.offset(self.row_counts),
            sources: region.offset(self.sources),
            blocks: region.offset(self.blocks),
            blocks_stride: self.blocks_stride as u32,
        }
    }

    /// Writes the tables of a batch that keeps its contract, padded to `rows`, whose tokens are `drawn` by these requests if
    /// there are any. Returns how many bytes the device needs of them.
    pub fn fill(&self, batch: &StepBatch, drawn: &[usize], rows: StepRows, bytes: &mut [u8]) -> usize {
        let words: &mut [u32] = bytemuck::cast_slice_mut(bytes);
        let mut table = |start: usize, elements: usize, values: &mut dyn Iterator<Item = u32>, rest: u32| {
            for word in &mut words[start / 4..][..elements] {
                *word = values.next().unwrap_or(rest);
            }
        };
        let slices = &batch.sequences;
        table(self.tokens, rows.tokens, &mut batch.tokens.iter().map(|t| t.0), 0);
        let mut positions = slices
            .iter()
            .flat_map(|slice| (0..slice.tokens as u32).map(|i| slice.position + i));
        table(self.positions, rows.tokens, &mut positions, 0);
        let mut owners = slices
            .iter()
            .enumerate()
            .flat_map(|(owner, slice)| std::iter::repeat_n(owner as u32, slice.tokens));
        table(self.owners, rows.tokens, &mut owners, NO_SEQUENCE);
        let mut output_rows = batch.output_rows.iter().map(|&row| row as u32);
        table(self.output_rows, rows.outputs, &mut output_rows, 0);
        let mut first_rows = slices.iter().map(|slice| slice.first_token as u32);
        table(self.first_rows, rows.sequences, &mut first_rows, 0);
        let mut row_counts = slices.iter().map(|slice| slice.tokens as u32);
        table(self.row_counts, rows.sequences, &mut row_counts, 0);
        let mut sources = drawn.iter().map(|&request| request as u32);
        table(self.sources, drawn.len(), &mut sources, 0);
        for (s, slice) in slices.iter().enumerate() {
            let mut blocks = slice.blocks.iter().map(|block| block.0);
            let start = self.blocks + s * self.blocks_stride * 4;
            let listed = slice.blocks.len().min(self.blocks_stride);
            table(start, listed, &mut blocks, 0);
        }
        self.blocks + slices.len() * self.blocks_stride * 4
    }
}

#[cfg(test)]
mod tests {
    use galerne_core::ids::{BlockId, TokenId};

    use super::*;
    use crate::device::{KvDtype, KvSpec, Precision, SequenceSlice};

    #[test]
    fn tables_hold_the_batch_and_harmless_padding() {
        let options = LoadOptions {
            precision: Precision::Auto,
            quantization: None,
            kv: KvSpec {
                blocks: 9,
                block_tokens: 4,
                dtype: KvDtype::Bf16,
            },
            step_tokens_max: 6,
            sequences_max: 3,
        };
        let layout = TableLayout::new(options, 12);
        assert_eq!(layout.blocks_stride, 3);
        let slice = |first_token, tokens, position, blocks: &[u32]| SequenceSlice {
            first_token,
            tokens,
            position,
            blocks: blocks.iter().copied().map(BlockId).collect(),
        };
        let batch = StepBatch {
            tokens: [7, 8, 9].map(TokenId).to_vec(),
            sequences: vec![slice(0, 2, 3, &[5, 2]), slice(2, 1, 0, &[4])],
            generating: 0,
            output_rows: vec![1, 2],
        };
        let rows = StepRows {
            tokens: 4,
            sequences: 3,
            outputs: 4,
        };
        let mut room = vec![0xEEEE_EEEEu32; layout.bytes / 4];
        let used = layout.fill(&batch, &[1, 0], rows, bytemuck::cast_slice_mut(&mut room));
        let at = layout.at(DevicePtr(1 << 20));
        let table = |at: DevicePtr, elements: usize| &room[(at.0 - (1 << 20)) as usize / 4..][..elements];
        assert_eq!(table(at.tokens, 4), [7, 8, 9, 0]);
        assert_eq!(table(at.positions, 4), [3, 4, 0, 0]);
        assert_eq!(table(at.owners, 4), [0, 0, 1, NO_SEQUENCE]);
        assert_eq!(table(at.output_rows, 4), [1, 2, 0, 0]);
        assert_eq!(table(at.first_rows, 3), [0, 2, 0]);
        assert_eq!(table(at.row_counts, 3), [2, 1, 0]);
        assert_eq!(table(at.sources, 2), [1, 0]);
        assert_eq!(table(at.blocks, 2), [5, 2]);
        assert_eq!(table(at.blocks.offset(12), 1), [4]);
        assert_eq!(used, (at.blocks.0 - (1 << 20)) as usize + 24);
    }
}
