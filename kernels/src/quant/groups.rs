//! GGUF's formats of several scales to a block, and of 5 bits: each 32 columns as integers, scales and a minimum. Layouts
//! are those of ggml's `block_q4_K` and its kin. Knows nothing of devices.

use galerne_core::dtype::DType;
use half::f16;

use super::{BLOCK_ELEMENTS, largest, reciprocal};

/// 32 elements of a row: element `i` is `(d * scales[i / 16]) * codes[i] + m * minimum`, rounded after each operation, of
/// which all but the sum are exact.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// From -127 to 127.
    pub codes: [i8; BLOCK_ELEMENTS],
    /// Of the whole block.
    pub d: f16,
    /// Of the first 16 and the last 16 elements, in units of `d`; equal in all formats but `Q6_K`.
    pub scales: [i8; 2],
    /// Of the whole block; 0 in `Q5_0`, `Q6_K` and `Iq4Nl`.
    pub m: f16,
    /// In units of `m`; not above 0 in K-quants.
    pub minimum: i8,
}

/// `Iq4Nl`'s values of the 16 codes, in units of the scale.
const NONLINEAR: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];
/// Elements in a block of K-quants.
const SUPER_ELEMENTS: usize = 256;

impl Group {
    /// The same elements as a block of `Q8_0`, for formats whose scales and minimum are `d` and 0.
    #[must_use]
    pub fn to_q8_0(&self) -> [u8; 34] {
        let d = self.d.to_le_bytes();
        std::array::from_fn(|i| {
            if i < 2 {
                d[i]
            } else {
                self.codes[i - 2].cast_unsigned()
            }
        })
    }

    /// The elements in f32.
    pub fn dequantize(&self, out: &mut [f32]) {
        let minimum = self.m.to_f32() * f32::from(self.minimum);
        let scales = self.scales.map(|scale| self.d.to_f32() * f32::from(scale));
        for (i, (out, &code)) in out.iter_mut().zip(&self.codes).enumerate() {
            *out = scales[i / 16] * f32::from(code) + minimum;
        }
    }
}

/// Whether a dtype is one of those this module knows.
#[must_use]
pub const fn is_grouped(dtype: DType) -> bool {
    matches!(
        dtype,
        DType::Q5_0 | DType::Q5_1 | DType::Iq4Nl | DType::Q4K | DType::Q5K | DType::Q6K
    )
}

/// The groups of one or more whole blocks of a grouped dtype, in order; none for other dtypes.
pub fn groups(dtype: DType, bytes: &[u8]) -> impl Iterator<Item = Group> + '_ {
    let count = if is_grouped(dtype) {
        dtype.block_elements() / BLOCK_ELEMENTS
    } else {
        0
    };
    bytes
        .chunks_exact(dtype.block_bytes())
        .flat_map(move |block| (0..count).map(move |g| group(dtype, block, g)))
}

fn group(dtype: DType, block: &[u8], g: usize) -> Group {
    match dtype {
        DType::Q5_0 => fives(&block[2..], stored_half(block, 0), f16::ZERO, -16),
        DType::Q5_1 => fives(&block[4..], stored_half(block, 0), stored_half(block, 2), 0),
        DType::Iq4Nl => {
            let nibble = |i: usize| block[2 + i % 16] >> (i / 16 * 4) & 15;
            Group {
                codes: std::array::from_fn(|i| NONLINEAR[usize::from(nibble(i))]),
                d: stored_half(block, 0),
                scales: [1; 2],
                m: f16::ZERO,
                minimum: 0,
            }
        }
        DType::Q6K => sixes(block, g),
        _ => fours(dtype, block, g),
    }
}

