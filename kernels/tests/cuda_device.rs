//! The CUDA device on the CPU shim against the conformance suite: every kernel, launcher, table and plan as on a GPU, but for the
//! driver and the compiler.

use std::sync::Arc;

use galerne_cuda_shim::Shim;
use galerne_kernels::conformance::cases;
use galerne_kernels::cuda::CudaDevice;
use galerne_kernels::device::Precision;

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
    assert_eq!(shim.products(), 0);
}

#[test]
fn f32() {
    conforms(Precision::F32, "", Shim::new(2));
}

#[test]
fn auto_with_a_library_for_products() {
    let shim = conforms(Precision::Auto, "linear", Shim::new(3).with_products());
    assert!(shim.products() > 0);
}
