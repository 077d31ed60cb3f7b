//! Mixtures of experts on the CPU shim (or a GPU) against f64: every normalisation, with and without a shared expert, padding, and
//! more rows than go together.
#![expect(unsafe_code, reason = "launches name raw memory")]

use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, RouterNormalisation};
use galerne_cuda_shim::{Memory, Rig};
use galerne_kernels::conformance::Numbers;
use galerne_kernels::cuda::driver::{DevicePtr, Products};
use galerne_kernels::cuda::launch::linear::Means;
use galerne_kernels::cuda::launch::mixture::{ExpertTable, Mixture, SharedExpert, mixture, workspace_bytes};
use galerne_kernels::cuda::weights::{DeviceMatrix, Packing};
use galerne_kernels::device::Precision;
use galerne_kernels::quant;

const WIDTH: u32 = 64;

/// A matrix on the device, and its numbers.
struct Weights<'a> {
    values: Vec<f64>,
    matrix: DeviceMatrix,
    _memory: Memory<'a, u8>,
}

fn weights<'a>(rig: &'a Rig, dtype: DType, (rows, width): (u32, u32), seed: u64) -> Weights<'a> {
    let normals = Numbers::new(seed).normals((rows * width) as usize, (width as f32).powf(-0.5));
    let stored = quant::quantize(dtype, &normals);
    let mut values = vec![0.0; normals.len()];
    quant::dequantize(dtype, &stored, &mut values);
    let packing = Packing::new(dtype, rows, width);
    let mut bytes = vec![0; packing.bytes()];
    let row_bytes = dtype.row_bytes(width as usize).expect("whole blocks");
    for (row, stored) in stored.chunks_exact(row_bytes).enumerate() {
        packing.pack_row(row as u32, dtype, stored, &mut bytes);
    }
    let memory = rig.memory(&bytes);
    Weights {
        values: values.into_iter().map(f64::from).collect(),
        matrix: packing.matrix(memory.at()),
        _memory: memory,
    }
}

impl Weights<'_> {
    fn times(&self, x: &[f64]) -> Vec<f64> {
        self.values
            .chunks_exact(x.len())
            .map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
            .collect()
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn feed_forward(x: &[f64], gate_up: &Weights<'_>, down: &Weights<'_>) -> Vec<f64> {
    let both = gate_up.times(x);
    let (gate, up) = both.split_at(both.len() / 2);
    let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g * sigmoid(*g) * u).collect();
    down.times(&inner)
}

#[derive(Debug, Clone, Copy)]
struct Case {
    rows: u32,
    experts: u32,
    ffn: u32,
    top_k: u32,
    normalisation: RouterNormalisation,
    dtype: DType,
    is_shared: bool,
    is_gated: bool,
    /// Every third row is only padding.
    is_padded: bool,
    precision: Precision,
}

struct Model<'a> {
    router: Weights<'a>,
    experts: Vec<(Weights<'a>, Weights<'a>)>,
    shared: (Weights<'a>, Weights<'a>),
    gate: Weights<'a>,
}

impl Model<'_> {
    fn row(&self, case: &Case, x: &[f64], is_padding: bool) -> Vec<f64> {
        let scores = self.router.times(x);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(case.top_k as usize);
        let weight = |e: usize| match case.normalisation {
            RouterNormalisation::SigmoidChosen => sigmoid(scores[e]),
            _ => scores[e].exp(),
        };
        let total: f64 = match case.normalisation {
            RouterNormalisation::SoftmaxAll => (0..scores.len()).map(weight).sum(),
            _ => order.iter().map(|&e| weight(e)).sum(),
        };
        let mut out = vec![0.0; x.len()];
        let mut add =
            |factor: f64, y: Vec<f64>| out.iter_mut().zip(y).for_each(|(out, y)| *out += factor * y);
        for &e in order.iter().filter(|_| !is_padding) {
            let (gate_up, down) = &self.experts[e];
            add(weight(e) / total, feed_forward(x, gate_up, down));
        }
        if case.is_shared {
            let factor = if case.is_gated {
                sigmoid(self.gate.times(x)[0])
            } else {
                1.0
            };
            add(factor, feed_forward(x, &self.shared.0, &self.shared.1));
        }
        out
    }
}

fn model<'a>(rig: &'a Rig, case: &Case) -> Model<'a> {
    let expert = |seed: u64| {
        (
            weights(rig, case.dtype, (2 * case.ffn, WIDTH), seed),
            weights(rig, case.dtype, (WIDTH, case.ffn), seed + 1),
        )
    };
    Model {
        router: weights(rig, DType::F32, (case.experts, WIDTH), 1),
        experts: (0..case.experts).map(|e| expert(10 + 2 * u64::from(e))).collect(),
        shared: expert(5),
        gate: weights(rig, DType::F32, (1, WIDTH), 3),
    }
}

