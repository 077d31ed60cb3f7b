//! GGUF's block formats, one row at a time and plainly: the truth the packed kernels are checked against.
//! Knows nothing of devices.

use galerne_core::dtype::DType;
use half::{bf16, f16};

pub(crate) mod float8;
pub mod groups;

/// Elements in one quantized block, or that share a scale in formats of larger ones.
pub const BLOCK_ELEMENTS: usize = 32;

/// Turns stored bytes of one or more rows into f32. Quantized values are `d * q` or `d * q + m`, rounded after
/// each operation. `bytes` and `out` must belong together: what is longer is left alone.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => plain(bytes, out, |b: [u8; 4]| f32::from_le_bytes(b)),
        DType::F16 => plain(bytes, out, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
        DType::Bf16 => plain(bytes, out, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32()),
        DType::Q4_0 | DType::Q4_1 | DType::Q8_0 => {
            let blocks = bytes.chunks_exact(dtype.block_bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(BLOCK_ELEMENTS)) {
                dequantize_block(dtype, block, out);
            }
        }
        _ => {
            for (group, out) in groups::groups(dtype, bytes).zip(out.chunks_exact_mut(BLOCK_ELEMENTS)) {
                group.dequantize(out);
            }
        }
    }
}

/// Stores f32 elements as `dtype`: nearest for plain types; for blocks the scale that spans the largest
/// magnitude or the range, whichever the format holds. The length must be whole blocks.
#[must_use]
pub fn quantize(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => values
            .iter()
            .flat_map(|&v| f16::from_f32(v).to_le_bytes())
            .collect(),
        DType::Bf16 => values
            .iter()
            .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
            .collect(),
        DType::Q4_0 => values
            .chunks_exact(BLOCK_ELEMENTS)
            .flat_map(quantize_q4_0)
            .collect(),
        DType::Q4_1 => values
            .chunks_exact(BLOCK_ELEMENTS)
            .flat_map(quantize_q4_1)
            .collect(),
        DType::Q8_0 => values
            .chunks_exact(BLOCK_ELEMENTS)
            .flat_map(quantize_q8_0)
            .collect(),
        _ => groups::quantize(dtype, values),
    }
}

fn plain<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (element, out) in elements.iter().zip(out) {
        *out = read(*element);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn dequantize_block(dtype: DType, block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    match dtype {
        DType::Q8_0 => {
            for (out, &q) in out.iter_mut().zip(&block[2..]) {
                *out = d * f32::from(q.cast_signed());
            }
        }
        DType::Q4_1 => {
            let m = half_at(block, 2);
            nibbles(&block[4..], out, |q| d * q + m);
        }
        _ => nibbles(&block[2..], out, |q| d * (q - 8.0)),
    }
}

fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK_ELEMENTS / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = value(f32::from(byte & 15));
        *high = value(f32::from(byte >> 4));
    }
}

fn largest(values: &[f32]) -> f32 {
    values
        .iter()
        .copied()
        .fold(0.0, |best: f32, v| if v.abs() > best.abs() { v } else { best })
}

