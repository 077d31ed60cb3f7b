//! How matrices lie in the device's memory, and the packing of stored rows into it. `kernels/cuda/weights.cuh` reads it.
//! Knows no driver: it fills bytes that somebody else copies.
//!
//! A matrix is one region, 256-byte aligned; what its bytes mean follows from format, rows and width. Rows are padded to
//! [`PANEL_ROWS`]; bytes that hold no element are zero.
//!
//! Plain formats are row-major, a row padded to 32 elements, so that other libraries can read them too.
//!
//! Code formats are tiles of 16 rows by 128 columns, a panel's tiles one after the other, so that a warp that walks along 16 rows
//! reads without gaps. A row's 32 columns in a tile are a slice, of one code per element. A tile holds
//! 1. codes: 4 bits: 16 bytes per slice, `[row][slice]`; 8 bits: the first 16 bytes of all slices, then the others;
//! 2. what a slice has of scales, `[row][slice]`, 0, 2 or 4 bytes;
//! 3. what 4 slices share of scales, `[row]`, 0 or 4 bytes.
//!
//! After the tiles of the formats that have it: one f32 factor per row. Within 8 columns codes are in the order in which a kernel takes
//! them apart: nibble `i` of a 32-bit word is column `2 i`, nibble `i + 4` column `2 i + 1`; the bytes of a word are columns 0, 2, 1, 3.

mod quantize;
mod slices;

use bytemuck::{Pod, Zeroable};
use galerne_core::dtype::DType;

use super::driver::DevicePtr;
use crate::device::Quantization;

/// Rows of a panel; a matrix has whole panels.
pub const PANEL_ROWS: u32 = 16;
/// Columns of a tile.
pub const TILE_COLUMNS: u32 = 128;
/// Columns whose codes lie together.
pub const SLICE_COLUMNS: usize = 32;
/// Rows of plain formats are padded to so many elements.
const PLAIN_COLUMNS: u32 = 32;

/// How elements are held. `q` is a code, `d`, `m`, `z` f16, `s`, `t` 8-bit integers, `f` the row's factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WeightFormat {
    /// As stored.
    F32 = 0,
    /// As stored.
    F16 = 1,
    /// As stored.
    Bf16 = 2,
    /// `d (q - 8)`, 4 bits; `d` per slice.
    Codes4 = 3,
    /// `d q + m`, 4 bits; `d`, `m` per slice.
    Codes4Min = 4,
    /// `d s q + m t`, 4 bits; `s`, `t` per slice, `d`, `m` per 4 slices.
    Codes4Super = 5,
    /// `d q`, 8 bits; `d` per slice.
    Codes8 = 6,
    /// `d q + m`, 5 bits in 8; `d`, `m` per slice.
    Codes8Min = 7,
    /// `d s q + m t`, 5 bits in 8; as `Codes4Super`.
    Codes8Super = 8,
    /// `d s q`, 8 bits; one `s` for each half of a slice, `d` per 4 slices.
    Codes8Pair = 9,
    /// `f q`, q an 8-bit float (e4m3).
    Fp8 = 10,
    /// `f s q`, q a 4-bit float (e2m1), `s` an 8-bit float (e4m3) for each half of a slice.
    Nvfp4 = 11,
    /// `d (q - z)`, 4 bits; `d`, `z` per 4 slices.
    Int4 = 12,
}

/// Bytes of a code format's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    /// 4 or 8.
    code_bits: usize,
    /// Of scales per slice.
    slice_bytes: usize,
    /// Of scales per row of a tile.
    row_bytes: usize,
    /// Whether each row of the matrix has an f32 factor.
    has_factors: bool,
}

impl Tile {
    const fn new(code_bits: usize, slice_bytes: usize, row_bytes: usize, has_factors: bool) -> Self {
        Self {
            code_bits,
            slice_bytes,
            row_bytes,
            has_factors,
        }
    }

    const fn codes_bytes(self) -> usize {
        PANEL_ROWS as usize * TILE_COLUMNS as usize * self.code_bits / 8
    }

    const fn slices_bytes(self) -> usize {
        PANEL_ROWS as usize * 4 * self.slice_bytes
    }

    const fn bytes(self) -> usize {
        self.codes_bytes() + self.slices_bytes() + PANEL_ROWS as usize * self.row_bytes
    }
}

