//! The parameter structs of launchers are as large as those of the kernels: on the CPU shim, which knows the kernels' own.

use galerne_cuda_shim::kernels;
use galerne_kernels::cuda::launch::copy::CopyParams;
use galerne_kernels::cuda::launch::dequantize::DequantizeParams;
use galerne_kernels::cuda::launch::elementwise::ElementwiseParams;
use galerne_kernels::cuda::launch::embedding::EmbeddingParams;
use galerne_kernels::cuda::launch::fp8_round::Fp8RoundParams;
use galerne_kernels::cuda::launch::fp8_rows::Fp8RowsParams;
use galerne_kernels::cuda::launch::linear_exact::LinearExactParams;
use galerne_kernels::cuda::launch::linear_small::LinearSmallParams;
use galerne_kernels::cuda::launch::linear_tile::{LinearCastParams, LinearTileParams};
use galerne_kernels::cuda::launch::mean_pool::MeanPoolParams;
use galerne_kernels::cuda::launch::moe_combine::MoeCombineParams;
use galerne_kernels::cuda::launch::moe_exact::MoeExactParams;
use galerne_kernels::cuda::launch::moe_linear::MoeLinearParams;
use galerne_kernels::cuda::launch::moe_plan::MoePlanParams;
use galerne_kernels::cuda::launch::moe_route::MoeRouteParams;
use galerne_kernels::cuda::launch::norm::NormParams;
use galerne_kernels::cuda::launch::rope::RopeParams;
use galerne_kernels::cuda::launch::sample::SampleParams;

/// By what kernels' names begin with.
const STRUCTS: &[(&str, usize)] = &[
    ("copy_", size_of::<CopyParams>()),
    ("dequantize", size_of::<DequantizeParams>()),
    ("elementwise_", size_of::<ElementwiseParams>()),
    ("embedding", size_of::<EmbeddingParams>()),
    ("fp8_round", size_of::<Fp8RoundParams>()),
    ("fp8_rows", size_of::<Fp8RowsParams>()),
    ("linear_cast_", size_of::<LinearCastParams>()),
    ("linear_exact", size_of::<LinearExactParams>()),
    ("linear_small_", size_of::<LinearSmallParams>()),
    ("linear_tile_", size_of::<LinearTileParams>()),
    ("mean_pool", size_of::<MeanPoolParams>()),
    ("moe_combine", size_of::<MoeCombineParams>()),
    ("moe_exact", size_of::<MoeExactParams>()),
    ("moe_linear", size_of::<MoeLinearParams>()),
    ("moe_plan", size_of::<MoePlanParams>()),
    ("moe_route", size_of::<MoeRouteParams>()),
    ("norm_", size_of::<NormParams>()),
    ("rope_", size_of::<RopeParams>()),
    ("sample_", size_of::<SampleParams>()),
];

#[test]
fn structs_are_as_large_as_the_kernels_say() {
    let kernels = kernels();
    for (prefix, bytes) in STRUCTS {
        let mut family = kernels
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .peekable();
        assert!(family.peek().is_some(), "no kernel {prefix}*");
        for (name, expected) in family {
            assert_eq!(expected, bytes, "{name}");
        }
    }
}
