//! The CUDA device on the CPU shim against the conformance suite: every kernel, launcher, table and plan as on a GPU, but for the
//! driver and the compiler.

use std::sync::Arc;

use galerne_core::dtype::DType;
use galerne_cuda_shim::Shim;
use galerne_kernels::conformance::{Build, cases};
use galerne_kernels::cuda::CudaDevice;
use galerne_kernels::cuda::driver::Product;
use galerne_kernels::device::{Device, KvDtype, KvSpec, LoadOptions, Precision, Quantization};

/// Runs the cases whose name contains `cases_of`.
fn conforms(precision: Precision, cases_of: &str, shim: Shim) -> Arc<Shim> {
    let shim = Arc::new(shim);
    let device = CudaDevice::new(shim.clone()).expect("the shim always opens");
    let failures: Vec<String> = cases()
        .iter()
        .filter(|case| case.name.contains(cases_of))
        .filter_map(|case| case.run(&device, precision).err())
        .map(|error| error.to_string())
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    shim
}

#[test]
fn auto() {
    let shim = conforms(Precision::Auto, "", Shim::new(1));
    assert_eq!(shim.ran(Product::KERNEL), 0);
    assert!(shim.ran("_gated") > 0, "no map ended in a gated activation");
}

#[test]
fn f32() {
    conforms(Precision::F32, "", Shim::new(2));
}

#[test]
fn auto_with_a_library_for_products() {
    let shim = conforms(Precision::Auto, "linear", Shim::new(3).with_products());
    assert!(shim.ran(Product::KERNEL) > 0);
}

/// The suite lets a device refuse to round weights; this one may not.
#[test]
fn rounded_weights_take_less_memory() {
    let device = CudaDevice::new(Arc::new(Shim::new(4))).expect("the shim always opens");
    let build = Build::transformer(DType::Bf16, 1, 2);
    let weight_bytes = |quantization| {
        let options = LoadOptions {
            precision: Precision::Auto,
            quantization,
            kv: KvSpec {
                blocks: 4,
                block_tokens: 16,
                dtype: KvDtype::Fp8,
            },
            step_tokens_max: 16,
            sequences_max: 1,
        };
        let program = device.load(&build.program, &build.weights, options);
        program.expect("it loads").memory().weight_bytes
    };
    // The layer: 128 x 64, 64 x 64, 192 x 64 and 64 x 96. All widths are one tile of 128 columns; a tile row has codes, and a
    // factor of 4 bytes, or 4 scales of 2 bytes and a factor, or 4 bytes of scale and zero.
    let rows = 128 + 64 + 192 + 64;
    let as_stored = 2 * (64 * (128 + 64 + 192) + 64 * 96);
    let rest = weight_bytes(None) - as_stored;
    for (quantization, row_bytes) in [
        (Quantization::Fp8, 128 + 4),
        (Quantization::Fp8W8A8, 128 + 4),
        (Quantization::Int4, 64 + 4),
        (Quantization::Nvfp4, 64 + 8 + 4),
    ] {
        let got = weight_bytes(Some(quantization)) - rest;
        // Regions begin at multiples of 256 bytes.
        let expected = rows * row_bytes;
        assert!(
            (expected..expected + 4 * 256).contains(&got),
            "{quantization:?}: expected {expected}, got {got}"
        );
    }
}
