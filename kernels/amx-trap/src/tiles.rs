//! One thread's tiles and what instructions do to them: the manual's pseudo-code, without registers and addresses.

/// Rows a tile can have.
pub const ROWS: usize = 16;
/// Bytes a tile's row can have.
pub const ROW_BYTES: usize = 64;
/// Tiles of palette 1.
const TILES: usize = 8;
/// Bytes of a configuration in memory.
pub(crate) const CONFIG_BYTES: usize = 64;

/// What hardware would refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A configuration that is none.
    #[error("ldtilecfg: byte {at}: expected {expected}, got {got}")]
    Config {
        /// Offset in the configuration.
        at: usize,
        /// What may stand there.
        expected: &'static str,
        /// What stands there.
        got: u16,
    },
    /// Tiles are used before they are configured, or after their release.
    #[error("tile {tile}: expected a configured tile; is ldtilecfg missing on this thread?")]
    NotConfigured {
        /// The tile.
        tile: usize,
    },
    /// The operands of a product are not three tiles.
    #[error("product: expected three different tiles, got {tiles:?}")]
    SameTile {
        /// Destination and both sources.
        tiles: [usize; 3],
    },
    /// The shapes of a product's tiles do not belong together.
    #[error(
        "product: expected tiles of [m, 4 n], [m, 4 k] and [k, 4 n] rows and bytes, got {shapes:?} in tiles {tiles:?}"
    )]
    Shapes {
        /// Destination and both sources.
        tiles: [usize; 3],
        /// Their rows and bytes.
        shapes: [(usize, usize); 3],
    },
}

/// A configured tile's rows and bytes in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    rows: usize,
    bytes: usize,
}

type Tile = [[u8; ROW_BYTES]; ROWS];

/// How a byte is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// From -128 to 127.
    Signed,
    /// From 0 to 255.
    Unsigned,
}

/// One thread's tiles.
#[derive(Debug, Clone)]
pub struct Tiles {
    shapes: [Shape; TILES],
    tiles: [Tile; TILES],
}

impl Default for Tiles {
    fn default() -> Self {
        Self::new()
    }
}

