//! Linear maps, embeddings and dequantization on the CPU shim (or a GPU), in every weight format, against f64.
#![expect(unsafe_code, reason = "launches name raw memory")]

#[path = "support/activations.rs"]
mod activations;

use activations::{ACTIVATIONS, activation};
use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, EmbeddingIndex};
use galerne_cuda_shim::{Memory, Rig};
use galerne_kernels::conformance::Numbers;
use galerne_kernels::cuda::driver::{DevicePtr, DeviceView, Launch, Product, ProductElement, Products};
use galerne_kernels::cuda::launch::dequantize::dequantize;
use galerne_kernels::cuda::launch::embedding::embedding;
use galerne_kernels::cuda::launch::fp8_round::fp8_round;
use galerne_kernels::cuda::launch::linear::{Linear, Means, gated, linear, workspace_bytes};
use galerne_kernels::cuda::launch::product::{WRITTEN_ROWS_MIN, written, written_fp8};
use galerne_kernels::cuda::weights::{DeviceMatrix, Packing, WeightFormat};
use galerne_kernels::device::Precision;
use galerne_kernels::program::{BufferId, View};
use galerne_kernels::quant;

/// A matrix and its numbers.
struct Weights<'a> {
    values: Vec<f32>,
    matrix: DeviceMatrix,
    _memory: Memory<'a, u8>,
}

impl<'a> Weights<'a> {
    fn stored(rig: &'a Rig, dtype: DType, rows: u32, width: u32) -> Self {
        let mut numbers = Numbers::new(u64::from(rows * width) + 1);
        let normals = numbers.normals((rows * width) as usize, (width as f32).powf(-0.5));
        let stored = quant::quantize(dtype, &normals);
        let mut values = vec![0.0; normals.len()];
        quant::dequantize(dtype, &stored, &mut values);
        let packing = Packing::new(dtype, rows, width);
        let mut bytes = vec![0; packing.bytes()];
        let row_bytes = dtype.row_bytes(width as usize).expect("whole blocks");
        for (row, stored) in stored.chunks_exact(row_bytes).enumerate() {
            packing.pack_row(row as u32, dtype, stored, &mut bytes);
        }
        Self::packed(rig, &packing, &bytes, values)
    }

    /// In a format that only rows of numbers become. What they are then, `embedding` says, which is checked by itself.
    fn quantized(rig: &'a Rig, format: WeightFormat, rows: u32, width: u32) -> Self {
        let mut numbers = Numbers::new(u64::from(rows * width) + 1);
        let normals = numbers.normals((rows * width) as usize, (width as f32).powf(-0.5));
        let packing = Packing::with_format(format, rows, width);
        let mut bytes = vec![0; packing.bytes()];
        for (row, values) in normals.chunks_exact(width as usize).enumerate() {
            packing.quantize_row(row as u32, values, &mut bytes);
        }
        let mut weights = Self::packed(rig, &packing, &bytes, normals);
        weights.values = looked_up(rig, weights.matrix);
        weights
    }

    fn packed(rig: &'a Rig, packing: &Packing, bytes: &[u8], values: Vec<f32>) -> Self {
        let memory = rig.memory(bytes);
        Self {
            values,
            matrix: packing.matrix(memory.at()),
            _memory: memory,
        }
    }
}

fn run(rig: &Rig, launches: &[Launch]) {
    // SAFETY: every test makes memory as large as its launches say.
    unsafe { rig.enqueue(launches) }.expect("it runs");
}

/// All rows of a table.
fn looked_up(rig: &Rig, table: DeviceMatrix) -> Vec<f32> {
    let entries: Vec<u32> = (0..table.rows).collect();
    let tokens = rig.memory(&entries);
    let out = rig.poisoned::<f32>((table.rows * table.width) as usize);
    let view = out.view(table.width, 0, table.width);
    let numbers = (tokens.at(), DevicePtr::NULL);
    run(
        rig,
        &[embedding(
            (table, 0),
            EmbeddingIndex::Tokens,
            numbers,
            view,
            table.rows,
        )],
    );
    out.read()
}

/// Rows, margins beside x and out, and the rest of a linear map.
#[derive(Debug, Clone, Copy)]
struct Case {
    rows: u32,
    margin: u32,
    bias: bool,
    accumulate: bool,
    precision: Precision,
}