fn reciprocal(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn pack(values: &[f32], code: impl Fn(f32) -> u8) -> impl Iterator<Item = u8> {
    let bytes: Vec<u8> = (0..16)
        .map(|i| code(values[i]) | (code(values[i + 16]) << 4))
        .collect();
    bytes.into_iter()
}

fn quantize_q4_0(values: &[f32]) -> Vec<u8> {
    // The largest magnitude becomes -8, the only code of that size.
    let d = f16::from_f32(largest(values) / -8.0);
    let inverse = reciprocal(d.to_f32());
    let code = |v: f32| (v * inverse + 8.5).clamp(0.0, 15.0) as u8;
    d.to_le_bytes().into_iter().chain(pack(values, code)).collect()
}

fn quantize_q4_1(values: &[f32]) -> Vec<u8> {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (d, m) = (f16::from_f32((high - low) / 15.0), f16::from_f32(low));
    let inverse = reciprocal(d.to_f32());
    let code = |v: f32| ((v - m.to_f32()) * inverse + 0.5).clamp(0.0, 15.0) as u8;
    d.to_le_bytes()
        .into_iter()
        .chain(m.to_le_bytes())
        .chain(pack(values, code))
        .collect()
}

fn quantize_q8_0(values: &[f32]) -> Vec<u8> {
    let d = f16::from_f32(largest(values).abs() / 127.0);
    let inverse = reciprocal(d.to_f32());
    let code = |v: &f32| ((v * inverse).round().clamp(-127.0, 127.0) as i8).cast_unsigned();
    d.to_le_bytes()
        .into_iter()
        .chain(values.iter().map(code))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Largest step between neighbouring codes, relative to the block's range, plus the f16 scale's rounding.
    fn tolerance(dtype: DType, values: &[f32]) -> f32 {
        let size = largest(values).abs();
        match dtype {
            DType::F32 => 0.0,
            DType::F16 => size / 2048.0 + 1e-7,
            DType::Bf16 => size / 256.0,
            // Half a step of size/8 within the codes; +size itself is one code out of reach.
            DType::Q4_0 => size / 8.0 * 1.01 + 1e-6,
            DType::Q4_1 => size * 2.0 / 15.0 * 0.51 + size * 0.01 + 1e-6,
            DType::Q8_0 => size / 127.0 * 0.51 + size * 0.001 + 1e-5,
            // As in Q4_0, +size itself may be one code out of reach.
            DType::Q5_0 => size / 16.0 * 1.01 + 1e-6,
            DType::Q5_1 => size * 2.0 / 31.0 * 0.51 + size * 0.01 + 1e-6,
            // The widest step is between -127 and -104, and the other end is 113.
            DType::Iq4Nl => size * 0.12,
            // Half a step, and half a step of the six-bit scale and minimum.
            DType::Q4K => size * (1.0 / 15.0 + 2.0 / 63.0) + 0.01,
            DType::Q5K => size * (1.0 / 31.0 + 2.0 / 63.0) + 0.01,
            DType::Q6K => size / 32.0 * 1.01 + size / 127.0,
        }
    }

    proptest! {
        #[test]
        fn a_round_trip_stays_within_half_a_step(values in prop::collection::vec(-100.0f32..100.0, 512)) {
            for dtype in DType::ALL {
                let bytes = quantize(dtype, &values);
                prop_assert_eq!(Some(bytes.len()), dtype.row_bytes(values.len()));
                let mut back = vec![0.0; values.len()];
                let step = dtype.block_elements().max(BLOCK_ELEMENTS);
                dequantize(dtype, &bytes, &mut back);
                for (block, (values, back)) in values.chunks(step).zip(back.chunks(step)).enumerate() {
                    for (i, (v, b)) in values.iter().zip(back).enumerate() {
                        prop_assert!((v - b).abs() <= tolerance(dtype, values), "{dtype} block {block} element {i}: {v} came back as {b}");
                    }
                }
            }
        }

        #[test]
        fn what_was_quantized_once_stays(values in prop::collection::vec(-4.0f32..4.0, 32)) {
            for dtype in [DType::F16, DType::Bf16] {
                let mut once = vec![0.0; 32];
                dequantize(dtype, &quantize(dtype, &values), &mut once);
                let mut twice = vec![0.0; 32];
                dequantize(dtype, &quantize(dtype, &once), &mut twice);
                prop_assert_eq!(once, twice);
            }
        }

        #[test]
        fn any_bytes_dequantize_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            for dtype in DType::ALL {
                dequantize(dtype, &bytes, &mut [0.0; 300]);
            }
        }
    }

    #[test]
    fn q4_1_puts_element_16_in_the_high_nibble() {
        let mut bytes = vec![0; 20];
        bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[2..4].copy_from_slice(&f16::from_f32(-1.0).to_le_bytes());
        bytes[4] = 0x3A;
        let mut out = [0.0; 32];
        dequantize(DType::Q4_1, &bytes, &mut out);
        assert_eq!((out[0], out[16], out[1]), (4.0, 0.5, -1.0));
    }

    /// `tests/golden/gguf-blocks.txt` says how it was made.
    #[test]
    fn every_block_format_agrees_with_ggufs_own_package() {
        let mut seen = 0;
        let golden = include_str!("../../tests/golden/gguf-blocks.txt");
        for line in golden.lines().filter(|line| !line.starts_with('#')) {
            let mut words = line.split(' ');
            let (name, stored, values) = (words.next(), words.next(), words.next());
            let dtype = DType::from_name(name.unwrap()).unwrap();
            let hex = |text: Option<&str>| -> Vec<u8> {
                let (pairs, _) = text.unwrap().as_bytes().as_chunks::<2>();
                let pair = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
                pairs.iter().map(|digits| pair(digits).unwrap()).collect()
            };
            let mut expected = vec![0.0; hex(values).len() / 4];
            dequantize(DType::F32, &hex(values), &mut expected);
            let mut got = vec![f32::NAN; expected.len()];
            dequantize(dtype, &hex(stored), &mut got);
            assert_eq!(expected, got, "{dtype}");
            seen += 1;
        }
        assert_eq!(
            seen,
            DType::ALL
                .iter()
                .filter(|dtype| dtype.block_elements() > 1)
                .count()
        );
    }
}
