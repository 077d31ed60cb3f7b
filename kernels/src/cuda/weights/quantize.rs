//! Rows of numbers to the code formats that no stored dtype has, when they are loaded.

use half::f16;

use super::slices::{Slice, pair};
use super::{SLICE_COLUMNS, TILE_COLUMNS, WeightFormat, float8};

/// Magnitudes of 4-bit floats (e2m1) by code.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

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
    let code = |i: usize| {
        let x = values[i] * inverse(factor * float8::value(scales[i / 16]));
        let distance = |code: &u8| (E2M1[usize::from(*code)] - x.abs()).abs();
        let nearest = (0..8u8).min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.unwrap_or(0) | if x < 0.0 { 8 } else { 0 }
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
    let zero = (-low * inverse(d.to_f32())).round().clamp(0.0, 15.0);
    let row_scales = pair(d.to_le_bytes(), f16::from_f32(zero).to_le_bytes());
    let code = |v: f32| (v * inverse(d.to_f32()) + zero).round().clamp(0.0, 15.0) as u8;
    padded(values)
        .map(|slice| Slice {
            codes: slice.map(code),
            scales: [0; 4],
            row_scales,
        })
        .collect()
}