/// `Q5_0` and `Q5_1`: fifth bits of all elements, then nibbles.
fn fives(bytes: &[u8], d: f16, m: f16, offset: i8) -> Group {
    let code = |i: usize| {
        let low = bytes[4 + i % 16] >> (i / 16 * 4) & 15;
        let high = bytes[i / 8] >> (i % 8) & 1;
        (low | high << 4).cast_signed() + offset
    };
    Group {
        codes: std::array::from_fn(code),
        d,
        scales: [1; 2],
        m,
        minimum: 1,
    }
}

/// `Q4_K` and `Q5_K`: two f16 that scale six-bit scales and minima, these, the fifth bits, then nibbles.
fn fours(dtype: DType, block: &[u8], g: usize) -> Group {
    let (high_bits, nibbles) = match dtype {
        DType::Q5K => (&block[16..48], &block[48..]),
        _ => (&[][..], &block[16..]),
    };
    let (scale, minimum) = six_bits(&block[4..16], g);
    let code = |i: usize| {
        let low = nibbles[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
        let high = high_bits.get(i).map_or(0, |bits| bits >> g & 1);
        (low | high << 4).cast_signed()
    };
    Group {
        codes: std::array::from_fn(code),
        d: stored_half(block, 0),
        scales: [scale; 2],
        m: stored_half(block, 2),
        minimum: -minimum,
    }
}

/// Scale and minimum of group `g`: the first four in the low six bits of a byte each, the others in nibbles with their upper
/// two bits above the first four.
fn six_bits(packed: &[u8], g: usize) -> (i8, i8) {
    let (scale, minimum) = if g < 4 {
        (packed[g] & 63, packed[4 + g] & 63)
    } else {
        let both = packed[4 + g];
        let upper = |at: usize| packed[at] >> 6 << 4;
        (both & 15 | upper(g - 4), both >> 4 | upper(g))
    };
    (scale.cast_signed(), minimum.cast_signed())
}

fn stored_half(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// `Q6_K`: nibbles, pairs of upper bits, a signed scale for every 16 elements, then the f16 that scales these.
fn sixes(block: &[u8], g: usize) -> Group {
    let (half, quarter) = (g / 4, g % 4);
    let code = |i: usize| {
        let low = block[64 * half + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
        let high = block[128 + 32 * half + i] >> (2 * quarter) & 3;
        (low | high << 4).cast_signed() - 32
    };
    let scale = |n: usize| block[192 + 2 * g + n].cast_signed();
    Group {
        codes: std::array::from_fn(code),
        d: stored_half(block, 208),
        scales: [scale(0), scale(1)],
        m: f16::ZERO,
        minimum: 0,
    }
}

/// Stores whole blocks as a grouped dtype, by the range of each group: good enough for tests, not as good as
/// ggml's search.
pub(super) fn quantize(dtype: DType, values: &[f32]) -> Vec<u8> {
    let blocks = values.chunks_exact(dtype.block_elements());
    match dtype {
        DType::Q6K => blocks.flat_map(store_sixes).collect(),
        DType::Q4K | DType::Q5K => blocks.flat_map(|block| store_fours(dtype, block)).collect(),
        _ => blocks.flat_map(|block| store_small(dtype, block)).collect(),
    }
}

fn range(values: &[f32]) -> (f32, f32) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    (low, values.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

fn store_small(dtype: DType, values: &[f32]) -> Vec<u8> {
    let (low, high) = range(values);
    let d = f16::from_f32(match dtype {
        DType::Q5_0 => largest(values) / -16.0,
        DType::Q5_1 => (high - low) / 31.0,
        _ => largest(values) / -127.0,
    });
    let (inverse, m) = (reciprocal(d.to_f32()), f16::from_f32(low));
    let code = |i: usize| match dtype {
        DType::Q5_0 => (values[i] * inverse + 16.5).clamp(0.0, 31.0) as u8,
        DType::Q5_1 => ((values[i] - m.to_f32()) * inverse + 0.5).clamp(0.0, 31.0) as u8,
        _ => nearest(values[i] * inverse),
    };
    let mut block = d.to_le_bytes().to_vec();
    if dtype == DType::Q5_1 {
        block.extend(m.to_le_bytes());
    }
    if dtype != DType::Iq4Nl {
        block.extend((0..4).map(|b| (0..8).fold(0, |bits, i| bits | code(8 * b + i) >> 4 << i)));
    }
    block.extend((0..16).map(|i| code(i) & 15 | code(i + 16) << 4));
    block
}

fn nearest(value: f32) -> u8 {
    let distance = |code: &u8| (f32::from(NONLINEAR[usize::from(*code)]) - value).abs();
    (0..16)
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .unwrap_or(0)
}

fn store_fours(dtype: DType, values: &[f32]) -> Vec<u8> {
    let codes_max = if dtype == DType::Q5K { 31.0 } else { 15.0 };
    // Minima are subtracted and not negative.
    let wanted: Vec<(f32, f32)> = values
        .chunks_exact(BLOCK_ELEMENTS)
        .map(|group| {
            let (low, high) = range(group);
            let low = low.min(0.0);
            ((high - low).max(0.0) / codes_max, -low)
        })
        .collect();
    let most = |pick: fn(&(f32, f32)) -> f32| wanted.iter().map(pick).fold(0.0, f32::max);
    let (d, m) = (
        f16::from_f32(most(|w| w.0) / 63.0),
        f16::from_f32(most(|w| w.1) / 63.0),
    );
    let six = |value: f32, unit: f16| (value * reciprocal(unit.to_f32())).round().min(63.0) as u8;
    let (scales, minima): (Vec<u8>, Vec<u8>) = wanted.iter().map(|w| (six(w.0, d), six(w.1, m))).unzip();
    let code = |at: usize| {
        let g = at / BLOCK_ELEMENTS;
        let shifted = values[at] + m.to_f32() * f32::from(minima[g]);
        (shifted * reciprocal(d.to_f32() * f32::from(scales[g])) + 0.5).clamp(0.0, codes_max) as u8
    };
    let mut block = [d.to_le_bytes(), m.to_le_bytes()].concat();
    block.extend((0..4).map(|g| scales[g] | scales[g + 4] >> 4 << 6));
    block.extend((0..4).map(|g| minima[g] | minima[g + 4] >> 4 << 6));
    block.extend((4..8).map(|g| scales[g] & 15 | minima[g] << 4));
    if dtype == DType::Q5K {
        block.extend((0..32).map(|i| (0..8).fold(0, |bits, g| bits | code(32 * g + i) >> 4 << g)));
    }
    let pairs = (0..4).flat_map(|pair| (0..32).map(move |i| 64 * pair + i));
    block.extend(pairs.map(|at| code(at) & 15 | code(at + 32) << 4));
    block
}

fn store_sixes(values: &[f32]) -> Vec<u8> {
    let wanted: Vec<f32> = values
        .chunks_exact(16)
        .map(|part| largest(part) / -32.0)
        .collect();
    let d = f16::from_f32(largest(&wanted).abs() / 127.0);
    let scale = |part: usize| {
        (wanted[part] * reciprocal(d.to_f32()))
            .round()
            .clamp(-127.0, 127.0)
    };
    let code = |at: usize| {
        let inverse = reciprocal(d.to_f32() * scale(at / 16));
        ((values[at] * inverse).round().clamp(-32.0, 31.0) + 32.0) as u8
    };
    let mut block = Vec::new();
    for half in [0, SUPER_ELEMENTS / 2] {
        block.extend((half..half + 64).map(|at| code(at) & 15 | code(at + 64) << 4));
    }
    for half in [0, SUPER_ELEMENTS / 2] {
        let upper = |i: usize| (0..4).fold(0, |bits, q| bits | code(half + 32 * q + i) >> 4 << (2 * q));
        block.extend((0..32).map(upper));
    }
    block.extend((0..16).map(|part| (scale(part) as i8).cast_unsigned()));
    block.extend(d.to_le_bytes());
    block
}