/// The output rows, after checking that nothing beside them changed.
fn mapped(rig: &Rig, weights: &Weights<'_>, x: &[f32], case: Case) -> Vec<f32> {
    let (inner, outer, rows) = (weights.matrix.width, weights.matrix.rows, case.rows);
    let (x_stride, out_stride) = (inner + 2 * case.margin, outer + 2 * case.margin);
    let mut wide = vec![f32::NAN; (rows * x_stride) as usize];
    for (wide, x) in wide
        .chunks_exact_mut(x_stride as usize)
        .zip(x.chunks_exact(inner as usize))
    {
        wide[case.margin as usize..][..inner as usize].copy_from_slice(x);
    }
    let x = rig.memory(&wide);
    let before = vec![if case.accumulate { 0.5 } else { f32::NAN }; (rows * out_stride) as usize];
    let out = rig.memory(&before);
    let bias: Vec<f32> = (0..outer).map(|c| c as f32 / 64.0).collect();
    let bias = rig.memory(&bias);
    let mut zeroed = vec![0xff_u8; workspace_bytes(&weights.matrix, rows)];
    zeroed[..1_056].fill(0);
    let workspace = rig.memory(&zeroed);
    let job = Linear {
        x: x.view(x_stride, case.margin, inner),
        matrix: weights.matrix,
        bias: if case.bias { bias.at() } else { DevicePtr::NULL },
        accumulate: case.accumulate,
        out: out.view(out_stride, case.margin, outer),
        rows,
    };
    let means = Means {
        precision: case.precision,
        products: rig.products().min(Products::Floats16),
        has_tensor_memory: false,
    };
    run(rig, &linear(&job, means, workspace.at()));
    assert_eq!(
        workspace.read()[..1_056],
        [0; 1_056],
        "the counters are left as they were"
    );
    let (got, mut rows_of_out) = (out.read(), Vec::new());
    for (row, before) in got
        .chunks_exact(out_stride as usize)
        .zip(before.chunks_exact(out_stride as usize))
    {
        let columns = case.margin as usize..(case.margin + outer) as usize;
        let beside = |row: &[f32]| {
            [&row[..columns.start], &row[columns.end..]]
                .concat()
                .iter()
                .map(|v| v.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(beside(row), beside(before), "{case:?} wrote beside its columns");
        rows_of_out.extend_from_slice(&row[columns]);
    }
    rows_of_out
}

fn check(weights: &Weights<'_>, rig: &Rig, case: Case) {
    let (inner, outer) = (weights.matrix.width as usize, weights.matrix.rows as usize);
    let x = Numbers::new(7).normals(case.rows as usize * inner, 1.0);
    let got = mapped(rig, weights, &x, case);
    // Exact: sums of f32. Fast: bf16 has 8 bits, so factors are off by 2^-9 each; over a sum of random signs that adds up
    // as its root, as the sum itself does; a few times the deviation is the most of some thousand numbers.
    let tolerance = match case.precision {
        Precision::F32 => 4e-6,
        Precision::Auto => 1.5e-2,
    };
    for row in 0..case.rows as usize {
        for column in 0..outer {
            let products = x[row * inner..][..inner]
                .iter()
                .zip(&weights.values[column * inner..]);
            let mut expected: f64 = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            if case.bias {
                expected += column as f64 / 64.0;
            }
            if case.accumulate {
                expected += 0.5;
            }
            let got = f64::from(got[row * outer + column]);
            assert!(
                (got - expected).abs() <= tolerance * expected.abs().max(1.0),
                "{:?} [{row}, {column}] of [{outer}, {inner}] {case:?}: expected {expected}, got {got}",
                weights.matrix.format
            );
        }
    }
}

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Auto];

/// Shapes that the dtype's blocks allow: less than a panel and a tile, and more than several.
fn shapes(dtype: DType) -> &'static [(u32, u32)] {
    match dtype.block_elements() {
        1 => &[(1, 1), (50, 33), (17, 7), (140, 96)],
        32 => &[(16, 32), (33, 64), (140, 288)],
        _ => &[(16, 256), (33, 512)],
    }
}

fn every_shape_and_count(dtype: DType) {
    let mut seed = 0;
    for &(outer, inner) in shapes(dtype) {
        for (rows, margin) in [(1, 0), (5, 3), (9, 4), (30, 0), (64, 0), (67, 3)] {
            for precision in PRECISIONS {
                seed += 1;
                let rig = Rig::new(seed);
                let weights = Weights::stored(&rig, dtype, outer, inner);
                let case = Case {
                    rows,
                    margin,
                    bias: seed % 3 != 0,
                    accumulate: seed % 4 == 1,
                    precision,
                };
                check(&weights, &rig, case);
            }
        }
    }
}

