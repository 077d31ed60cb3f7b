//! Weights as the CPU kernels want them: 16 output rows interleaved, each element still in its stored form and
//! in about as many bytes (`IQ4_NL` in 34 instead of 18, as `Q8_0`). Knows nothing of programs' instructions.
//!
//! A *panel* holds 16 rows of a matrix, for each block of 32 columns one after the other:
//! - quantized: lines of 64 bytes in which lane `r` of 4 bytes belongs to row `r`, and before them 16 f16 scales and
//!   minima (`Q4_1`) or the 16 scales of this block and the next (others): a cache line. `Q4`: line `c` holds bytes `4 c .. 4 c + 4` of each row's block, so its low nibbles are
//!   columns `4 c ..` and its high nibbles columns `16 + 4 c ..`. `Q8_0`: line `c` holds columns `4 c .. 4 c + 4`,
//!   each plus 128.
//! - `Q4_K`, `Q5_K`, `Q6_K`, `Q5_0`, `Q5_1`: see `linear_grouped.rs`.
//! - `bf16`: for each two columns two elements of each of 16 rows, so that lane `r` of 4 bytes belongs to row `r` here too,
//!   which is what tiles multiply. The columns are padded with zeros to a multiple of 32.
//! - other plain ones: for each column 16 elements.
//!
//! One load then feeds 16 outputs, and activations are broadcast: the same for one row as for hundreds.

use galerne_core::dtype::DType;
use galerne_core::weights::{WeightSource, WeightView};
use half::{bf16, f16};

use super::linear_grouped::GroupLayout;
use super::memory::{Arena, LINE_BYTES, Piece};
use crate::device::DeviceError;
use crate::quant;
use crate::quant::groups::groups;
use crate::stored::fetch;

/// Rows in one panel, lanes in one vector.
pub(crate) const LANES: usize = 16;

/// One stored matrix in panels.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) panel_bytes: usize,
    memory: Piece,
}

impl Matrix {
    /// Packs a stored matrix. `view.bytes` must be as long as its shape says (checked by [`fetch`]).
    fn pack(
        view: &WeightView<'_>,
        rows: usize,
        width: usize,
        arena: &mut Arena,
    ) -> Result<Self, DeviceError> {
        let row_bytes = view.bytes.len() / rows.max(1);
        let dtype = match view.dtype {
            DType::Iq4Nl => DType::Q8_0,
            other => other,
        };
        let panel_bytes = match GroupLayout::of(dtype) {
            Some(layout) => layout.panel_bytes(width),
            None if dtype == DType::Bf16 => width.next_multiple_of(quant::BLOCK_ELEMENTS) * 2 * LANES,
            None => (dtype.row_bytes(width).unwrap_or(0) * LANES).next_multiple_of(LINE_BYTES),
        };
        let memory = arena.take("weights", panel_bytes * rows.div_ceil(LANES))?;
        let matrix = Self {
            dtype,
            rows,
            width,
            panel_bytes,
            memory,
        };
        // SAFETY: the memory was just made and is not shared; it has exactly this many bytes.
        let packed =
            unsafe { std::slice::from_raw_parts_mut(matrix.memory.ptr(), matrix.memory.size_bytes()) };
        for (r, row) in view.bytes.chunks_exact(row_bytes.max(1)).enumerate() {
            let panel = &mut packed[r / LANES * panel_bytes..][..panel_bytes];
            if let Some(layout) = GroupLayout::of(dtype) {
                layout.pack(groups(dtype, row), panel, r % LANES);
            } else if dtype == view.dtype {
                pack_row(dtype, row, panel, r % LANES);
            } else {
                let row: Vec<u8> = groups(view.dtype, row)
                    .flat_map(|group| group.to_q8_0())
                    .collect();
                pack_row(dtype, &row, panel, r % LANES);
            }
        }
        Ok(matrix)
    }

    /// Number of panels, the last of which may be padded with zero rows.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// First byte of a panel.
    pub(crate) fn panel(&self, index: usize) -> *const u8 {
        assert!(index < self.panels());
        // SAFETY: in range by the assertion.
        unsafe { self.memory.ptr().add(index * self.panel_bytes) }
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }

    /// Row `r` in f32.
    pub(crate) fn dequantize_row(&self, r: usize, out: &mut [f32]) {
        assert!(r < self.rows && out.len() == self.width);
        // SAFETY: the panel's bytes are in the matrix's memory, which is written only while it is packed.
        let panel = unsafe { std::slice::from_raw_parts(self.panel(r / LANES), self.panel_bytes) };
        let lane = r % LANES;
        if self.dtype.block_elements() == 1 {
            for (column, out) in out.iter_mut().enumerate() {
                *out = plain_element(self.dtype, &panel[plain_at(self.dtype, column, lane)..]);
            }
            return;
        }
        if let Some(layout) = GroupLayout::of(self.dtype) {
            for (g, out) in out.chunks_exact_mut(quant::BLOCK_ELEMENTS).enumerate() {
                layout.unpack(panel, g, lane).dequantize(out);
            }
            return;
        }
        let layout = PanelLayout::new(self.dtype);
        let mut stored = [0; 34];
        let stored = &mut stored[..self.dtype.block_bytes()];
        for (b, out) in out.chunks_exact_mut(quant::BLOCK_ELEMENTS).enumerate() {
            gather_block(self.dtype, layout, panel, b, lane, stored);
            quant::dequantize(self.dtype, stored, out);
        }
    }
}

