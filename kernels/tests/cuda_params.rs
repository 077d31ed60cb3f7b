//! The parameter structs of launchers are as large as those of the kernels: on the CPU shim, which knows the kernels' own.

use std::collections::BTreeMap;

use galerne_cuda_shim::kernels;
use galerne_kernels::cuda::launch::dequantize::DequantizeParams;
use galerne_kernels::cuda::launch::embedding::EmbeddingParams;
use galerne_kernels::cuda::launch::linear_exact::LinearExactParams;
use galerne_kernels::cuda::launch::linear_small::LinearSmallParams;
use galerne_kernels::cuda::launch::norm::NormParams;

#[test]
fn structs_are_as_large_as_the_kernels_say() {
    let known: BTreeMap<String, usize> = kernels().into_iter().collect();
    for (kernel, bytes) in [
        ("dequantize", size_of::<DequantizeParams>()),
        ("embedding", size_of::<EmbeddingParams>()),
        ("linear_exact", size_of::<LinearExactParams>()),
        ("linear_small_bf16_8", size_of::<LinearSmallParams>()),
        ("norm_rms", size_of::<NormParams>()),
        ("norm_layer", size_of::<NormParams>()),
    ] {
        assert_eq!(known.get(kernel), Some(&bytes), "{kernel}");
    }
}