#[test]
fn plain_formats() {
    [DType::F32, DType::F16, DType::Bf16]
        .into_iter()
        .for_each(every_shape_and_count);
}

#[test]
fn formats_of_4_bits() {
    [DType::Q4_0, DType::Q4_1, DType::Q4K]
        .into_iter()
        .for_each(every_shape_and_count);
}

#[test]
fn formats_of_8_bits() {
    [
        DType::Q8_0,
        DType::Q5_0,
        DType::Q5_1,
        DType::Iq4Nl,
        DType::Q5K,
        DType::Q6K,
    ]
    .into_iter()
    .for_each(every_shape_and_count);
}

#[test]
fn formats_made_from_numbers() {
    for format in [WeightFormat::Fp8, WeightFormat::Nvfp4, WeightFormat::Int4] {
        for (seed, (outer, inner, rows)) in [(33, 200, 5), (140, 384, 20), (40, 200, 70)]
            .into_iter()
            .enumerate()
        {
            for precision in PRECISIONS {
                let rig = Rig::new(seed as u64);
                let weights = Weights::quantized(&rig, format, outer, inner);
                let case = Case {
                    rows,
                    margin: 0,
                    bias: true,
                    accumulate: false,
                    precision,
                };
                check(&weights, &rig, case);
            }
        }
    }
}

#[test]
fn several_blocks_share_wide_rows() {
    for (seed, (dtype, inner)) in [
        (DType::Bf16, 2_100),
        (DType::Q4_0, 2_080),
        (DType::Q8_0, 1_600),
        (DType::F32, 1_300),
    ]
    .into_iter()
    .enumerate()
    {
        for rows in [1, 12, 40] {
            let rig = Rig::new(seed as u64);
            let weights = Weights::stored(&rig, dtype, 20, inner);
            let case = Case {
                rows,
                margin: 0,
                bias: true,
                accumulate: true,
                precision: Precision::Auto,
            };
            check(&weights, &rig, case);
        }
    }
}

#[test]
fn many_rows_and_columns_take_several_tiles() {
    for (seed, (dtype, outer, inner, rows)) in [
        (DType::Bf16, 130, 200, 200),
        (DType::F16, 260, 64, 129),
        (DType::Q4K, 150, 256, 128),
        (DType::Q6K, 129, 512, 131),
    ]
    .into_iter()
    .enumerate()
    {
        let rig = Rig::new(seed as u64);
        let weights = Weights::stored(&rig, dtype, outer, inner);
        let case = Case {
            rows,
            margin: 2,
            bias: true,
            accumulate: seed % 2 == 0,
            precision: Precision::Auto,
        };
        check(&weights, &rig, case);
    }
}

const MEANS: Means = Means {
    precision: Precision::Auto,
    products: Products::None,
    has_tensor_memory: false,
};

