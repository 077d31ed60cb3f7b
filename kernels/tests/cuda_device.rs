//! The CUDA device on the CPU shim against the conformance suite: every kernel, launcher, table and plan as on a GPU, but for the
//! driver and the compiler.

use std::sync::Arc;

use galerne_cuda_shim::Shim;
use galerne_kernels::conformance::cases;
use galerne_kernels::cuda::CudaDevice;
use galerne_kernels::device::Precision;

fn conforms(precision: Precision, seed: u64) {
    let device = CudaDevice::new(Arc::new(Shim::new(seed))).expect("the shim always opens");
    let failures: Vec<String> = cases()
        .iter()
        .filter_map(|case| case.run(&device, precision).err())
        .map(|error| error.to_string())
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn auto() {
    conforms(Precision::Auto, 1);
}

#[test]
fn f32() {
    conforms(Precision::F32, 2);
}
