//! Weights rounded while they are loaded, against a reference whose weights are rounded already: what the rounding itself costs
//! is not looked at. A device that does not implement it says so, and passes.

use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, RouterNormalisation, Rows};
use galerne_core::weights::WeightSource;

use super::{BLOCK_TOKENS, Bench, Build, Case, ConformanceError, MemoryWeights, batch};
use crate::cuda::weights::{Packing, WeightFormat};
use crate::device::{DeviceError, Quantization};
use crate::program::{ExpertSpec, Instr, MixtureSpec, Program};
use crate::quant;
use crate::stored::Uses;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "weights rounded to fp8",
        run: |bench| cases(bench, Quantization::Fp8),
    },
    Case {
        name: "weights rounded to fp8, many rows' activations too",
        run: |bench| cases(bench, Quantization::Fp8W8A8),
    },
    Case {
        name: "weights rounded to int4",
        run: |bench| cases(bench, Quantization::Int4),
    },
    Case {
        name: "weights rounded to nvfp4",
        run: |bench| cases(bench, Quantization::Nvfp4),
    },
];

/// A program's weights as a [`Quantization`] rounds them, those in f32; the others as they are. Tensors that cannot be read are
/// left out.
#[must_use]
pub fn rounded(program: &Program, source: &dyn WeightSource, quantization: Quantization) -> MemoryWeights {
    let mut weights = MemoryWeights::default();
    for (spec, used) in program.weights.iter().zip(Uses::of(program).weights) {
        for name in &spec.parts {
            let Ok(Some(view)) = source.weight(name) else {
                continue;
            };
            let format = WeightFormat::loaded(view.dtype, Some(quantization));
            if !used.is_quantizable() || format == WeightFormat::of(view.dtype) {
                weights.insert_bytes(name, view.dtype, view.shape, view.bytes.into_owned());
                continue;
            }
            let mut values = vec![0.0; view.shape.iter().product::<u64>() as usize];
            quant::dequantize(view.dtype, &view.bytes, &mut values);
            let packing = Packing::with_format(format, 1, spec.width);
            for row in values.chunks_exact_mut(spec.width as usize) {
                let rounded = packing.rounded_row(row);
                row.copy_from_slice(&rounded);
            }
            weights.insert(name, DType::F32, view.shape, &values);
        }
    }
    weights
}

fn cases(bench: &Bench<'_>, quantization: Quantization) -> Result<(), ConformanceError> {
    let bench = Bench {
        quantization: Some(quantization),
        ..*bench
    };
    let build = Build::transformer(DType::Bf16, 2, 6);
    let loaded = bench.load(&build, BLOCK_TOKENS);
    if let Err(ConformanceError::Device {
        source: DeviceError::Unsupported { .. },
        ..
    }) = loaded
    {
        return Ok(());
    }
    loaded?;
    linear(&bench)?;
    experts(&bench)?;
    let steps = [
        batch(&[(0, 70), (0, 3)], BLOCK_TOKENS, 1),
        batch(&[(70, 1), (3, 1)], BLOCK_TOKENS, 2),
    ];
    bench.compare("a model", &build, &steps, (2e-5, 5e-2), BLOCK_TOKENS)
}

/// Every dtype that is rounded, and one among them that stays as stored.
fn linear(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let plain = [(DType::Bf16, 33), (DType::F16, 3), (DType::F32, 16)];
    let mixed = [(DType::F32, 20), (DType::Q8_0, 40), (DType::Bf16, 16)];
    for (parts, inner) in [(plain, 200), (plain, 7), (mixed, 320)] {
        let outer = parts.iter().map(|(_, rows)| rows).sum();
        let mut b = Build::new(u64::from(inner));
        let out = b.buffer(Rows::Tokens, outer);
        b.input_into(out);
        let x = b.input(inner);
        let weight = b.parts(&parts, inner);
        let bias = Some(b.vector(outer));
        b.push(Instr::Linear {
            x,
            weight,
            bias,
            accumulate: true,
            out,
        });
        b.program.output = out;
        for rows in [1, 9, 70] {
            let what = format!("{rows} rows of {inner} to {outer}");
            let steps = [batch(&[(0, rows)], BLOCK_TOKENS, 4)];
            bench.compare(&what, &b, &steps, (4e-6, 1.5e-2), BLOCK_TOKENS)?;
        }
    }
    Ok(())
}

fn experts(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut b = Build::new(12);
    let x = b.input(64);
    let expert = |b: &mut Build| ExpertSpec {
        gate_up: b.parts(&[(DType::Bf16, 40), (DType::Bf16, 40)], 64),
        down: b.matrix(DType::Bf16, 64, 40),
    };
    let mixture = MixtureSpec {
        router: b.matrix(DType::Bf16, 6, 64),
        experts: (0..6).map(|_| expert(&mut b)).collect(),
        top_k: 2,
        normalisation: RouterNormalisation::SoftmaxAll,
        function: Activation::Silu,
        shared: Some(expert(&mut b)),
        shared_gate: Some(b.matrix(DType::Bf16, 1, 64)),
    };
    let out = b.buffer(Rows::Tokens, 64);
    b.push(Instr::Mixture {
        x,
        mixture: Box::new(mixture),
        out,
    });
    b.program.output = out;
    let steps = [
        batch(&[(0, 1)], BLOCK_TOKENS, 1),
        batch(&[(0, 21)], BLOCK_TOKENS, 2),
    ];
    bench.compare("experts", &b, &steps, (1e-5, 3e-2), BLOCK_TOKENS)
}