/// Checks `function(gate) * up` of one launch against f64, and that nothing beside it changed.
fn check_gated(rig: &Rig, weights: &Weights<'_>, function: Activation, rows: u32) {
    let (inner, half) = (weights.matrix.width, weights.matrix.rows / 2);
    let x = Numbers::new(11).normals((rows * inner) as usize, 1.0);
    let x_memory = rig.memory(&x);
    let bias: Vec<f32> = (0..2 * half).map(|c| c as f32 / 64.0 - 0.5).collect();
    let bias_memory = rig.memory(&bias);
    let (margin, stride) = (2, half + 4);
    let out = rig.poisoned::<f32>((rows * stride) as usize);
    let mut zeroed = vec![0xff_u8; workspace_bytes(&weights.matrix, rows)];
    zeroed[..1_056].fill(0);
    let workspace = rig.memory(&zeroed);
    let job = Linear {
        x: x_memory.view(inner, 0, inner),
        matrix: weights.matrix,
        bias: bias_memory.at(),
        accumulate: false,
        out: out.view(stride, margin, half),
        rows,
    };
    let launch = gated(&job, function, MEANS, workspace.at()).expect("one launch");
    run(rig, &[launch]);
    assert_eq!(
        workspace.read()[..1_056],
        [0; 1_056],
        "the counters are left as they were"
    );
    let mapped = |row: usize, column: usize| -> f64 {
        let x = &x[row * inner as usize..][..inner as usize];
        let w = &weights.values[column * inner as usize..][..inner as usize];
        let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
        products.sum::<f64>() + f64::from(bias[column])
    };
    for (row, got) in out.read().chunks_exact(stride as usize).enumerate() {
        let (before, rest) = got.split_at(margin as usize);
        let (got, behind) = rest.split_at(half as usize);
        assert!(
            before.iter().chain(behind).all(|v| v.is_nan()),
            "it wrote beside its columns"
        );
        for (column, &got) in got.iter().enumerate() {
            let (gate, up) = (mapped(row, column), mapped(row, half as usize + column));
            let expected = activation(function, gate) * up;
            // Gate and up are each off as a map's results are (see `check`), and no activation is steeper than 1.2.
            let off = 1.5e-2
                * (1.2 * gate.abs().max(1.0) * up.abs()
                    + up.abs().max(1.0) * activation(function, gate).abs());
            assert!(
                (f64::from(got) - expected).abs() <= off.max(1e-5),
                "{:?} {function:?} [{row}, {column}] of [{half}, {inner}]: expected {expected}, got {got}",
                weights.matrix.format
            );
        }
    }
}

#[test]
fn a_map_of_few_rows_ends_in_a_gated_activation() {
    let mut seed = 0;
    let mut check = |dtype: DType, half: u32, inner: u32, rows: u32| {
        let rig = Rig::new(seed);
        let weights = Weights::stored(&rig, dtype, 2 * half, inner);
        check_gated(
            &rig,
            &weights,
            ACTIVATIONS[seed as usize % ACTIVATIONS.len()],
            rows,
        );
        seed += 1;
    };
    for dtype in DType::ALL {
        let inner = dtype.block_elements().max(24) as u32;
        for (half, rows) in [(16, 1), (80, 12), (144, 40), (64, 64)] {
            check(dtype, half, inner, rows);
        }
    }
    // Several blocks share wide rows.
    for (dtype, inner) in [(DType::Bf16, 2_100), (DType::Q4_1, 2_080), (DType::Q8_0, 1_600)] {
        for rows in [1, 5, 33] {
            check(dtype, 48, inner, rows);
        }
    }
    let rig = Rig::new(99);
    for format in [WeightFormat::Fp8, WeightFormat::Nvfp4, WeightFormat::Int4] {
        check_gated(
            &rig,
            &Weights::quantized(&rig, format, 96, 200),
            Activation::Silu,
            9,
        );
    }
}

#[test]
fn gates_that_do_not_end_with_a_panel_or_many_rows_take_two_launches() {
    let map = |outer, rows| Linear {
        x: view(7, 40),
        matrix: Packing::with_format(WeightFormat::Bf16, outer, 40).matrix(DevicePtr(4_096)),
        bias: DevicePtr::NULL,
        accumulate: false,
        out: view(16, outer / 2),
        rows,
    };
    let is_one = |map: &Linear, means| gated(map, Activation::Silu, means, DevicePtr(1 << 20)).is_some();
    assert!(is_one(&map(64, 64), MEANS));
    assert!(!is_one(&map(64, 65), MEANS), "they take tiles");
    assert!(!is_one(&map(48, 1), MEANS), "a panel holds gates and ups");
    let exact = Means {
        precision: Precision::F32,
        ..MEANS
    };
    assert!(!is_one(&map(64, 1), exact));
    let added = Linear {
        accumulate: true,
        ..map(64, 1)
    };
    assert!(!is_one(&added, MEANS));
}

#[test]
fn a_library_multiplies_many_rows_of_16_bits() {
    let mut seed = 0;
    for dtype in [DType::Bf16, DType::F16] {
        for (outer, inner, rows) in [(132, 200, 65), (4, 33, 130), (64, 64, 70)] {
            for (bias, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
                seed += 1;
                let rig = Rig::new(seed).with_products();
                let weights = Weights::stored(&rig, dtype, outer, inner);
                let case = Case {
                    rows,
                    margin: 4,
                    bias,
                    accumulate,
                    precision: Precision::Auto,
                };
                check(&weights, &rig, case);
            }
        }
    }
}

