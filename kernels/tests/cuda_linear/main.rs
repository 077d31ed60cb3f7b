//! Linear maps, embeddings and dequantization on the CPU shim (or a GPU), in every weight format, against f64.
#![expect(unsafe_code, reason = "launches name raw memory")]

#[path = "../support/activations.rs"]
mod activations;
mod gated;
mod maps;
mod products;

use galerne_core::dtype::DType;
use galerne_core::graph::EmbeddingIndex;
use galerne_cuda_shim::Rig;
use galerne_kernels::conformance::Numbers;
use galerne_kernels::cuda::driver::{DevicePtr, Products};
use galerne_kernels::cuda::launch::dequantize::dequantize;
use galerne_kernels::cuda::launch::embedding::embedding;
use galerne_kernels::cuda::launch::linear::{Linear, Means, linear};
use galerne_kernels::cuda::weights::{Packing, WeightFormat};
use galerne_kernels::device::Precision;
use maps::{Case, Weights, check, looked_up, mapped, run, view};

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