impl WeightFormat {
    /// All formats.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Codes4,
        Self::Codes4Min,
        Self::Codes4Super,
        Self::Codes8,
        Self::Codes8Min,
        Self::Codes8Super,
        Self::Codes8Pair,
        Self::Fp8,
        Self::Nvfp4,
        Self::Int4,
    ];

    /// The format that holds a stored dtype exactly.
    #[must_use]
    pub const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::Bf16 => Self::Bf16,
            DType::Q4_0 => Self::Codes4,
            DType::Q4_1 => Self::Codes4Min,
            DType::Q4K => Self::Codes4Super,
            DType::Q8_0 | DType::Q5_0 | DType::Iq4Nl => Self::Codes8,
            DType::Q5_1 => Self::Codes8Min,
            DType::Q5K => Self::Codes8Super,
            DType::Q6K => Self::Codes8Pair,
        }
    }

    /// The format that a weight stored as `dtype` is loaded in: one of blocks stays what it is.
    #[must_use]
    pub const fn loaded(dtype: DType, quantization: Option<Quantization>) -> Self {
        match (dtype, quantization) {
            (DType::F32 | DType::F16 | DType::Bf16, Some(Quantization::Fp8 | Quantization::Fp8W8A8)) => {
                Self::Fp8
            }
            (DType::F32 | DType::F16 | DType::Bf16, Some(Quantization::Int4)) => Self::Int4,
            (DType::F32 | DType::F16 | DType::Bf16, Some(Quantization::Nvfp4)) => Self::Nvfp4,
            _ => Self::of(dtype),
        }
    }

    /// Bytes of one element in a plain format.
    #[must_use]
    pub const fn plain_bytes(self) -> Option<usize> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            _ => None,
        }
    }

    const fn tile(self) -> Option<Tile> {
        Some(match self {
            Self::F32 | Self::F16 | Self::Bf16 => return None,
            Self::Codes4 => Tile::new(4, 2, 0, false),
            Self::Codes4Min => Tile::new(4, 4, 0, false),
            Self::Codes4Super => Tile::new(4, 2, 4, false),
            Self::Codes8 => Tile::new(8, 2, 0, false),
            Self::Codes8Min => Tile::new(8, 4, 0, false),
            Self::Codes8Super | Self::Codes8Pair => Tile::new(8, 2, 4, false),
            Self::Fp8 => Tile::new(8, 0, 0, true),
            Self::Nvfp4 => Tile::new(4, 2, 0, true),
            Self::Int4 => Tile::new(4, 0, 4, false),
        })
    }

    /// Elements from one row to the next, of a plain format what other libraries call the leading dimension.
    #[must_use]
    pub const fn padded_width(self, width: u32) -> u32 {
        match self.tile() {
            None => width.next_multiple_of(PLAIN_COLUMNS),
            Some(_) => width.next_multiple_of(TILE_COLUMNS),
        }
    }

    /// Bytes of a matrix.
    #[must_use]
    pub const fn bytes(self, rows: u32, width: u32) -> usize {
        let rows = rows.next_multiple_of(PANEL_ROWS) as usize;
        let columns = self.padded_width(width) as usize;
        match (self.tile(), self.plain_bytes()) {
            (Some(tile), _) => {
                let tiles = rows / PANEL_ROWS as usize * (columns / TILE_COLUMNS as usize);
                let factors = if tile.has_factors { rows * 4 } else { 0 };
                tiles * tile.bytes() + factors
            }
            (None, Some(bytes)) => rows * columns * bytes,
            (None, None) => 0,
        }
    }
}

/// A matrix on the device, `[rows, width]`: what launchers take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMatrix {
    /// How its elements are held.
    pub format: WeightFormat,
    /// The region, aligned to 256 bytes.
    pub at: DevicePtr,
    /// Outputs of a linear map, entries of a table.
    pub rows: u32,
    /// Elements per row.
    pub width: u32,
}

impl DeviceMatrix {
    /// Where its rows' factors lie, of a format that has them.
    #[must_use]
    pub const fn factors(&self) -> DevicePtr {
        let factors = self.rows.next_multiple_of(PANEL_ROWS) as usize * 4;
        self.at.offset(self.format.bytes(self.rows, self.width) - factors)
    }
}

/// A matrix as kernels take it: `Matrix` in `weights.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct MatrixParams {
    at: DevicePtr,
    rows: u32,
    width: u32,
    format: u32,
    unused: u32,
}

