//! Linear maps that end in a gated activation.

use galerne_core::dtype::DType;
use galerne_core::graph::Activation;
use galerne_cuda_shim::Rig;
use galerne_kernels::conformance::Numbers;
use galerne_kernels::cuda::driver::DevicePtr;
use galerne_kernels::cuda::launch::linear::{Linear, Means, gated};
use galerne_kernels::cuda::weights::{Packing, WeightFormat};
use galerne_kernels::device::Precision;

use crate::activations::{ACTIVATIONS, activation};
use crate::maps::{MEANS, Weights, check_counters, run, view, workspace};

/// Checks `function(gate) * up` of one launch against f64, and that nothing beside it changed.
fn check_gated(rig: &Rig, weights: &Weights<'_>, function: Activation, rows: u32) {
    let (inner, half) = (weights.matrix.width, weights.matrix.rows / 2);
    let x = Numbers::new(11).normals((rows * inner) as usize, 1.0);
    let x_memory = rig.memory(&x);
    let bias: Vec<f32> = (0..2 * half).map(|c| c as f32 / 64.0 - 0.5).collect();
    let bias_memory = rig.memory(&bias);
    let (margin, stride) = (2, half + 4);
    let out = rig.poisoned::<f32>((rows * stride) as usize);
    let workspace = workspace(rig, weights.matrix, rows);
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
    check_counters(&workspace);
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