#[test]
fn a_library_multiplies_many_rows_of_any_format_once_they_are_written_out() {
    let rig = Rig::new(5).with_products();
    let matrices = [
        Weights::stored(&rig, DType::F32, 20, 40),
        Weights::stored(&rig, DType::Q4K, 12, 256),
        Weights::stored(&rig, DType::Q8_0, 36, 96),
        Weights::quantized(&rig, WeightFormat::Fp8, 40, 72),
        Weights::quantized(&rig, WeightFormat::Nvfp4, 20, 136),
        Weights::quantized(&rig, WeightFormat::Int4, 8, 72),
    ];
    for (index, weights) in matrices.iter().enumerate() {
        let case = Case {
            rows: WRITTEN_ROWS_MIN,
            margin: 4,
            bias: index % 2 == 0,
            accumulate: index % 3 == 0,
            precision: Precision::Auto,
        };
        check(weights, &rig, case);
    }
}

#[test]
fn a_matrix_written_out_in_parts_gives_what_it_gives_whole() {
    let rig = Rig::new(6).with_products();
    if rig.products() == Products::None {
        return;
    }
    let (rows, outer, inner) = (5, 56, 136);
    let weights = Weights::quantized(&rig, WeightFormat::Nvfp4, outer, inner);
    let x = rig.memory(&Numbers::new(3).normals((rows * inner) as usize, 1.0));
    let bias: Vec<f32> = (0..outer).map(|c| c as f32).collect();
    let bias = rig.memory(&bias);
    let workspace = rig.poisoned::<u8>(1 << 18);
    let run_in = |columns| {
        let out = rig.poisoned::<f32>((rows * outer) as usize);
        let map = Linear {
            x: x.view(inner, 0, inner),
            matrix: weights.matrix,
            bias: bias.at(),
            accumulate: false,
            out: out.view(outer, 0, outer),
            rows,
        };
        run(&rig, &written(&map, columns, workspace.at()));
        out.read()
    };
    let whole = run_in(outer);
    assert!(whole.iter().all(|v| v.is_finite()));
    // The last part is shorter, and parts begin within panels.
    for columns in [20, 16] {
        for (whole, part) in whole.iter().zip(run_in(columns)) {
            assert!(
                (whole - part).abs() <= 1e-4 * whole.abs().max(1.0),
                "{whole} and {part}"
            );
        }
    }
}

/// What `fp8_round` makes of rows, and each row's factor.
fn rounded(rig: &Rig, x: &[f32], width: u32) -> (Vec<u8>, Vec<f32>) {
    let (rows, depth) = (x.len() as u32 / width, width.next_multiple_of(128));
    let memory = rig.memory(x);
    let codes = rig.poisoned::<u8>((rows * depth) as usize);
    let factors = rig.poisoned::<f32>(rows as usize);
    let to = (codes.at(), factors.at());
    run(rig, &[fp8_round(memory.view(width, 0, width), rows, to, depth)]);
    (codes.read(), factors.read())
}

