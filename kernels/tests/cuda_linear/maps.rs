//! Matrices with their numbers, and linear maps by them against f64.

use galerne_core::dtype::DType;
use galerne_core::graph::EmbeddingIndex;
use galerne_cuda_shim::{Memory, Rig};
use galerne_kernels::conformance::Numbers;
use galerne_kernels::cuda::driver::{DevicePtr, DeviceView, Launch, Products};
use galerne_kernels::cuda::launch::embedding::embedding;
use galerne_kernels::cuda::launch::linear::{Linear, Means, linear, workspace_bytes};
use galerne_kernels::cuda::weights::{DeviceMatrix, Packing, WeightFormat};
use galerne_kernels::device::Precision;
use galerne_kernels::program::{BufferId, View};
use galerne_kernels::quant;

/// Our own kernels.
pub(crate) const MEANS: Means = Means {
    precision: Precision::Auto,
    products: Products::None,
    has_tensor_memory: false,
};

/// A matrix and its numbers.
pub(crate) struct Weights<'a> {
    pub(crate) values: Vec<f32>,
    pub(crate) matrix: DeviceMatrix,
    _memory: Memory<'a, u8>,
}

impl<'a> Weights<'a> {
    pub(crate) fn stored(rig: &'a Rig, dtype: DType, rows: u32, width: u32) -> Self {
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
    pub(crate) fn quantized(rig: &'a Rig, format: WeightFormat, rows: u32, width: u32) -> Self {
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

    pub(crate) fn packed(rig: &'a Rig, packing: &Packing, bytes: &[u8], values: Vec<f32>) -> Self {
        let memory = rig.memory(bytes);
        Self {
            values,
            matrix: packing.matrix(memory.at()),
            _memory: memory,
        }
    }
}

pub(crate) fn run(rig: &Rig, launches: &[Launch]) {
    // SAFETY: every test makes memory as large as its launches say.
    unsafe { rig.enqueue(launches) }.expect("it runs");
}

/// All rows of a table.
pub(crate) fn looked_up(rig: &Rig, table: DeviceMatrix) -> Vec<f32> {
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
pub(crate) struct Case {
    pub(crate) rows: u32,
    pub(crate) margin: u32,
    pub(crate) bias: bool,
    pub(crate) accumulate: bool,
    pub(crate) precision: Precision,
}

/// Bytes of counters.
const COUNTERS: usize = 1_056;

/// A workspace for maps of so many rows: counters of 0, and any content.
pub(crate) fn workspace(rig: &Rig, matrix: DeviceMatrix, rows: u32) -> Memory<'_, u8> {
    let mut bytes = vec![0xff_u8; workspace_bytes(&matrix, rows)];
    bytes[..COUNTERS].fill(0);
    rig.memory(&bytes)
}

pub(crate) fn check_counters(workspace: &Memory<'_, u8>) {
    let counters = &workspace.read()[..COUNTERS];
    assert_eq!(counters, [0; COUNTERS], "the counters are left as they were");
}

/// The output rows, after checking that nothing beside them changed.
pub(crate) fn mapped(rig: &Rig, weights: &Weights<'_>, x: &[f32], case: Case) -> Vec<f32> {
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
    let workspace = workspace(rig, weights.matrix, rows);
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
    check_counters(&workspace);
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

pub(crate) fn check(weights: &Weights<'_>, rig: &Rig, case: Case) {
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

/// Rows of 128 numbers, of which these are the columns from number `start` of a region on.
pub(crate) fn view(start: u32, width: u32) -> DeviceView {
    let view = View {
        buffer: BufferId(0),
        start,
        width,
    };
    DeviceView::new(DevicePtr(1 << 16), 128, view)
}
