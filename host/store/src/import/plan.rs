//! Which tensors a package gets, and where their bytes are now. Copies them; must not know what file format they are in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use galerne_core::weights::WeightInfo;

use super::{ImportError, io};
use crate::digest::CHUNK_BYTES;

/// Most bytes of one attention head's rows, which are reordered in memory.
const HEAD_BYTES_MAX: u64 = 256 << 20;

/// How the rows of a tensor come into their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As at the source.
    Kept,
    /// Within each of `heads` heads, rows `2i` and `2i + 1` (rope pairs side by side) become rows `i` and
    /// `i + width / 2` (rope pairs in halves).
    PairsToHalves {
        /// Heads in the tensor.
        heads: u64,
    },
}

/// One tensor to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedTensor {
    pub(super) info: WeightInfo,
    /// Which of the plan's files it is in.
    pub(super) file: usize,
    /// First byte, from the start of that file.
    pub(super) start: u64,
    pub(super) size_bytes: u64,
    pub(super) order: RowOrder,
}

/// All tensors to copy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct WeightPlan {
    pub(super) files: Vec<PathBuf>,
    pub(super) tensors: BTreeMap<String, PlannedTensor>,
}

impl WeightPlan {
    pub(super) fn size_bytes(&self) -> u64 {
        self.tensors
            .values()
            .fold(0, |total, tensor| total.saturating_add(tensor.size_bytes))
    }

    pub(super) fn infos(&self) -> BTreeMap<String, WeightInfo> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.info.clone()))
            .collect()
    }

    /// Opens the files to copy from.
    pub(super) fn open(&self) -> Result<Vec<File>, ImportError> {
        self.files
            .iter()
            .map(|path| File::open(path).map_err(io("open", path)))
            .collect()
    }
}

/// Gives `sink` the bytes of a tensor in their new order, in pieces.
pub(super) fn copy_tensor(
    name: &str,
    tensor: &PlannedTensor,
    mut file: &File,
    path: &Path,
    mut sink: impl FnMut(&[u8]) -> Result<(), ImportError>,
) -> Result<(), ImportError> {
    let piece_bytes = match tensor.order {
        RowOrder::Kept => CHUNK_BYTES as u64,
        RowOrder::PairsToHalves { heads } => head_bytes(name, tensor, heads)?,
    };
    file.seek(SeekFrom::Start(tensor.start))
        .map_err(io("read", path))?;
    let mut piece = vec![0; piece_bytes.min(tensor.size_bytes) as usize];
    let mut ordered = Vec::with_capacity(piece.len());
    let mut left = tensor.size_bytes;
    while left > 0 {
        let count = left.min(piece_bytes) as usize;
        file.read_exact(&mut piece[..count]).map_err(io("read", path))?;
        match tensor.order {
            RowOrder::Kept => sink(&piece[..count])?,
            RowOrder::PairsToHalves { .. } => {
                pairs_to_halves(&piece, row_bytes(tensor), &mut ordered);
                sink(&ordered)?;
            }
        }
        left -= count as u64;
    }
    Ok(())
}

/// Bytes of what one output feature has: a row of a matrix, an element of a bias.
fn row_bytes(tensor: &PlannedTensor) -> usize {
    let features = tensor.info.shape.first().copied().unwrap_or(1).max(1);
    (tensor.size_bytes / features) as usize
}

/// Bytes of one head's rows, if its rows can be reordered.
fn head_bytes(name: &str, tensor: &PlannedTensor, heads: u64) -> Result<u64, ImportError> {
    let rows = tensor.info.shape.first().copied().unwrap_or(0);
    let is_split = heads > 0 && rows > 0 && rows.is_multiple_of(heads.saturating_mul(2));
    let bytes = tensor.size_bytes / heads.max(1);
    if is_split && bytes <= HEAD_BYTES_MAX {
        return Ok(bytes);
    }
    Err(ImportError::Tensor {
        tensor: name.to_owned(),
        expected: format!("rows that {heads} heads split into pairs, at most {HEAD_BYTES_MAX} bytes each"),
        got: format!("{rows} rows of {} bytes", row_bytes(tensor)),
    })
}

fn pairs_to_halves(head: &[u8], row_bytes: usize, out: &mut Vec<u8>) {
    out.clear();
    for parity in 0..2 {
        for row in head.chunks_exact(row_bytes).skip(parity).step_by(2) {
            out.extend_from_slice(row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::pairs_to_halves;

    #[test]
    fn even_rows_come_first() {
        let mut out = Vec::new();
        pairs_to_halves(b"aAbBcCdD", 1, &mut out);
        assert_eq!(out, b"abcdABCD");
        pairs_to_halves(b"00112233", 2, &mut out);
        assert_eq!(out, b"00221133");
    }
}