fn check(case: Case, seed: u64) {
    let rig = Rig::new(seed);
    let model = model(&rig, &case);
    let addresses = |matrix: fn(&(Weights<'_>, Weights<'_>)) -> DeviceMatrix| {
        let all: Vec<u64> = model.experts.iter().map(|expert| matrix(expert).at.0).collect();
        rig.memory(&all)
    };
    let (gate_up, down) = (addresses(|e| e.0.matrix), addresses(|e| e.1.matrix));
    let table = |addresses: &Memory<'_, u64>, matrix: DeviceMatrix| ExpertTable {
        addresses: addresses.at(),
        matrix: DeviceMatrix {
            at: DevicePtr::NULL,
            ..matrix
        },
        count: case.experts,
    };
    let spec = Mixture {
        router: model.router.matrix,
        gate_up: table(&gate_up, model.experts[0].0.matrix),
        down: table(&down, model.experts[0].1.matrix),
        top_k: case.top_k,
        normalisation: case.normalisation,
        function: Activation::Silu,
        shared: case.is_shared.then(|| SharedExpert {
            gate_up: model.shared.0.matrix,
            down: model.shared.1.matrix,
            gate: case.is_gated.then_some(model.gate.matrix),
        }),
    };
    let x = Numbers::new(99).normals((case.rows * WIDTH) as usize, 1.0);
    let is_padding = |row: usize| case.is_padded && row % 3 == 2;
    let sequences: Vec<u32> = (0..case.rows as usize)
        .map(|row| if is_padding(row) { u32::MAX } else { 0 })
        .collect();
    let (x_memory, sequences) = (rig.memory(&x), rig.memory(&sequences));
    let out = rig.poisoned::<f32>((case.rows * WIDTH) as usize);
    let mut zeroed = vec![0xff_u8; workspace_bytes(&spec, case.rows)];
    zeroed[..1_056].fill(0);
    let workspace = rig.memory(&zeroed);
    let views = (x_memory.view(WIDTH, 0, WIDTH), out.view(WIDTH, 0, WIDTH));
    let launches = mixture(
        &spec,
        views,
        (case.rows, sequences.at()),
        Means {
            precision: case.precision,
            products: Products::None,
            has_tensor_memory: false,
        },
        workspace.at(),
    );
    // SAFETY: all memory is as large as the launches say.
    unsafe { rig.enqueue(&launches) }.expect("it runs");
    // As in the conformance suite: three maps in a row, in f32 or with factors of 8 bits.
    let tolerance = match case.precision {
        Precision::F32 => 1e-5,
        Precision::Auto => 3e-2,
    };
    for (row, got) in out.read().chunks_exact(WIDTH as usize).enumerate() {
        let x: Vec<f64> = x[row * WIDTH as usize..][..WIDTH as usize]
            .iter()
            .map(|x| f64::from(*x))
            .collect();
        for (column, expected) in model.row(&case, &x, is_padding(row)).into_iter().enumerate() {
            let difference = (f64::from(got[column]) - expected).abs();
            assert!(
                difference <= tolerance * expected.abs().max(1.0),
                "{case:?} [{row}, {column}]: expected {expected}, got {}",
                got[column]
            );
        }
    }
}

const CASE: Case = Case {
    rows: 5,
    experts: 6,
    ffn: 32,
    top_k: 2,
    normalisation: RouterNormalisation::SoftmaxChosen,
    dtype: DType::Q4_1,
    is_shared: false,
    is_gated: false,
    is_padded: false,
    precision: Precision::F32,
};

#[test]
fn every_normalisation_with_and_without_a_shared_expert() {
    let mut seed = 0;
    for normalisation in [
        RouterNormalisation::SoftmaxAll,
        RouterNormalisation::SoftmaxChosen,
        RouterNormalisation::SigmoidChosen,
    ] {
        for (is_shared, is_gated) in [(false, false), (true, false), (true, true)] {
            for (dtype, precision) in [
                (DType::F32, Precision::F32),
                (DType::Q4_1, Precision::F32),
                (DType::F32, Precision::Auto),
                (DType::Q4_1, Precision::Auto),
            ] {
                seed += 1;
                let case = Case {
                    normalisation,
                    dtype,
                    is_shared,
                    is_gated,
                    precision,
                    ..CASE
                };
                check(case, seed);
            }
        }
    }
}

#[test]
fn one_row_and_more_rows_than_go_together() {
    for (seed, (rows, experts, top_k)) in [(1, 40, 8), (90, 3, 2), (70, 2, 2), (20, 1, 1), (0, 6, 2)]
        .into_iter()
        .enumerate()
    {
        for precision in [Precision::F32, Precision::Auto] {
            let case = Case {
                rows,
                experts,
                top_k,
                dtype: DType::Q8_0,
                precision,
                ..CASE
            };
            check(case, seed as u64);
        }
    }
}

#[test]
fn padding_goes_through_no_expert() {
    for precision in [Precision::F32, Precision::Auto] {
        for is_shared in [false, true] {
            let case = Case {
                rows: 17,
                is_padded: true,
                is_shared,
                precision,
                ..CASE
            };
            check(case, 8);
        }
    }
}

#[test]
fn experts_whose_gates_do_not_end_with_a_panel() {
    let case = Case {
        ffn: 40,
        dtype: DType::Bf16,
        is_shared: true,
        precision: Precision::Auto,
        ..CASE
    };
    check(case, 9);
}
