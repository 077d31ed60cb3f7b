//! `elementwise.cu` on the CPU shim (or a GPU) against f64.
#![expect(unsafe_code, reason = "launches name raw memory")]

#[path = "support/activations.rs"]
mod activations;

use activations::{ACTIVATIONS, activation};
use galerne_cuda_shim::{Rig, numbers};
use galerne_kernels::cuda::launch::elementwise::{Elementwise, elementwise};

fn ops() -> Vec<Elementwise> {
    let mut ops = vec![
        Elementwise::Add,
        Elementwise::Mul,
        Elementwise::Scale(0.3),
        Elementwise::SoftCap(30.0),
    ];
    ops.extend(ACTIVATIONS.map(Elementwise::Activate));
    ops.extend(ACTIVATIONS.map(Elementwise::ActivateMul));
    ops
}

fn reference(op: Elementwise, a: f64, b: f64) -> f64 {
    match op {
        Elementwise::Add => a + b,
        Elementwise::Mul => a * b,
        Elementwise::Scale(factor) => a * f64::from(factor),
        Elementwise::SoftCap(cap) => f64::from(cap) * (a / f64::from(cap)).tanh(),
        Elementwise::Activate(function) => activation(function, a),
        Elementwise::ActivateMul(function) => activation(function, a) * b,
    }
}

/// Where the output goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Out {
    Apart,
    OverA,
    OverB,
}

fn check(op: Elementwise, (rows, width, margin): (u32, u32, u32), place: Out, seed: u64) {
    let rig = Rig::new(seed);
    let stride = width + 2 * margin;
    let count = (rows * stride) as usize;
    // Far into the tails of the functions, on both sides.
    let a: Vec<f32> = numbers(count, 1, 0.0).iter().map(|x| x * 9.0).collect();
    let b = numbers(count, 2, 0.5);
    let (a_memory, b_memory, out_memory) = (rig.memory(&a), rig.memory(&b), rig.poisoned::<f32>(count));
    let view = |memory: &galerne_cuda_shim::Memory<'_, f32>| memory.view(stride, margin, width);
    let target = match place {
        Out::Apart => &out_memory,
        Out::OverA => &a_memory,
        Out::OverB => &b_memory,
    };
    let launch = elementwise(op, view(&a_memory), view(&b_memory), view(target), rows);
    // SAFETY: all memory is of `rows` rows of `stride` numbers.
    unsafe { rig.enqueue(&[launch]) }.expect("it runs");
    let before = match place {
        Out::Apart => vec![f32::NAN; count],
        Out::OverA => a.clone(),
        Out::OverB => b.clone(),
    };
    for (i, got) in target.read().into_iter().enumerate() {
        let column = i as u32 % stride;
        if column < margin || column >= margin + width {
            assert!(
                got.to_bits() == before[i].to_bits() || got.is_nan() && before[i].is_nan(),
                "{op:?} wrote outside its columns at {i}"
            );
            continue;
        }
        let expected = reference(op, f64::from(a[i]), f64::from(b[i]));
        // A few roundings of 2^-24 each, and the exponential's argument is rounded relative to its size of up to 30.
        let tolerance = 3e-6 * expected.abs() + 1e-9;
        assert!(
            (f64::from(got) - expected).abs() <= tolerance,
            "{op:?} {place:?} at {i}: expected {expected}, got {got} (a {}, b {})",
            a[i],
            b[i]
        );
    }
}

#[test]
fn functions_are_those_of_the_reference() {
    for (seed, op) in (0..).zip(ops()) {
        check(op, (3, 37, 1), Out::Apart, seed);
        check(op, (2, 64, 4), Out::Apart, seed);
        check(op, (2, 64, 4), Out::OverA, seed);
        check(op, (5, 1, 3), Out::OverB, seed);
        check(op, (0, 64, 0), Out::Apart, seed);
        check(op, (3, 0, 4), Out::Apart, seed);
    }
}

#[test]
fn a_thread_takes_several_vectors_of_a_large_matrix() {
    // More than 1,024 blocks of 256 threads: aligned, and one column off.
    check(Elementwise::Add, (260, 4_100, 0), Out::OverB, 1);
    check(Elementwise::Add, (270, 1_001, 1), Out::OverA, 2);
}

#[test]
fn extremes_stay_numbers() {
    let rig = Rig::new(0);
    let x = [-1e30_f32, -100.0, -88.8, 0.0, 88.8, 100.0, 1e10, 3e38];
    for function in ACTIVATIONS {
        let (input, out) = (rig.memory(&x), rig.poisoned::<f32>(8));
        let (a, b) = (input.view(8, 0, 8), out.view(8, 0, 8));
        let launch = elementwise(Elementwise::Activate(function), a, b, b, 1);
        // SAFETY: one row of eight numbers.
        unsafe { rig.enqueue(&[launch]) }.expect("it runs");
        for (x, got) in x.iter().zip(out.read()) {
            assert!(!got.is_nan(), "{function:?} of {x}");
        }
    }
}
