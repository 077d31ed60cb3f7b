//! Linear maps by a library for products.

use galerne_core::dtype::DType;
use galerne_cuda_shim::Rig;
use galerne_kernels::conformance::Numbers;
use galerne_kernels::cuda::driver::{DevicePtr, Launch, Product, ProductElement, Products};
use galerne_kernels::cuda::launch::fp8_round::fp8_round;
use galerne_kernels::cuda::launch::linear::{Linear, Means, linear};
use galerne_kernels::cuda::launch::product::{WRITTEN_ROWS_MIN, written, written_fp8};
use galerne_kernels::cuda::weights::{Packing, WeightFormat};
use galerne_kernels::device::Precision;

use crate::maps::{Case, MEANS, Weights, check, run, view};

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