/// The numbers of codes of 8-bit floats, by the definition of the format.
fn float8(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

#[test]
fn rows_become_8_bit_floats_of_their_largest_number() {
    for (seed, (width, scale)) in [(1, 1.0), (33, 1e-4), (128, 1.0), (700, 3e4)]
        .into_iter()
        .enumerate()
    {
        let rig = Rig::new(seed as u64);
        let rows = 5;
        let mut x = Numbers::new(seed as u64).normals((rows * width) as usize, scale);
        x[..width as usize].fill(0.0);
        // A number far above the others of its row.
        x[2 * width as usize] = 1e3 * scale;
        let (codes, factors) = rounded(&rig, &x, width);
        let depth = width.next_multiple_of(128) as usize;
        for (row, (x, codes)) in x
            .chunks_exact(width as usize)
            .zip(codes.chunks_exact(depth))
            .enumerate()
        {
            let largest = x.iter().fold(0.0, |largest: f32, v| largest.max(v.abs()));
            for (k, &code) in codes.iter().enumerate() {
                let expected = x.get(k).copied().unwrap_or(0.0);
                let got = float8(code) * factors[row];
                // 4 bits, or half of the smallest code.
                let error = (expected.abs() / 16.0).max(factors[row] / 1_024.0) * 1.000_01;
                assert!(
                    (got - expected).abs() <= error,
                    "[{row}, {k}] of {width}: {expected} became {got}"
                );
                if expected.abs() == largest && largest > 0.0 {
                    assert_eq!(code & 0x7f, 0x7e, "the largest of a row is the largest code");
                }
            }
        }
    }
}

#[test]
fn a_library_multiplies_8_bit_floats_if_x_may_be_such() {
    for (seed, (outer, inner, columns)) in [(48, 200, 48), (80, 130, 32), (16, 384, 16)]
        .into_iter()
        .enumerate()
    {
        let rig = Rig::new(seed as u64).with_products();
        if rig.products() < Products::Floats8 {
            return;
        }
        let rows = 9;
        let weights = Weights::quantized(&rig, WeightFormat::Fp8, outer, inner);
        let x = Numbers::new(4).normals((rows * inner) as usize, 1.0);
        let (codes, factors) = rounded(&rig, &x, inner);
        let depth = inner.next_multiple_of(128) as usize;
        let (x, workspace) = (rig.memory(&x), rig.poisoned::<u8>(1 << 18));
        for accumulate in [false, true] {
            let out = rig.memory(&vec![0.5; (rows * (outer + 4)) as usize]);
            let map = Linear {
                x: x.view(inner, 0, inner),
                matrix: weights.matrix,
                bias: DevicePtr::NULL,
                accumulate,
                out: out.view(outer + 4, 0, outer),
                rows,
            };
            run(&rig, &written_fp8(&map, columns, workspace.at()));
            for (row, got) in out.read().chunks_exact(outer as usize + 4).enumerate() {
                let x = codes[row * depth..][..inner as usize].iter();
                let x: Vec<f32> = x.map(|&code| float8(code) * factors[row]).collect();
                for (column, &got) in got[..outer as usize].iter().enumerate() {
                    let products = x.iter().zip(&weights.values[column * inner as usize..]);
                    let sum: f64 = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let expected = sum + if accumulate { 0.5 } else { 0.0 };
                    assert!(
                        (f64::from(got) - expected).abs() <= 1e-4 * expected.abs().max(1.0),
                        "[{row}, {column}] of [{outer}, {inner}]: expected {expected}, got {got}"
                    );
                }
                assert_eq!(got[outer as usize..], [0.5; 4], "it wrote beside its columns");
            }
        }
    }
}

#[test]
fn x_becomes_8_bits_only_where_everything_is_for_it() {
    let map = Linear {
        x: view(8, 100),
        matrix: Packing::with_format(WeightFormat::Fp8, 96, 100).matrix(DevicePtr(4_096)),
        bias: DevicePtr::NULL,
        accumulate: false,
        out: view(16, 96),
        rows: WRITTEN_ROWS_MIN,
    };
    let element = |map: &Linear, products| {
        let means = Means { products, ..MEANS };
        let launches = linear(map, means, DevicePtr(1 << 20));
        let product = launches.iter().find_map(Launch::product);
        product.map(|Product { shape, .. }| shape.element())
    };
    assert_eq!(element(&map, Products::Floats8), Some(ProductElement::Fp8));
    assert_eq!(element(&map, Products::Floats16), Some(ProductElement::Bf16));
    assert_eq!(element(&map, Products::None), None);
    let few = Linear {
        rows: WRITTEN_ROWS_MIN - 1,
        ..map
    };
    assert_eq!(element(&few, Products::Floats8), None);
    let matrix = |format, rows, width| Packing::with_format(format, rows, width).matrix(DevicePtr(4_096));
    for (why, map) in [
        (
            "the library has no bias for it",
            Linear {
                bias: DevicePtr(160),
                ..map
            },
        ),
        (
            "columns are not whole sixteens",
            Linear {
                matrix: matrix(WeightFormat::Fp8, 92, 100),
                ..map
            },
        ),
        (
            "x is narrow",
            Linear {
                matrix: matrix(WeightFormat::Fp8, 96, 64),
                ..map
            },
        ),
        (
            "other weights",
            Linear {
                matrix: matrix(WeightFormat::Int4, 96, 100),
                ..map
            },
        ),
    ] {
        assert_eq!(
            element(&map, Products::Floats8),
            Some(ProductElement::Bf16),
            "{why}"
        );
    }
}

#[test]
fn tensor_memory_takes_maps_of_many_rows_if_asked_for() {
    let means = Means {
        precision: Precision::Auto,
        products: Products::Floats8,
        has_tensor_memory: true,
    };
    for (format, rows, expected) in [
        (WeightFormat::Bf16, 64, "linear_small_bf16_64"),
        (WeightFormat::Bf16, 65, "linear_tile_sm100_bf16"),
        (WeightFormat::Codes4Min, 600, "linear_tile_sm100_codes4_min"),
    ] {
        let map = Linear {
            x: view(7, 40),
            matrix: Packing::with_format(format, 300, 40).matrix(DevicePtr(4_096)),
            bias: DevicePtr::NULL,
            accumulate: false,
            out: view(16, 300),
            rows,
        };
        let last = linear(&map, means, DevicePtr(1 << 20)).pop().expect("a launch");
        assert_eq!(last.kernel, expected);
        if rows > 64 {
            // Tiles of 128 by 128; two of x and two of weights, 64 columns of 16 bits, and what aligns and controls them.
            assert_eq!(last.grid, [rows.div_ceil(128), 3, 1]);
            assert_eq!(last.shared_bytes, 1_024 + 4 * 128 * 64 * 2 + 32);
        }
    }
}

#[test]
fn a_library_gets_only_what_it_can_multiply() {
    let fits = Linear {
        x: view(7, 40),
        matrix: Packing::with_format(WeightFormat::Bf16, 64, 40).matrix(DevicePtr(4_096)),
        bias: DevicePtr(160),
        accumulate: false,
        out: view(16, 64),
        rows: 65,
    };
    let kernel = |map: &Linear, precision, products| {
        let launches = linear(
            map,
            Means {
                precision,
                products,
                has_tensor_memory: false,
            },
            DevicePtr(1 << 20),
        );
        launches.last().expect("a launch").kernel
    };
    assert_eq!(kernel(&fits, Precision::Auto, Products::Floats16), "product");
    assert_eq!(kernel(&fits, Precision::Auto, Products::None), "linear_tile_bf16");
    assert_eq!(kernel(&fits, Precision::F32, Products::Floats8), "linear_exact");
    let few = Linear { rows: 64, ..fits };
    assert_eq!(
        kernel(&few, Precision::Auto, Products::Floats8),
        "linear_small_bf16_64"
    );
    let matrix = |format| Packing::with_format(format, 64, 40).matrix(DevicePtr(4_096));
    for (why, map) in [
        (
            "f32",
            Linear {
                matrix: matrix(WeightFormat::F32),
                ..fits
            },
        ),
        (
            "8-bit floats in tiles",
            Linear {
                matrix: matrix(WeightFormat::Fp8),
                rows: WRITTEN_ROWS_MIN - 1,
                ..fits
            },
        ),
        (
            "an out that begins anywhere",
            Linear {
                out: view(5, 64),
                ..fits
            },
        ),
        (
            "a bias that begins anywhere",
            Linear {
                bias: DevicePtr(164),
                ..fits
            },
        ),
    ] {
        let kernel = kernel(&map, Precision::Auto, Products::Floats8);
        assert!(kernel.starts_with("linear_tile_"), "{why}: {kernel}");
    }
}

/// Rows of 128 numbers, of which these are the columns from number `start` of a region on.
fn view(start: u32, width: u32) -> DeviceView {
    let view = View {
        buffer: BufferId(0),
        start,
        width,
    };
    DeviceView::new(DevicePtr(1 << 16), 128, view)
}

#[test]
fn a_rows_result_does_not_depend_on_other_rows() {
    let rig = Rig::new(3);
    for (dtype, inner) in [(DType::Bf16, 1_100), (DType::Q4K, 1_280)] {
        let weights = Weights::stored(&rig, dtype, 20, inner);
        let x = Numbers::new(9).normals(140 * inner as usize, 1.0);
        let case = |rows| Case {
            rows,
            margin: 0,
            bias: false,
            accumulate: false,
            precision: Precision::Auto,
        };
        let alone = mapped(&rig, &weights, &x[..inner as usize], case(1));
        for rows in [2, 8, 9, 17, 40] {
            let together = mapped(&rig, &weights, &x[..(rows * inner) as usize], case(rows));
            assert_eq!(together[..20], alone, "{dtype} with {rows} rows");
        }
        // From 65 rows on other kernels run, but what they find does not depend on rows either.
        let few = mapped(&rig, &weights, &x[..(65 * inner) as usize], case(65));
        let many = mapped(&rig, &weights, &x, case(140));
        assert_eq!(few[..], many[..few.len()], "{dtype} with 65 and 140 rows");
    }
}

#[test]
fn no_rows_are_no_launch_that_writes() {
    let rig = Rig::new(0);
    let weights = Weights::stored(&rig, DType::Q4_0, 40, 64);
    for precision in PRECISIONS {
        let case = Case {
            rows: 0,
            margin: 0,
            bias: false,
            accumulate: false,
            precision,
        };
        assert!(mapped(&rig, &weights, &[], case).is_empty());
    }
}

#[test]
fn tables_and_dequantization_are_exact() {
    for dtype in DType::ALL {
        let rig = Rig::new(1);
        let width = if dtype.block_elements() == 1 {
            83
        } else {
            dtype.block_elements() as u32 * 5
        };
        let weights = Weights::stored(&rig, dtype, 19, width);
        assert_eq!(looked_up(&rig, weights.matrix), weights.values, "{dtype}");
        let stride = width.next_multiple_of(8) + 8;
        let out = rig.poisoned::<u16>((19 * stride) as usize);
        run(&rig, &[dequantize(weights.matrix, 0..19, out.at(), stride)]);
        for (row, got) in out.read().chunks_exact(stride as usize).enumerate() {
            for (column, &got) in got.iter().enumerate() {
                let stored = weights.values.get(row * width as usize + column);
                let expected = stored.filter(|_| column < width as usize).copied().unwrap_or(0.0);
                let expected = half::bf16::from_f32(expected);
                assert_eq!(half::bf16::from_bits(got), expected, "{dtype} [{row}, {column}]");
            }
        }
    }
}

#[test]
fn numbers_come_back_from_formats_made_for_them() {
    for (format, error) in [
        // Half of the last of 4 bits.
        (WeightFormat::Fp8, 1.0 / 16.0),
        // Half a step of 2 between 4 and 6 of the largest, and the scale's rounding.
        (WeightFormat::Nvfp4, 1.0 / 6.0 + 1.0 / 16.0),
        // Half of a fifteenth of the range.
        (WeightFormat::Int4, 1.0 / 15.0),
    ] {
        let (rows, width) = (18, 200);
        let rig = Rig::new(2);
        let values = Numbers::new(5).normals(rows * width, 3.0);
        let packing = Packing::with_format(format, rows as u32, width as u32);
        let mut bytes = vec![0; packing.bytes()];
        for (row, values) in values.chunks_exact(width).enumerate() {
            packing.quantize_row(row as u32, values, &mut bytes);
        }
        let weights = Weights::packed(&rig, &packing, &bytes, values);
        let got = looked_up(&rig, weights.matrix);
        for (at, (expected, got)) in weights.values.iter().zip(got).enumerate() {
            let row = &weights.values[at / width * width..][..width];
            let largest = row.iter().fold(0.0, |largest: f32, v| largest.max(v.abs()));
            let of = if format == WeightFormat::Fp8 {
                expected.abs() + 1e-3 * largest
            } else {
                largest
            };
            assert!(
                (expected - got).abs() <= error * of,
                "{format:?} {at}: {expected} came back as {got}"
            );
        }
    }
}

#[test]
fn entries_are_tokens_positions_or_one_constant_of_their_part() {
    let rig = Rig::new(4);
    let weights = Weights::stored(&rig, DType::Q8_0, 6, 64);
    let (tokens, positions) = (rig.memory(&[3_u32, 9, 2]), rig.memory(&[0_u32, 1, 2]));
    // This part of the table holds the entries 2 to 7.
    for (index, entries) in [
        (EmbeddingIndex::Tokens, [Some(1), None, Some(0)]),
        (EmbeddingIndex::Positions(1), [None, Some(0), Some(1)]),
        (EmbeddingIndex::Constant(7), [Some(5); 3]),
    ] {
        let out = rig.poisoned::<f32>(3 * 64);
        let launch = embedding(
            (weights.matrix, 2),
            index,
            (tokens.at(), positions.at()),
            out.view(64, 0, 64),
            3,
        );
        run(&rig, &[launch]);
        for (got, entry) in out.read().chunks_exact(64).zip(entries) {
            match entry {
                Some(entry) => assert_eq!(got, &weights.values[entry * 64..][..64], "{index:?}"),
                None => assert!(got.iter().all(|v| v.is_nan()), "{index:?}"),
            }
        }
    }
}