impl Tiles {
    /// Not configured.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            shapes: [Shape { rows: 0, bytes: 0 }; TILES],
            tiles: [[[0; ROW_BYTES]; ROWS]; TILES],
        }
    }

    /// `ldtilecfg`: palette in byte 0, 0 in bytes 1 (no restart) to 15, 16 times two bytes of bytes per row, 16 bytes of
    /// rows. All tiles become zero.
    ///
    /// # Errors
    /// The first byte that palette 1 does not allow.
    pub fn configure(&mut self, config: &[u8; CONFIG_BYTES]) -> Result<(), Fault> {
        let fault = |at, expected, got| Err(Fault::Config { at, expected, got });
        if config[0] != 1 {
            return fault(0, "palette 1", config[0].into());
        }
        if let Some(at) = (1..16).find(|&at| config[at] != 0) {
            return fault(at, "0", config[at].into());
        }
        let mut new = Self::new();
        for tile in 0..16 {
            let (at_bytes, at_rows) = (16 + 2 * tile, 48 + tile);
            let bytes = u16::from_le_bytes([config[at_bytes], config[at_bytes + 1]]);
            let rows = config[at_rows];
            if tile >= TILES && (bytes, rows) != (0, 0) {
                return fault(at_bytes, "0, since palette 1 has 8 tiles", bytes.max(rows.into()));
            }
            if usize::from(bytes) > ROW_BYTES {
                return fault(at_bytes, "at most 64 bytes in a row", bytes);
            }
            if usize::from(rows) > ROWS {
                return fault(at_rows, "at most 16 rows", rows.into());
            }
            if (bytes == 0) != (rows == 0) {
                return fault(at_rows, "rows and bytes or neither", rows.into());
            }
            if tile < TILES {
                new.shapes[tile] = Shape {
                    rows: rows.into(),
                    bytes: bytes.into(),
                };
            }
        }
        *self = new;
        Ok(())
    }

    /// `tilerelease`.
    pub fn release(&mut self) {
        *self = Self::new();
    }

    /// `tilezero`.
    ///
    /// # Errors
    /// The tile is not configured.
    pub fn zero(&mut self, tile: usize) -> Result<(), Fault> {
        self.shape(tile)?;
        self.tiles[tile] = [[0; ROW_BYTES]; ROWS];
        Ok(())
    }

    /// `tileloadd` and `tileloaddt1` from the rows that `row` finds.
    ///
    /// # Errors
    /// The tile is not configured.
    ///
    /// # Safety
    /// `row` points to as many bytes as the tile's rows have, for each of its rows.
    pub unsafe fn load(&mut self, tile: usize, row: impl Fn(usize) -> *const u8) -> Result<(), Fault> {
        let shape = self.shape(tile)?;
        self.zero(tile)?;
        for (r, to) in self.tiles[tile].iter_mut().enumerate().take(shape.rows) {
            // SAFETY: by contract; a row has at most as many bytes as fit.
            unsafe { std::ptr::copy_nonoverlapping(row(r), to.as_mut_ptr(), shape.bytes) };
        }
        Ok(())
    }

    /// `tilestored` to the rows that `row` finds.
    ///
    /// # Errors
    /// The tile is not configured.
    ///
    /// # Safety
    /// `row` points to as many bytes as the tile's rows have, for each of its rows, for this thread to write.
    pub unsafe fn store(&self, tile: usize, row: impl Fn(usize) -> *mut u8) -> Result<(), Fault> {
        let shape = self.shape(tile)?;
        for (r, from) in self.tiles[tile].iter().enumerate().take(shape.rows) {
            // SAFETY: by contract.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), row(r), shape.bytes) };
        }
        Ok(())
    }

    /// `tdpbssd`, `tdpbsud`, `tdpbusd` or `tdpbuud`: adds to each i32 of tile `to` the dot products of four bytes, without
    /// saturation.
    ///
    /// # Errors
    /// The tiles do not belong together.
    pub fn dot_bytes(&mut self, to: usize, [a, b]: [usize; 2], signs: [Sign; 2]) -> Result<(), Fault> {
        let (m, n, k) = self.product(to, a, b)?;
        let (a, b) = (self.tiles[a], self.tiles[b]);
        let wide = |byte: u8, sign| match sign {
            Sign::Signed => i32::from(byte.cast_signed()),
            Sign::Unsigned => i32::from(byte),
        };
        for (to, a) in self.tiles[to].iter_mut().zip(&a).take(m) {
            let mut sums = [0_i32; ROWS];
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = i32::from_le_bytes(four(to, n));
            }
            for (k, b) in b.iter().enumerate().take(k) {
                let a = four(a, k).map(|byte| wide(byte, signs[0]));
                for (n, sum) in sums.iter_mut().enumerate() {
                    let b = four(b, n).map(|byte| wide(byte, signs[1]));
                    let dot = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
                    *sum = sum.wrapping_add(dot);
                }
            }
            write(to, n, sums.map(i32::to_le_bytes));
        }
        Ok(())
    }

    /// `tdpbf16ps`: adds to each f32 of tile `to` the dot products of two bf16. The first and the second of all pairs are
    /// summed each for themselves by fused multiply-adds, then together, then to the destination; to nearest even, and
    /// what is denormal is zero before and after.
    ///
    /// # Errors
    /// The tiles do not belong together.
    pub fn dot_bf16(&mut self, to: usize, [a, b]: [usize; 2]) -> Result<(), Fault> {
        let (m, n, k) = self.product(to, a, b)?;
        let (a, b) = (self.tiles[a], self.tiles[b]);
        for (to, a) in self.tiles[to].iter_mut().zip(&a).take(m) {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("fma") {
                // SAFETY: just checked.
                unsafe { bf16_row_fma(to, a, &b, n, k) };
                continue;
            }
            bf16_row(to, a, &b, n, k);
        }
        Ok(())
    }

    fn shape(&self, tile: usize) -> Result<Shape, Fault> {
        let shape = self.shapes[tile];
        if shape.rows == 0 {
            return Err(Fault::NotConfigured { tile });
        }
        Ok(shape)
    }

    /// Rows, columns and quads of a product.
    fn product(&self, to: usize, a: usize, b: usize) -> Result<(usize, usize, usize), Fault> {
        let tiles = [to, a, b];
        if to == a || to == b || a == b {
            return Err(Fault::SameTile { tiles });
        }
        let [c, x, w] = [self.shape(to)?, self.shape(a)?, self.shape(b)?];
        let whole = c.bytes % 4 == 0 && x.bytes % 4 == 0 && w.bytes % 4 == 0;
        if !whole || x.rows != c.rows || x.bytes / 4 != w.rows || w.bytes != c.bytes {
            return Err(Fault::Shapes {
                tiles,
                shapes: [c, x, w].map(|shape| (shape.rows, shape.bytes)),
            });
        }
        Ok((c.rows, c.bytes / 4, w.rows))
    }
}