impl From<DeviceMatrix> for MatrixParams {
    fn from(matrix: DeviceMatrix) -> Self {
        Self {
            at: matrix.at,
            rows: matrix.rows,
            width: matrix.width,
            format: matrix.format as u32,
            unused: 0,
        }
    }
}

/// From stored rows to a matrix's bytes. Rows of several tensors of one dtype can be joined to one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    format: WeightFormat,
    rows: u32,
    width: u32,
}

impl Packing {
    /// For a matrix that holds `dtype` exactly.
    #[must_use]
    pub const fn new(dtype: DType, rows: u32, width: u32) -> Self {
        Self::with_format(WeightFormat::of(dtype), rows, width)
    }

    /// For a matrix of a format.
    #[must_use]
    pub const fn with_format(format: WeightFormat, rows: u32, width: u32) -> Self {
        Self { format, rows, width }
    }

    /// How the matrix holds its elements.
    #[must_use]
    pub const fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes of the matrix.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.format.bytes(self.rows, self.width)
    }

    /// The matrix whose bytes were copied to `at`.
    #[must_use]
    pub const fn matrix(&self, at: DevicePtr) -> DeviceMatrix {
        DeviceMatrix {
            format: self.format,
            at,
            rows: self.rows,
            width: self.width,
        }
    }

    /// Puts one row, stored as `dtype`, into `out`, the matrix's bytes, which were zero. The row must be `dtype.row_bytes(width)`
    /// long and below `rows`, and `dtype` one that the format holds exactly.
    ///
    /// # Panics
    /// If they are not: a host bug.
    pub fn pack_row(&self, row: u32, dtype: DType, stored: &[u8], out: &mut [u8]) {
        assert_eq!(
            WeightFormat::of(dtype),
            self.format,
            "pack a row of {dtype}: the matrix holds {:?}",
            self.format
        );
        assert_eq!(dtype.row_bytes(self.width as usize), Some(stored.len()));
        if self.format.plain_bytes().is_some() {
            self.put_plain(row, stored, out);
            return;
        }
        for (index, slice) in slices::stored(dtype, stored).enumerate() {
            self.put_slice(row, index, &slice, out);
        }
    }

    /// Puts one row, stored as `dtype`, into `out`: as it is if the format holds it exactly, else rounded.
    ///
    /// # Panics
    /// As [`Packing::pack_row`] and [`Packing::quantize_row`].
    pub fn load_row(&self, row: u32, dtype: DType, stored: &[u8], out: &mut [u8]) {
        if WeightFormat::of(dtype) == self.format {
            self.pack_row(row, dtype, stored, out);
        } else {
            let mut values = vec![0.0; self.width as usize];
            crate::quant::dequantize(dtype, stored, &mut values);
            self.quantize_row(row, &values, out);
        }
    }

    /// Puts one row of `width` numbers into `out`, the matrix's bytes, which were zero: nearest for plain formats; for
    /// [`WeightFormat::Fp8`], [`WeightFormat::Nvfp4`] and [`WeightFormat::Int4`] with scales from the largest numbers.
    ///
    /// # Panics
    /// For other formats, and if the length is not `width`: a host bug.
    pub fn quantize_row(&self, row: u32, values: &[f32], out: &mut [u8]) {
        assert_eq!(values.len(), self.width as usize);
        let dtype = match self.format {
            WeightFormat::F32 => DType::F32,
            WeightFormat::F16 => DType::F16,
            WeightFormat::Bf16 => DType::Bf16,
            _ => {
                let (factor, slices) = quantize::row(self.format, values);
                for (index, slice) in slices.iter().enumerate() {
                    self.put_slice(row, index, slice, out);
                }
                self.put_factor(row, factor, out);
                return;
            }
        };
        self.put_plain(row, &crate::quant::quantize(dtype, values), out);
    }

    /// What [`Packing::quantize_row`] makes of a row, in f32.
    ///
    /// # Panics
    /// For formats other than [`WeightFormat::Fp8`], [`WeightFormat::Nvfp4`] and [`WeightFormat::Int4`].
    #[must_use]
    pub fn rounded_row(&self, values: &[f32]) -> Vec<f32> {
        let (factor, slices) = quantize::row(self.format, values);
        quantize::numbers(self.format, factor, &slices, values.len())
    }

    fn put_plain(&self, row: u32, stored: &[u8], out: &mut [u8]) {
        let row_bytes = self.bytes() / self.rows.next_multiple_of(PANEL_ROWS) as usize;
        out[row as usize * row_bytes..][..stored.len()].copy_from_slice(stored);
    }

    fn put_factor(&self, row: u32, factor: f32, out: &mut [u8]) {
        if self.format.tile().is_some_and(|tile| tile.has_factors) {
            let factors = self.rows.next_multiple_of(PANEL_ROWS) as usize * 4;
            let at = self.bytes() - factors + row as usize * 4;
            out[at..at + 4].copy_from_slice(&factor.to_le_bytes());
        }
    }

    fn put_slice(&self, row: u32, index: usize, slice: &slices::Slice, out: &mut [u8]) {
        let Some(tile) = self.format.tile() else { return };
        assert!(row < self.rows);
        let (panel, row) = ((row / PANEL_ROWS) as usize, (row % PANEL_ROWS) as usize);
        let tiles = (self.format.padded_width(self.width) / TILE_COLUMNS) as usize;
        let out = &mut out[(panel * tiles + index / 4) * tile.bytes()..][..tile.bytes()];
        let in_tile = row * 4 + index % 4;
        let (codes, scales) = out.split_at_mut(tile.codes_bytes());
        if tile.code_bits == 4 {
            codes[in_tile * 16..][..16].copy_from_slice(&slices::nibbles(&slice.codes));
        } else {
            let bytes = slices::bytes(&slice.codes);
            codes[in_tile * 16..][..16].copy_from_slice(&bytes[..16]);
            codes[1_024 + in_tile * 16..][..16].copy_from_slice(&bytes[16..]);
        }
        let (of_slices, of_rows) = scales.split_at_mut(tile.slices_bytes());
        of_slices[in_tile * tile.slice_bytes..][..tile.slice_bytes]
            .copy_from_slice(&slice.scales[..tile.slice_bytes]);
        of_rows[row * tile.row_bytes..][..tile.row_bytes]
            .copy_from_slice(&slice.row_scales[..tile.row_bytes]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_takes_the_bytes_its_tiles_say() {
        // 17 rows are two panels, 130 columns two tiles or 160 plain elements.
        let bytes = WeightFormat::ALL.map(|format| format.bytes(17, 130));
        let tiles = [
            1_152, 1_280, 1_216, 2_176, 2_304, 2_240, 2_240, 2_048, 1_152, 1_088,
        ];
        assert_eq!(bytes[..3], [32 * 160 * 4, 32 * 160 * 2, 32 * 160 * 2]);
        for ((format, got), tile) in WeightFormat::ALL.into_iter().zip(bytes).skip(3).zip(tiles) {
            let factors = match format {
                WeightFormat::Fp8 | WeightFormat::Nvfp4 => 32 * 4,
                _ => 0,
            };
            assert_eq!(got, 4 * tile + factors, "{format:?}");
            assert!(got.is_multiple_of(16), "{format:?}");
        }
    }

    #[test]
    fn rows_of_several_dtypes_with_one_format_are_joined() {
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 20.0) / 4.0).collect();
        let packing = Packing::new(DType::Q8_0, 2, 64);
        let mut out = vec![0; packing.bytes()];
        for (row, dtype) in [DType::Q8_0, DType::Q5_0].into_iter().enumerate() {
            packing.pack_row(
                row as u32,
                dtype,
                &crate::quant::quantize(dtype, &values),
                &mut out,
            );
        }
        // Row 1, slice 1: bytes 0 and 2 of its first word are columns 32 and 33.
        let code = |at: usize| f32::from(out[at].cast_signed());
        let d = half::f16::from_le_bytes([out[2_048 + 5 * 2], out[2_048 + 5 * 2 + 1]]).to_f32();
        assert!((d * code(5 * 16) - values[32]).abs() <= d.abs() / 2.0);
        assert!((d * code(5 * 16 + 2) - values[33]).abs() <= d.abs() / 2.0);
    }

    #[test]
    #[should_panic(expected = "pack a row of q4_0")]
    fn a_row_of_another_format_is_a_bug() {
        let packing = Packing::new(DType::Q4_1, 1, 32);
        packing.pack_row(0, DType::Q4_0, &[0; 18], &mut vec![0; packing.bytes()]);
    }
}
