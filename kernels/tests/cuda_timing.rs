//! The timings' cases on the CPU shim: that each launch fits its buffers. What they took says nothing.

use std::sync::Arc;

use galerne_cuda_shim::Shim;
use galerne_kernels::cuda::driver::Driver;
use galerne_kernels::cuda::timing::{Sizes, run};

#[test]
fn every_case_runs_within_its_buffers() {
    let shim: Arc<dyn Driver> = Arc::new(Shim::new(1).with_products());
    let mut names = Vec::new();
    run(&shim, Sizes::Tiny, &mut |timing| {
        assert!(timing.seconds > 0.0 && timing.bytes > 0, "{timing:?}");
        names.push(timing.name);
    })
    .expect("each kernel runs");
    for name in [
        "rms norm f32 3 x 64",
        "linear nvfp4 5 x 128 to 64",
        "linear int4-gated 5 x 128 to 64",
        "linear bf16 512 x 128 to 64",
        "linear bf16-by-library 512 x 128 to 64",
        "linear fp8-by-library 512 x 128 to 64",
        "attention bf16 decode 3 x 70",
        "attention bf16 prefill 1 x 40",
    ] {
        assert!(names.iter().any(|known| known == name), "{name}: {names:?}");
    }
}
