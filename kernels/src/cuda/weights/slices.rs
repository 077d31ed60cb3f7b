//! Stored blocks as slices of 32 codes with their scales, and the order of codes in a tile.

use galerne_core::dtype::DType;

use super::SLICE_COLUMNS;
use crate::quant::groups;

/// 32 columns of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slice {
    /// One per element, in order; 4-bit codes in the low half.
    pub(super) codes: [u8; SLICE_COLUMNS],
    /// What the format keeps per slice; what is longer is left out.
    pub(super) scales: [u8; 4],
    /// What the format keeps per row of a tile, the same in its 4 slices.
    pub(super) row_scales: [u8; 4],
}

/// The slices of a stored row of a block dtype.
pub(super) fn stored(dtype: DType, row: &[u8]) -> Box<dyn Iterator<Item = Slice> + '_> {
    let blocks = || row.chunks_exact(dtype.block_bytes());
    match dtype {
        DType::Q4_0 => Box::new(blocks().map(|block| halves(block, 2))),
        DType::Q4_1 => Box::new(blocks().map(|block| halves(block, 4))),
        DType::Q8_0 => Box::new(blocks().map(eights)),
        DType::Q5_0 | DType::Iq4Nl => {
            Box::new(groups::groups(dtype, row).map(|group| eights(&group.to_q8_0())))
        }
        _ => Box::new(groups::groups(dtype, row).map(move |group| grouped(dtype, &group))),
    }
}

/// A block of `head` bytes of f16 scales and then nibbles: the low ones of 16 bytes, then the high ones.
fn halves(block: &[u8], head: usize) -> Slice {
    let mut scales = [0; 4];
    scales[..head].copy_from_slice(&block[..head]);
    Slice {
        codes: std::array::from_fn(|i| block[head + i % 16] >> (i / 16 * 4) & 15),
        scales,
        row_scales: [0; 4],
    }
}

fn eights(block: &[u8]) -> Slice {
    Slice {
        codes: std::array::from_fn(|i| block[2 + i]),
        scales: [block[0], block[1], 0, 0],
        row_scales: [0; 4],
    }
}

fn grouped(dtype: DType, group: &groups::Group) -> Slice {
    let both = pair(group.d.to_le_bytes(), group.m.to_le_bytes());
    let integers = |a: i8, b: i8| [a.cast_unsigned(), b.cast_unsigned(), 0, 0];
    let (scales, row_scales) = match dtype {
        DType::Q5_1 => (both, [0; 4]),
        DType::Q6K => (integers(group.scales[0], group.scales[1]), both),
        _ => (integers(group.scales[0], group.minimum), both),
    };
    Slice {
        codes: group.codes.map(i8::cast_unsigned),
        scales,
        row_scales,
    }
}

/// Two 16-bit numbers one after the other.
pub(super) const fn pair(low: [u8; 2], high: [u8; 2]) -> [u8; 4] {
    [low[0], low[1], high[0], high[1]]
}

/// 4-bit codes as a tile has them: of 8 columns in a word, column `2 i` is nibble `i` and column `2 i + 1` nibble `i + 4`.
pub(super) fn nibbles(codes: &[u8; SLICE_COLUMNS]) -> [u8; 16] {
    std::array::from_fn(|byte| {
        let (word, byte) = (byte / 4, byte % 4);
        let column = |nibble: usize| 8 * word + nibble % 4 * 2 + nibble / 4;
        codes[column(2 * byte)] | codes[column(2 * byte + 1)] << 4
    })
}

/// 8-bit codes as a tile has them: a word's bytes are its columns 0, 2, 1, 3.
pub(super) fn bytes(codes: &[u8; SLICE_COLUMNS]) -> [u8; SLICE_COLUMNS] {
    std::array::from_fn(|byte| codes[byte / 4 * 4 + [0, 2, 1, 3][byte % 4]])
}
