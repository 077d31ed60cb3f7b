//! `norm.cu` on the CPU shim against f64.
#![expect(unsafe_code, reason = "launches name raw memory")]

use galerne_cuda_shim::Shim;
use galerne_kernels::cuda::driver::{DevicePtr, DeviceView, Driver};
use galerne_kernels::cuda::launch::norm::{Kind, norm};

/// Numbers around `mean`, different for each seed.
fn numbers(count: usize, seed: u32, mean: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0 + mean
    };
    (0..count).map(|_| next()).collect()
}

#[derive(Clone, Copy)]
struct Case {
    rows: u32,
    group: u32,
    groups: u32,
    /// Columns before and after the view in its buffer.
    margin: u32,
    layer: bool,
    with_delta: bool,
    in_place: bool,
}

fn normalised(case: &Case, x: &[f64], weight: &[f32], bias: &[f32]) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = if case.layer {
        x.iter().sum::<f64>() / n
    } else {
        0.0
    };
    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let factor = 1.0 / (square + 1e-5).sqrt();
    let end = |(i, x): (usize, &f64)| {
        let weight = f64::from(weight[i]);
        if case.layer {
            (x - mean) * factor * weight + f64::from(bias[i])
        } else {
            x * factor * (weight + 1.0)
        }
    };
    x.iter().enumerate().map(end).collect()
}

fn check(case: Case, seed: u64) {
    let shim = Shim::new(seed);
    let (width, rows) = (case.group * case.groups, case.rows);
    let stride = width + 2 * case.margin;
    let count = (rows * stride) as usize;
    let before = numbers(count, 1, 0.5);
    let (x, delta) = (shim.memory(&before), numbers(count, 2, 0.0));
    let delta_memory = shim.memory(&delta);
    let out = shim.poisoned::<f32>(count);
    let (weight, bias) = (
        numbers(case.group as usize, 3, 0.0),
        numbers(case.group as usize, 4, 0.0),
    );
    let (weight_memory, bias_memory) = (shim.memory(&weight), shim.memory(&bias));
    let kind = if case.layer {
        Kind::Layer {
            bias: bias_memory.at(),
        }
    } else {
        Kind::Rms { weight_offset: 1.0 }
    };
    let x_view = x.view(stride, case.margin, width);
    let delta_view = if case.with_delta {
        delta_memory.view(stride, case.margin, width)
    } else {
        DeviceView::NONE
    };
    let out_view = if case.in_place {
        x_view
    } else {
        out.view(stride, case.margin, width)
    };
    let launch = norm(
        kind,
        (x_view, delta_view, out_view),
        weight_memory.at(),
        (rows, case.group),
        1e-5,
    );
    // SAFETY: all memory is of `rows` rows of `stride` numbers.
    unsafe { shim.enqueue(&[launch]) }.expect("it runs");
    let (x, out) = (x.read(), out.read());
    let out = if case.in_place { &x } else { &out };
    for row in 0..rows as usize {
        let columns = row * stride as usize + case.margin as usize..;
        let columns = columns.start..columns.start + width as usize;
        let sums: Vec<f32> = columns
            .clone()
            .map(|i| before[i] + if case.with_delta { delta[i] } else { 0.0 })
            .collect();
        if !case.in_place {
            assert_eq!(x[columns.clone()], sums, "the residual of row {row}");
        }
        let sums: Vec<f64> = sums.into_iter().map(f64::from).collect();
        for (g, group) in sums.chunks(case.group as usize).enumerate() {
            for (i, expected) in normalised(&case, group, &weight, &bias).into_iter().enumerate() {
                let got = f64::from(out[columns.start + g * case.group as usize + i]);
                // f32 has 24 bits, and the sum over the group loses a few.
                let tolerance = 4e-6 * (1.0 + expected.abs());
                assert!(
                    (got - expected).abs() < tolerance,
                    "row {row} group {g} column {i}: expected {expected}, got {got}"
                );
            }
        }
    }
    let margins = (0..count).filter(|i| {
        let column = *i as u32 % stride;
        column < case.margin || column >= case.margin + width
    });
    for i in margins {
        assert!(
            if case.in_place {
                out[i] == before[i]
            } else {
                out[i].is_nan() && x[i] == before[i]
            },
            "wrote outside its columns at {i}"
        );
    }
}

#[test]
fn norms_are_those_of_the_reference() {
    let mut seed = 0;
    for (rows, group, groups, margin) in [
        (3, 576, 1, 0),
        (2, 64, 9, 4),
        (2, 63, 3, 1),
        (1, 1, 5, 0),
        (1, 4_096, 1, 4),
        (1, 5_003, 1, 3),
        (1, 16_384, 1, 0),
        (0, 64, 2, 0),
    ] {
        for flags in 0..8_u32 {
            seed += 1;
            let case = Case {
                rows,
                group,
                groups,
                margin,
                layer: flags & 1 != 0,
                with_delta: flags & 2 != 0,
                in_place: flags & 4 != 0,
            };
            check(case, seed);
        }
    }
}

#[test]
fn a_layer_norm_may_have_no_bias() {
    let shim = Shim::new(0);
    let (x, weight) = (shim.memory(&[1.0_f32, 3.0]), shim.memory(&[1.0_f32, 1.0]));
    let view = x.view(2, 0, 2);
    let kind = Kind::Layer {
        bias: DevicePtr::NULL,
    };
    let launch = norm(kind, (view, DeviceView::NONE, view), weight.at(), (1, 2), 0.0);
    // SAFETY: one row of two numbers.
    unsafe { shim.enqueue(&[launch]) }.expect("it runs");
    assert_eq!(x.read(), [-1.0, 1.0]);
}
