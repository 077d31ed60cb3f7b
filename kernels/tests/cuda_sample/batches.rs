//! Random rows and requests for property tests.

use galerne_core::ids::TokenId;
use galerne_core::sampling::SamplingPlan;
use galerne_kernels::conformance::Numbers;
use galerne_kernels::device::TokenCount;
use proptest::prelude::*;

use crate::plan;

/// One request of a property test, made from a few numbers.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) plan: SamplingPlan,
    pub(crate) mask: Option<Vec<u32>>,
    pub(crate) seen: Vec<TokenCount>,
    pub(crate) uniform: f32,
    pub(crate) logprobs: Option<u32>,
}

fn wish(width: u32) -> impl Strategy<Value = Wish> {
    let temperature = prop_oneof![Just(0.0_f32), Just(1.0), 0.02_f32..3.0];
    let top_k = prop_oneof![Just(0_u32), 1..60_u32, 1..2 * width];
    let top_p = prop_oneof![Just(1.0_f32), 0.0_f32..1.0];
    let min_p = prop_oneof![Just(0.0_f32), 0.0_f32..1.0];
    let candidates = prop_oneof![4 => Just(0_u32), 1 => 1..300_u32];
    let filters = (temperature, top_k, top_p, min_p, candidates);
    let changes = (any::<u64>(), 0..40_u32, any::<bool>());
    let logprobs = prop_oneof![Just(None), (0..30_u32).prop_map(Some)];
    (filters, changes, 0_u32..1 << 24, logprobs).prop_map(move |(filters, changes, uniform, logprobs)| {
        let (temperature, top_k, top_p, min_p, candidates) = filters;
        let (seed, edits, has_mask) = changes;
        let mut numbers = Numbers::new(seed);
        let mut seen: Vec<TokenCount> = (0..edits)
            .map(|_| TokenCount {
                token: TokenId(numbers.below(width)),
                output: numbers.below(3),
            })
            .collect();
        seen.sort_by_key(|count| count.token.0);
        seen.dedup_by_key(|count| count.token.0);
        let mut mask: Vec<u32> = (0..width.div_ceil(32))
            .map(|_| numbers.next_bits() as u32 & numbers.next_bits() as u32)
            .collect();
        mask[0] |= 1;
        Wish {
            plan: SamplingPlan {
                candidates,
                repetition_penalty: 1.5,
                presence_penalty: 0.5,
                bias: vec![(TokenId(numbers.below(width)), 3.0); edits as usize % 2],
                ..plan(temperature, top_k, top_p, min_p)
            },
            mask: has_mask.then_some(mask),
            seen,
            uniform: uniform as f32 / (1 << 24) as f32,
            logprobs,
        }
    })
}

/// Rows of one width, narrow and wide ones, with few and many equal logits, and wishes about them.
pub(crate) fn batch() -> impl Strategy<Value = (Vec<Vec<f32>>, Vec<Wish>, u64)> {
    let shapes = prop_oneof![
        Just((0.0_f32, 1.0_f32)),
        Just((0.01, 1e-6)),
        Just((3.0, 0.5)),
        Just((8.0, 1e-4)),
        Just((30.0, 1e-4))
    ];
    let width = prop_oneof![1_u32..40, 4_000..4_200_u32, 1..9_000_u32];
    (shapes, width, any::<u64>()).prop_flat_map(|((size, step), width, seed)| {
        let mut numbers = Numbers::new(seed);
        let mut row = || -> Vec<f32> {
            (0..width)
                .map(|_| (numbers.normal(size) / step).round() * step)
                .collect()
        };
        let rows = vec![row(), row()];
        (Just(rows), prop::collection::vec(wish(width), 1..6), Just(seed))
    })
}