fn four(row: &[u8; ROW_BYTES], at: usize) -> [u8; 4] {
    [row[4 * at], row[4 * at + 1], row[4 * at + 2], row[4 * at + 3]]
}

/// Writes the first `count` results of a row; the rest becomes zero.
fn write(row: &mut [u8; ROW_BYTES], count: usize, results: [[u8; 4]; ROWS]) {
    *row = [0; ROW_BYTES];
    for (to, result) in row.chunks_exact_mut(4).zip(results).take(count) {
        to.copy_from_slice(&result);
    }
}

/// Without it a fused multiply-add is a call.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn bf16_row_fma(to: &mut [u8; ROW_BYTES], a: &[u8; ROW_BYTES], b: &Tile, n: usize, k: usize) {
    bf16_row(to, a, b, n, k);
}

#[inline(always)]
fn bf16_row(to: &mut [u8; ROW_BYTES], a: &[u8; ROW_BYTES], b: &Tile, n: usize, k: usize) {
    let mut sums = [[0.0_f32; 2]; ROWS];
    for (k, b) in b.iter().enumerate().take(k) {
        let a = pair(four(a, k));
        for (column, sums) in sums.iter_mut().enumerate() {
            let b = pair(four(b, column));
            sums[0] = flush(a[0].mul_add(b[0], sums[0]));
            sums[1] = flush(a[1].mul_add(b[1], sums[1]));
        }
    }
    let results = std::array::from_fn(|column| {
        let sum = flush(sums[column][0] + sums[column][1]);
        let before = flush(f32::from_le_bytes(four(to, column)));
        flush(before + sum).to_le_bytes()
    });
    write(to, n, results);
}

/// Two bf16 in f32.
#[inline(always)]
fn pair(bytes: [u8; 4]) -> [f32; 2] {
    let both = u32::from_le_bytes(bytes);
    [
        flush(f32::from_bits(both << 16)),
        flush(f32::from_bits(both & 0xffff_0000)),
    ]
}

