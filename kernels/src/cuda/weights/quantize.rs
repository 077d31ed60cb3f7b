//! Rows of numbers to the code formats that no stored dtype has, when they are loaded.

use half::f16;

use super::slices::{Slice, pair};
use super::{SLICE_COLUMNS, TILE_COLUMNS, WeightFormat};
use crate::quant::float8;

/// Magnitudes of 4-bit floats (e2m1) by code.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// Halfway between them.
const E2M1_MIDDLES: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

/// The row's factor and slices; the last one may be padded with zeros.
///
/// # Panics
/// For formats that are made from stored dtypes: a host bug.
pub(super) fn row(format: WeightFormat, values: &[f32]) -> (f32, Vec<Slice>) {
    let largest = largest(values);
    match format {
        WeightFormat::Fp8 => {
            let factor = largest / float8::LARGEST;
            let codes = padded(values).map(|slice| fp8(&slice, inverse(factor)));
            (factor, codes.collect())
        }
        WeightFormat::Nvfp4 => {
            let factor = largest / (E2M1[7] * float8::LARGEST);
            let codes = padded(values).map(|slice| nvfp4(&slice, factor));
            (factor, codes.collect())
        }
        WeightFormat::Int4 => {
            let tiles = values.chunks(TILE_COLUMNS as usize);
            (1.0, tiles.flat_map(int4).collect())
        }
        _ => panic!("quantize a row: {format:?} is made from stored rows only"),
    }
}

/// What [`row`] made of a row of so many values, as kernels see it.
pub(super) fn numbers(format: WeightFormat, factor: f32, slices: &[Slice], count: usize) -> Vec<f32> {
    let of_slice = |slice: &Slice| -> [f32; SLICE_COLUMNS] {
        std::array::from_fn(|i| {
            let code = slice.codes[i];
            match format {
                WeightFormat::Fp8 => factor * signed(code & 0x80 != 0, float8::value(code & 0x7f)),
                WeightFormat::Nvfp4 => {
                    let scale = float8::value(slice.scales[i / 16]);
                    factor * (scale * signed(code & 8 != 0, E2M1[usize::from(code & 7)]))
                }
                _ => {
                    let [d, zero] = [0, 2].map(|at| {
                        f16::from_le_bytes([slice.row_scales[at], slice.row_scales[at + 1]]).to_f32()
                    });
                    d * (f32::from(code) - zero)
                }
            }
        })
    };
    let mut numbers: Vec<f32> = slices.iter().flat_map(of_slice).collect();
    numbers.truncate(count);
    numbers
}

fn signed(is_negative: bool, size: f32) -> f32 {
    if is_negative { -size } else { size }
}

fn padded(values: &[f32]) -> impl Iterator<Item = [f32; SLICE_COLUMNS]> {
    values
        .chunks(SLICE_COLUMNS)
        .map(|slice| std::array::from_fn(|i| slice.get(i).copied().unwrap_or(0.0)))
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest: f32, v| largest.max(v.abs()))
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

fn fp8(values: &[f32; SLICE_COLUMNS], inverse: f32) -> Slice {
    Slice {
        codes: values.map(|v| float8::code(v * inverse)),
        scales: [0; 4],
        row_scales: [0; 4],
    }
}

fn nvfp4(values: &[f32; SLICE_COLUMNS], factor: f32) -> Slice {
    let scale = |half: usize| float8::code(largest(&values[16 * half..][..16]) / E2M1[7] * inverse(factor));
    let scales = [scale(0), scale(1)];
    let inverses = scales.map(|scale| inverse(factor * float8::value(scale)));
    let code = |i: usize| {
        let x = values[i] * inverses[i / 16];
        let nearest = E2M1_MIDDLES.iter().filter(|&&middle| x.abs() > middle).count();
        nearest as u8 | if x < 0.0 { 8 } else { 0 }
    };
    Slice {
        codes: std::array::from_fn(code),
        scales: [scales[0], scales[1], 0, 0],
        row_scales: [0; 4],
    }
}

fn int4(values: &[f32]) -> Vec<Slice> {
    let low = values.iter().copied().fold(0.0, f32::min);
    let high = values.iter().copied().fold(0.0, f32::max);
    let d = f16::from_f32((high - low) / 15.0);
    let inverse = inverse(d.to_f32());
    let zero = (-low * inverse).round().clamp(0.0, 15.0);
    let row_scales = pair(d.to_le_bytes(), f16::from_f32(zero).to_le_bytes());
    let code = |v: f32| (v * inverse + zero).round().clamp(0.0, 15.0) as u8;
    padded(values)
        .map(|slice| Slice {
            codes: slice.map(code),
            scales: [0; 4],
            row_scales,
        })
        .collect()
}