/// Where a panel of a plain dtype has an element.
const fn plain_at(dtype: DType, column: usize, lane: usize) -> usize {
    let together = if matches!(dtype, DType::Bf16) { 2 } else { 1 };
    let line = column / together * LANES + lane;
    (line * together + column % together) * dtype.block_bytes()
}

fn plain_element(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    }
}

/// Bytes of f16 numbers at the start of a stored block.
pub(crate) const fn header_bytes(dtype: DType) -> usize {
    match dtype {
        DType::Q4_1 => 4,
        DType::Q4_0 | DType::Q8_0 => 2,
        _ => 0,
    }
}

/// What is added to a stored byte modulo 256.
const fn byte_offset(dtype: DType) -> u8 {
    match dtype {
        DType::Q8_0 => 128,
        _ => 0,
    }
}

/// Where a quantized panel keeps the numbers and the lines of its blocks: all in one stream, and every line at the start
/// of a cache line. Two headers of half a cache line lie before the lines of two blocks.
#[derive(Clone, Copy)]
struct PanelLayout {
    header: usize,
    lines: usize,
    /// Blocks whose headers lie together.
    together: usize,
}

impl PanelLayout {
    fn new(dtype: DType) -> Self {
        let header = header_bytes(dtype) * LANES;
        Self {
            header,
            lines: dtype.block_bytes() * LANES - header,
            together: LINE_BYTES / header,
        }
    }

    fn group_at(self, block: usize) -> usize {
        block / self.together * self.together * (self.header + self.lines)
    }

    fn header_at(self, block: usize) -> usize {
        self.group_at(block) + block % self.together * self.header
    }

    fn lines_at(self, block: usize) -> usize {
        self.group_at(block) + LINE_BYTES + block % self.together * self.lines
    }
}

fn pack_row(dtype: DType, row: &[u8], panel: &mut [u8], lane: usize) {
    let block_bytes = dtype.block_bytes();
    if dtype.block_elements() == 1 {
        for (column, element) in row.chunks_exact(block_bytes).enumerate() {
            panel[plain_at(dtype, column, lane)..][..block_bytes].copy_from_slice(element);
        }
        return;
    }
    let (layout, header, offset) = (PanelLayout::new(dtype), header_bytes(dtype), byte_offset(dtype));
    for (b, block) in row.chunks_exact(block_bytes).enumerate() {
        for h in (0..header).step_by(2) {
            panel[layout.header_at(b) + h * LANES + 2 * lane..][..2].copy_from_slice(&block[h..h + 2]);
        }
        let lines = panel[layout.lines_at(b)..].chunks_exact_mut(4 * LANES);
        for (quads, line) in block[header..].chunks_exact(4).zip(lines) {
            for (to, from) in line[4 * lane..].iter_mut().zip(quads) {
                *to = from.wrapping_add(offset);
            }
        }
    }
}

/// The inverse of `pack_row` for block `b`.
fn gather_block(dtype: DType, layout: PanelLayout, panel: &[u8], b: usize, lane: usize, block: &mut [u8]) {
    let (header, offset) = (header_bytes(dtype), byte_offset(dtype));
    for h in (0..header).step_by(2) {
        block[h..h + 2].copy_from_slice(&panel[layout.header_at(b) + h * LANES + 2 * lane..][..2]);
    }
    let lines = panel[layout.lines_at(b)..].chunks_exact(4 * LANES);
    for (quads, line) in block[header..].chunks_exact_mut(4).zip(lines) {
        for (to, from) in quads.iter_mut().zip(&line[4 * lane..]) {
            *to = from.wrapping_sub(offset);
        }
    }
}

/// Loads one matrix of width `width`.
pub(crate) fn load_matrix(
    source: &dyn WeightSource,
    name: &str,
    width: usize,
    arena: &mut Arena,
) -> Result<Matrix, DeviceError> {
    let (view, rows, inner) = fetch(source, name, width)?;
    if inner != width {
        return Err(DeviceError::Weight {
            name: name.to_owned(),
            expected: format!("inner width {width}"),
            got: format!("inner width {inner}"),
        });
    }
    Matrix::pack(&view, rows, inner, arena)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_row_comes_back_bit_for_bit() {
        for dtype in DType::ALL {
            let (rows, width) = (19, 512);
            let values: Vec<f32> = (0..rows * width)
                .map(|i| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0)
                .collect();
            let bytes = quant::quantize(dtype, &values);
            let view = WeightView {
                dtype,
                shape: &[rows as u64, width as u64],
                bytes: bytes.as_slice().into(),
            };
            let matrix = Matrix::pack(&view, rows, width, &mut Arena::default()).unwrap();
            let row_bytes = dtype.row_bytes(width).unwrap();
            for r in 0..rows {
                let (mut expected, mut got) = (vec![0.0; width], vec![0.0; width]);
                quant::dequantize(dtype, &bytes[r * row_bytes..][..row_bytes], &mut expected);
                matrix.dequantize_row(r, &mut got);
                assert_eq!(expected, got, "{dtype} row {r}");
            }
        }
    }
}