#[inline(always)]
fn flush(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE {
        0.0_f32.copysign(value)
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tile 0 of `[m, n]` results, tile 1 of `[m, k]` quads, tile 2 of `[k, n]` quads.
    fn config(m: u8, n: u8, k: u8) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        config[0] = 1;
        for (tile, (rows, quads)) in [(m, n), (m, k), (k, n)].into_iter().enumerate() {
            config[16 + 2 * tile] = 4 * quads;
            config[48 + tile] = rows;
        }
        config
    }

    fn tiles(m: u8, n: u8, k: u8, a: &[u8], b: &[u8]) -> Tiles {
        let mut tiles = Tiles::new();
        tiles.configure(&config(m, n, k)).unwrap();
        for (tile, (bytes, row_bytes)) in [(1, (a, 4 * k)), (2, (b, 4 * n))] {
            let row = |r: usize| bytes[r * usize::from(row_bytes)..].as_ptr();
            // SAFETY: the callers' arrays are as long as their shapes say.
            unsafe { tiles.load(tile, row).unwrap() };
        }
        tiles
    }

    fn result(tiles: &Tiles, row: usize, column: usize) -> [u8; 4] {
        let mut rows = [[0_u8; ROW_BYTES]; ROWS];
        let to = rows.as_mut_ptr();
        // SAFETY: 16 rows of 64 bytes.
        unsafe { tiles.store(0, |r| to.add(r).cast()).unwrap() };
        four(&rows[row], column)
    }

    #[test]
    fn bytes_are_read_with_the_signs_asked_for() {
        let (a, b) = ([255, 2, 3, 4], [254, 10, 20, 30]);
        for (signs, first) in [
            ([Sign::Signed, Sign::Signed], 2),
            ([Sign::Signed, Sign::Unsigned], -254),
            ([Sign::Unsigned, Sign::Signed], -510),
            ([Sign::Unsigned, Sign::Unsigned], 255 * 254),
        ] {
            let mut tiles = tiles(1, 1, 1, &a, &b);
            for times in 1..3 {
                tiles.dot_bytes(0, [1, 2], signs).unwrap();
                let expected = times * (first + 20 + 60 + 120);
                assert_eq!(i32::from_le_bytes(result(&tiles, 0, 0)), expected, "{signs:?}");
            }
        }
    }

    #[test]
    fn rows_and_columns_of_a_product_are_where_they_belong() {
        // a = [[1, 0], [0, 2]] and b = [[3, 5, 7], [11, 13, 17]] in the first byte of each quad.
        let quads = |numbers: &[u8]| numbers.iter().flat_map(|&q| [q, 0, 0, 0]).collect::<Vec<u8>>();
        let mut tiles = tiles(2, 3, 2, &quads(&[1, 0, 0, 2]), &quads(&[3, 5, 7, 11, 13, 17]));
        tiles.dot_bytes(0, [1, 2], [Sign::Signed; 2]).unwrap();
        let got = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)].map(|(r, c)| result(&tiles, r, c)[0]);
        assert_eq!(got, [3, 5, 7, 22, 26, 34]);
        assert_eq!(result(&tiles, 2, 0), [0; 4]);
    }

    #[test]
    fn bf16_halves_are_summed_apart_and_denormals_are_zero() {
        let bf16 = |values: [f32; 2]| values.map(|v| (v.to_bits() >> 16) as u16);
        let bytes = |pairs: &[[u16; 2]]| {
            pairs
                .as_flattened()
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        // Even products: 2^24, 1; odd ones: 1, -2^24. In one sum the first 1 would be lost, here both are.
        let a = bytes(&[bf16([16_777_216.0, 1.0]), bf16([1.0, -16_777_216.0])]);
        let ones = bytes(&[bf16([1.0, 1.0]), bf16([1.0, 1.0])]);
        let mut sums = tiles(1, 1, 2, &a, &ones);
        sums.dot_bf16(0, [1, 2]).unwrap();
        // Each half rounds to nearest even: 2^24 + 1 to 2^24, 1 - 2^24 is exact.
        assert_eq!(f32::from_le_bytes(result(&sums, 0, 0)), 1.0);
        let tiny = bytes(&[[1, 0]]);
        let large = bytes(&[bf16([3e38, 0.0])]);
        let mut sums = tiles(1, 1, 1, &tiny, &large);
        sums.dot_bf16(0, [1, 2]).unwrap();
        assert_eq!(f32::from_le_bytes(result(&sums, 0, 0)), 0.0);
    }

    #[test]
    fn a_configuration_out_of_bounds_is_refused() {
        let change = |at: usize, byte: u8| {
            let mut changed = config(16, 16, 8);
            changed[at] = byte;
            Tiles::new().configure(&changed)
        };
        assert_eq!(change(0, 1), Ok(()));
        for (at, byte) in [
            (0, 0),
            (0, 2),
            (1, 1),
            (9, 1),
            (16, 65),
            (17, 1),
            (48, 17),
            (48, 0),
            (20, 0),
            (32, 4),
            (56, 1),
        ] {
            assert!(
                matches!(change(at, byte), Err(Fault::Config { .. })),
                "byte {at} = {byte}"
            );
        }
    }

    #[test]
    fn products_of_tiles_that_do_not_fit_are_refused() {
        let mut tiles = Tiles::new();
        assert_eq!(tiles.zero(3), Err(Fault::NotConfigured { tile: 3 }));
        tiles.configure(&config(4, 5, 6)).unwrap();
        assert_eq!(tiles.zero(3), Err(Fault::NotConfigured { tile: 3 }));
        assert_eq!(tiles.dot_bf16(0, [1, 2]), Ok(()));
        assert!(matches!(tiles.dot_bf16(0, [2, 1]), Err(Fault::Shapes { .. })));
        assert!(matches!(tiles.dot_bf16(0, [1, 1]), Err(Fault::SameTile { .. })));
        tiles.release();
        assert_eq!(tiles.zero(0), Err(Fault::NotConfigured { tile: 0 }));
    }
}
