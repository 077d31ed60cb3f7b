//! `norm.cu` on the CPU shim (or a GPU) against f64.
#![expect(unsafe_code, reason = "launches name raw memory")]

use galerne_cuda_shim::{Rig, numbers};
use galerne_kernels::cuda::driver::{DevicePtr, DeviceView};
use galerne_kernels::cuda::launch::norm::{Kind, l2_normalise, norm};

#[derive(Clone, Copy, PartialEq)]
enum Which {
    Rms,
    Layer,
    L2,
}

#[derive(Clone, Copy)]
struct Case {
    rows: u32,
    group: u32,
    groups: u32,
    /// Columns before and after the view in its buffer.
    margin: u32,
    which: Which,
    with_delta: bool,
    in_place: bool,
}

fn normalised(which: Which, x: &[f64], weight: &[f32], bias: &[f32]) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = match which {
        Which::Layer => x.iter().sum::<f64>() / n,
        Which::Rms | Which::L2 => 0.0,
    };
    let squares = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
    let factor = match which {
        Which::L2 => 1.0 / squares.sqrt().max(1e-12),
        Which::Rms | Which::Layer => 1.0 / (squares / n + 1e-5).sqrt(),
    };
    let end = |(i, x): (usize, &f64)| {
        let weight = f64::from(weight[i]);
        match which {
            Which::Rms => x * factor * (weight + 1.0),
            Which::Layer => (x - mean) * factor * weight + f64::from(bias[i]),
            Which::L2 => x * factor,
        }
    };
    x.iter().enumerate().map(end).collect()
}

fn check(case: Case, seed: u64) {
    let rig = Rig::new(seed);
    let (width, rows) = (case.group * case.groups, case.rows);
    let stride = width + 2 * case.margin;
    let count = (rows * stride) as usize;
    let before = numbers(count, 1, 0.5);
    let (x, delta) = (rig.memory(&before), numbers(count, 2, 0.0));
    let delta_memory = rig.memory(&delta);
    let out = rig.poisoned::<f32>(count);
    let (weight, bias) = (
        numbers(case.group as usize, 3, 0.0),
        numbers(case.group as usize, 4, 0.0),
    );
    let (weight_memory, bias_memory) = (rig.memory(&weight), rig.memory(&bias));
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
    let views = (x_view, delta_view, out_view);
    let of_kind = |kind| norm(kind, views, weight_memory.at(), (rows, case.group), 1e-5);
    let launch = match case.which {
        Which::Rms => of_kind(Kind::Rms { weight_offset: 1.0 }),
        Which::Layer => of_kind(Kind::Layer {
            bias: bias_memory.at(),
        }),
        Which::L2 => l2_normalise(x_view, out_view, (rows, case.group)),
    };
    // SAFETY: all memory is of `rows` rows of `stride` numbers.
    unsafe { rig.enqueue(&[launch]) }.expect("it runs");
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
            for (i, expected) in normalised(case.which, group, &weight, &bias)
                .into_iter()
                .enumerate()
            {
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
        (3, 512, 3, 0),
        (5, 4, 3, 4),
        (2, 63, 3, 1),
        (1, 1, 5, 0),
        (1, 4_096, 1, 4),
        (1, 5_003, 1, 3),
        (1, 16_384, 1, 0),
        (0, 64, 2, 0),
    ] {
        for flags in 0..12_u32 {
            seed += 1;
            let which = [Which::Rms, Which::Layer, Which::L2][flags as usize / 4];
            let case = Case {
                rows,
                group,
                groups,
                margin,
                which,
                with_delta: flags & 1 != 0 && which != Which::L2,
                in_place: flags & 2 != 0,
            };
            check(case, seed);
        }
    }
}

#[test]
fn a_layer_norm_may_have_no_bias() {
    let rig = Rig::new(0);
    let (x, weight) = (rig.memory(&[1.0_f32, 3.0]), rig.memory(&[1.0_f32, 1.0]));
    let view = x.view(2, 0, 2);
    let kind = Kind::Layer {
        bias: DevicePtr::NULL,
    };
    let launch = norm(kind, (view, DeviceView::NONE, view), weight.at(), (1, 2), 0.0);
    // SAFETY: one row of two numbers.
    unsafe { rig.enqueue(&[launch]) }.expect("it runs");
    assert_eq!(x.read(), [-1.0, 1.0]);
}

#[test]
fn a_weight_may_begin_anywhere() {
    let rig = Rig::new(0);
    let x = rig.memory(&[3.0_f32; 8]);
    let weights = rig.memory(&[9.0_f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let view = x.view(8, 0, 8);
    let kind = Kind::Rms { weight_offset: 0.0 };
    let launch = norm(
        kind,
        (view, DeviceView::NONE, view),
        weights.at().offset(4),
        (1, 8),
        0.0,
    );
    // SAFETY: one row of eight numbers, and as many weights from the second on.
    unsafe { rig.enqueue(&[launch]) }.expect("it runs");
    for (expected, got) in (1..).zip(x.read()) {
        assert!(
            (got - expected as f32).abs() < 1e-5,
            "expected {expected}, got {got}"
        );
    }
}

#[test]
fn nothing_has_length_0_and_stays() {
    let rig = Rig::new(0);
    let x = rig.memory(&[0.0_f32; 8]);
    let launches = [0, 5].map(|start| l2_normalise(x.view(8, start, 3), x.view(8, start, 3), (1, 3)));
    // SAFETY: one row of eight numbers.
    unsafe { rig.enqueue(&launches) }.expect("it runs");
    assert_eq!(x.read(), [0.0; 8]);
}
