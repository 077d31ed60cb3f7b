//! The shim's narrow floats against the `half` crate and the format's definition, and its mma against plain sums.
#![expect(unsafe_code, reason = "launches name raw memory")]

use bytemuck::{Pod, Zeroable};
use galerne_cuda_shim::Shim;
use galerne_kernels::cuda::driver::{DevicePtr, Driver, Launch};
use half::{bf16, f16};

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TestParams {
    input: DevicePtr,
    out: DevicePtr,
    mode: u32,
    count: u32,
}

fn run(shim: &Shim, kernel: &'static str, params: TestParams) {
    let launch = Launch::new(kernel, [1, 1, 1], 32, 768, &params);
    // SAFETY: the tests' memory is as large as the kernels' comments say.
    unsafe { shim.enqueue(&[launch]) }.expect("it runs");
}

fn convert<A: Pod, B: Pod>(mode: u32, numbers: &[A]) -> Vec<B> {
    let shim = Shim::new(0);
    let (input, out) = (shim.memory(numbers), shim.poisoned::<B>(numbers.len()));
    let params = TestParams {
        input: input.at(),
        out: out.at(),
        mode,
        count: u32::try_from(numbers.len()).expect("few"),
    };
    run(&shim, "test_convert", params);
    out.read()
}

/// Numbers of every size and kind: all upper halves of f32, with lower halves at and beside ties, and random ones.
fn wide_numbers() -> Vec<f32> {
    let mut random = 1_u32;
    let mut numbers = Vec::new();
    for upper in 0..=u32::from(u16::MAX) {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        for lower in [0, 0x7fff, 0x8000, 0x8001, random >> 16] {
            numbers.push(f32::from_bits(upper << 16 | lower));
        }
    }
    numbers
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[test]
fn widening_is_exact_for_every_pattern() {
    let patterns: Vec<u16> = (0..=u16::MAX).collect();
    for (bits, got) in patterns.iter().zip(convert::<u16, f32>(3, &patterns)) {
        assert!(
            same(got, bf16::from_bits(*bits).to_f32()),
            "bf16 {bits:#x}: {got}"
        );
    }
    for (bits, got) in patterns.iter().zip(convert::<u16, f32>(4, &patterns)) {
        assert!(same(got, f16::from_bits(*bits).to_f32()), "f16 {bits:#x}: {got}");
    }
    for (bits, got) in patterns[..256]
        .iter()
        .zip(convert::<u16, f32>(5, &patterns[..256]))
    {
        assert!(same(got, fp8(*bits)), "fp8 {bits:#x}: {got}");
    }
}

#[test]
fn narrowing_rounds_to_nearest_even() {
    let numbers = wide_numbers();
    for (x, got) in numbers.iter().zip(convert::<f32, u16>(0, &numbers)) {
        let got = bf16::from_bits(got);
        assert!(
            same(got.to_f32(), bf16::from_f32(*x).to_f32()),
            "bf16 of {x:e}: {got}"
        );
    }
    for (x, got) in numbers.iter().zip(convert::<f32, u16>(1, &numbers)) {
        // As fmaxf and fminf, which prefer a number to NaN.
        let bounded = if x.is_nan() {
            -65_504.0
        } else {
            x.clamp(-65_504.0, 65_504.0)
        };
        let got = f16::from_bits(got);
        assert!(
            same(got.to_f32(), f16::from_f32(bounded).to_f32()),
            "f16 of {x:e}: {got}"
        );
    }
    for (x, got) in numbers.iter().zip(convert::<f32, u16>(2, &numbers)) {
        assert_eq!(got, nearest_fp8(*x), "fp8 of {x:e}");
    }
}

/// e4m3 without infinities, by its definition.
fn fp8(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2_f32.powi(-9),
        _ => (8.0 + fraction) * 2_f32.powi(exponent - 10),
    };
    if bits & 128 == 0 { magnitude } else { -magnitude }
}

/// The nearest by looking at all; of two as near the even one. Too large ones become the largest.
fn nearest_fp8(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7f;
    }
    let sign = u16::from(x.is_sign_negative()) << 7;
    let distance = |code: u16| (f64::from(x.abs().min(448.0)) - f64::from(fp8(code))).abs();
    let nearest = (0..0x7f).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1))));
    sign | nearest.expect("there are codes")
}

#[test]
fn mma_is_the_product_of_its_matrices() {
    // Small integers: products and sums are exact in every format, so a wrong place shows as a wrong number.
    let number = |i: usize| ((i * 37 + i / 7) % 17) as f32 - 8.0;
    let (a, b): (Vec<f32>, Vec<f32>) = ((0..256).map(number).collect(), (300..428).map(number).collect());
    let before: Vec<f32> = (0..128).map(|i| i as f32).collect();
    for (mode, transposed) in [(0, false), (0, true), (1, false), (1, true)] {
        let bits = |x: &f32| match mode {
            0 => bf16::from_f32(*x).to_bits(),
            _ => f16::from_f32(*x).to_bits(),
        };
        let shim = Shim::new(7);
        let input: Vec<u16> = a.iter().chain(&b).map(bits).collect();
        let (input, out) = (shim.memory(&input), shim.memory(&before));
        let params = TestParams {
            input: input.at(),
            out: out.at(),
            mode,
            count: u32::from(transposed),
        };
        run(&shim, "test_mma", params);
        let of_b = |k: usize, column: usize| {
            if transposed {
                b[k * 8 + column]
            } else {
                b[column * 16 + k]
            }
        };
        let expected: Vec<f32> = (0..128)
            .map(|i| {
                let (row, column) = (i / 8, i % 8);
                before[i] + (0..16).map(|k| a[row * 16 + k] * of_b(k, column)).sum::<f32>()
            })
            .collect();
        assert_eq!(out.read(), expected, "mode {mode}, transposed {transposed}");
    }
}
