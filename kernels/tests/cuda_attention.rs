//! The `attention_*.cu` kernels on the CPU shim (or a GPU) against f64: shapes, masks, KV dtypes, split contexts, padding.
#![expect(unsafe_code, reason = "launches name raw memory")]

use galerne_core::ids::BlockId;
use galerne_cuda_shim::Rig;
use galerne_kernels::cuda::attention_plan::{Plan, PlanShape};
use galerne_kernels::cuda::driver::{DevicePtr, DeviceView, Launch, TensorMap};
use galerne_kernels::cuda::kv::{KvElement, KvLayer};
use galerne_kernels::cuda::launch::attention::{AttentionParams, Step, Tables, attention, with_warpgroups};
use galerne_kernels::device::SequenceSlice;
use galerne_kernels::program::AttentionLayer;
use half::{bf16, f16};

/// Random numbers, about normal.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (((self.0 >> 33) * u64::from(end)) >> 31) as u32
    }

    fn normal(&mut self) -> f32 {
        (0..6)
            .map(|_| self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0)
            .sum::<f32>()
            / 1.414
    }
}

#[derive(Clone)]
struct Case {
    layer: AttentionLayer,
    element: KvElement,
    block_tokens: usize,
    /// Tokens already in the KV blocks and tokens of the step, by sequence.
    sequences: Vec<(usize, usize)>,
    padding: usize,
    multiprocessors: u32,
    /// Columns before q in its buffer.
    margin: u32,
    step: Step,
    /// Tokens with which all sequences begin; whole blocks.
    common: usize,
}

fn layer(heads: u32, kv_heads: u32, head_width: u32) -> AttentionLayer {
    AttentionLayer {
        heads,
        kv_heads,
        head_width,
        scale: 1.0 / (head_width as f32).sqrt(),
        causal: true,
        sliding_window: None,
        soft_cap: None,
    }
}

fn case(layer: AttentionLayer, element: KvElement, sequences: &[(usize, usize)]) -> Case {
    Case {
        layer,
        element,
        block_tokens: 16,
        sequences: sequences.to_vec(),
        padding: 0,
        multiprocessors: 4,
        margin: 0,
        step: Step::Mixed,
        common: 0,
    }
}

/// A sequence's keys or values as the pool stores them: codes, the scale, and what they mean.
struct Stored {
    codes: Vec<u8>,
    scale: f32,
    numbers: Vec<f64>,
}

fn e4m3(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = if exponent == 0 {
        fraction / 8.0 * 2f64.powi(-6)
    } else {
        (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7)
    };
    if code & 0x80 == 0 { size } else { -size }
}

fn store(row: &[f32], element: KvElement, numbers: &mut Numbers) -> Stored {
    let mut scale = 1.0;
    let (codes, numbers): (Vec<Vec<u8>>, Vec<f64>) = match element {
        KvElement::F32 => row
            .iter()
            .map(|&x| (x.to_le_bytes().to_vec(), f64::from(x)))
            .unzip(),
        KvElement::Bf16 => row
            .iter()
            .map(|&x| bf16::from_f32(x))
            .map(|x| (x.to_le_bytes().to_vec(), x.to_f64()))
            .unzip(),
        KvElement::F16 => row
            .iter()
            .map(|&x| f16::from_f32(x))
            .map(|x| (x.to_le_bytes().to_vec(), x.to_f64()))
            .unzip(),
        KvElement::Int8 => {
            scale = row.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            let code = |&x: &f32| (x / scale).round() as i8;
            row.iter()
                .map(code)
                .map(|c| (vec![c as u8], f64::from(c) * f64::from(scale)))
                .unzip()
        }
        // Any codes but NaN, of numbers up to 3.75 and tiny ones.
        KvElement::Fp8 => row
            .iter()
            .map(|_| (numbers.below(2) << 7 | numbers.below(72)) as u8)
            .map(|c| (vec![c], e4m3(c)))
            .unzip(),
    };
    Stored {
        codes: codes.concat(),
        scale,
        numbers,
    }
}

/// Everything of a step: device memory's contents and what should come out.
struct World {
    pool: Vec<u8>,
    block_bytes: usize,
    table: Vec<u32>,
    blocks_stride: usize,
    slices: Vec<SequenceSlice>,
    q: Vec<f32>,
    expected: Vec<f64>,
}

fn world(case: &Case, seed: u64) -> World {
    let numbers = &mut Numbers(seed);
    let Case {
        layer,
        element,
        block_tokens,
        ..
    } = case.clone();
    let lengths: Vec<usize> = case.sequences.iter().map(|(before, now)| before + now).collect();
    let blocks_stride = lengths.iter().max().map_or(1, |most| most.div_ceil(block_tokens)) + 2;
    let blocks: usize = lengths.iter().map(|length| length.div_ceil(block_tokens)).sum();
    let block_bytes = KvLayer::bytes_per_block(&layer, block_tokens as u32, element) + 32;
    let mut world = World {
        pool: vec![0xff; blocks * block_bytes],
        block_bytes,
        table: vec![u32::MAX; case.sequences.len() * blocks_stride],
        blocks_stride,
        slices: vec![],
        q: vec![],
        expected: vec![],
    };
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    for i in (1..blocks).rev() {
        order.swap(i, numbers.below(i as u32 + 1) as usize);
    }
    let mut first_token = 0;
    let (mut common_blocks, mut common) = (vec![], vec![]);
    for (index, &(before, tokens)) in case.sequences.iter().enumerate() {
        let fresh = lengths[index].div_ceil(block_tokens) - common_blocks.len();
        let own = [common_blocks.clone(), order.split_off(order.len() - fresh)].concat();
        world.table[index * blocks_stride..][..own.len()].copy_from_slice(&own);
        let kv = append(&mut world, case, &own, lengths[index], &common, numbers);
        common_blocks = own[..case.common / block_tokens].to_vec();
        common = kv[..case.common].to_vec();
        attend(&mut world, case, &kv, before, tokens, numbers);
        world.slices.push(SequenceSlice {
            first_token,
            tokens,
            position: before as u32,
            blocks: own.into_iter().map(BlockId).collect(),
        });
        first_token += tokens;
    }
    world
}

/// Fills a sequence's blocks behind the tokens that are there; what its keys and values are, by position and KV head.
fn append(
    world: &mut World,
    case: &Case,
    own: &[u32],
    length: usize,
    common: &[Vec<[Vec<f64>; 2]>],
    numbers: &mut Numbers,
) -> Vec<Vec<[Vec<f64>; 2]>> {
    let (heads, width) = (case.layer.kv_heads as usize, case.layer.head_width as usize);
    let row_bytes = width * case.element.bytes();
    let side = heads * case.block_tokens * row_bytes;
    let position = |position: usize| {
        let start = own[position / case.block_tokens] as usize * world.block_bytes;
        let slot = position % case.block_tokens;
        let head = |head: usize| {
            let row = head * case.block_tokens + slot;
            [0, 1].map(|side_index| {
                let numbers_of: Vec<f32> = (0..width).map(|_| numbers.normal()).collect();
                let stored = store(&numbers_of, case.element, numbers);
                let at = start + side_index * side + row * row_bytes;
                world.pool[at..at + row_bytes].copy_from_slice(&stored.codes);
                if case.element == KvElement::Int8 {
                    let scales = (2 * side).next_multiple_of(16) + side_index * heads * case.block_tokens * 4;
                    let at = start + scales + row * 4;
                    world.pool[at..at + 4].copy_from_slice(&stored.scale.to_le_bytes());
                }
                stored.numbers
            })
        };
        (0..heads).map(head).collect()
    };
    let rest = (common.len()..length).map(position);
    common.iter().cloned().chain(rest).collect()
}

fn attend(
    world: &mut World,
    case: &Case,
    kv: &[Vec<[Vec<f64>; 2]>],
    before: usize,
    tokens: usize,
    numbers: &mut Numbers,
) {
    let layer = case.layer;
    let width = layer.head_width as usize;
    for position in before..before + tokens {
        let end = if layer.causal {
            position + 1
        } else {
            before + tokens
        };
        let start = (position + 1).saturating_sub(layer.sliding_window.map_or(usize::MAX, |w| w as usize));
        for head in 0..layer.heads {
            let q: Vec<f32> = (0..width).map(|_| numbers.normal()).collect();
            let kv_head = (head / (layer.heads / layer.kv_heads)) as usize;
            let score = |p: usize| {
                let dot: f64 = q
                    .iter()
                    .zip(&kv[p][kv_head][0])
                    .map(|(q, k)| f64::from(*q) * k)
                    .sum();
                let score = dot * f64::from(layer.scale);
                layer
                    .soft_cap
                    .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = (start..end).map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            let mut out = vec![0.0; width];
            for (p, score) in (start..end).zip(&scores) {
                let weight = (score - largest).exp() / total;
                out.iter_mut()
                    .zip(&kv[p][kv_head][1])
                    .for_each(|(out, v)| *out += weight * v);
            }
            world.q.extend(q);
            world.expected.extend(out);
        }
    }
}

/// What ran: kernels, and tiles whose keys were split.
struct Ran {
    kernels: Vec<&'static str>,
    joined: usize,
    /// Tiles of which others have the beginning.
    shared: usize,
}

/// Runs the case and checks every number.
fn check(case: &Case, seed: u64, tolerance: f64) -> Ran {
    let world = world(case, seed);
    let rig = Rig::new(seed);
    let tokens: usize = case.sequences.iter().map(|s| s.1).sum();
    let rows = tokens + case.padding;
    let mut shape = PlanShape::new(&case.layer, case.multiprocessors);
    if case.common > 0 {
        shape = shape.with_shared_blocks(case.block_tokens as u32);
    }
    let (mut plan_of_host, mut words) = (Plan::default(), vec![]);
    shape.plan(&world.slices, rows, &mut plan_of_host);
    plan_of_host.encode(&mut words);
    let capacity = shape.capacity(rows, case.sequences.len());
    let width = case.layer.heads * case.layer.head_width;
    let stride = width + case.margin;
    let mut q = vec![f32::NAN; rows * stride as usize];
    for (row, numbers) in world.q.chunks(width as usize).enumerate() {
        q[row * stride as usize + case.margin as usize..][..width as usize].copy_from_slice(numbers);
    }
    let (q, out) = (rig.memory(&q), rig.poisoned::<f32>(rows * stride as usize));
    let (plan, table) = (rig.memory(&words), rig.memory(&world.table));
    let (pool, partial) = (
        rig.memory(&world.pool),
        rig.poisoned::<f32>(capacity.partial_floats),
    );
    let kv = KvLayer::new(
        pool.at(),
        world.block_bytes as u64,
        &case.layer,
        case.block_tokens as u32,
        case.element,
    );
    let tables = Tables {
        plan: plan.at(),
        blocks: table.at(),
        blocks_stride: world.blocks_stride as u32,
        partial: partial.at(),
    };
    let views = (
        q.view(stride, case.margin, width),
        out.view(stride, case.margin, width),
    );
    let launches = attention(&case.layer, &shape, views, kv, tables, case.step);
    // SAFETY: all memory is as large as the kernels' headers say.
    unsafe { rig.enqueue(&launches) }.expect("it runs");
    compare(case, &world, &out.read(), tolerance);
    Ran {
        kernels: launches.iter().map(|launch: &Launch| launch.kernel).collect(),
        shared: plan_of_host
            .merges
            .iter()
            .filter(|merge| merge.shared_parts > 0)
            .count(),
        joined: plan_of_host.merges.iter().filter(|merge| merge.parts > 0).count(),
    }
}

fn compare(case: &Case, world: &World, out: &[f32], tolerance: f64) {
    let width = (case.layer.heads * case.layer.head_width) as usize;
    for (row, numbers) in out.chunks(width + case.margin as usize).enumerate() {
        let (margin, numbers) = numbers.split_at(case.margin as usize);
        assert!(margin.iter().all(|x| x.is_nan()), "wrote before row {row}");
        for (column, &got) in numbers.iter().enumerate() {
            // Rows of padding are zeros.
            let expected = world.expected.get(row * width + column).copied().unwrap_or(0.0);
            let difference = (f64::from(got) - expected).abs();
            assert!(
                difference <= tolerance,
                "{:?} {:?}: row {row} column {column}: expected {expected}, got {got}",
                case.layer,
                case.element,
            );
        }
    }
}

/// Outputs are of size 4 at most. Queries and probabilities have 8 bits in the tensor cores' bf16, 11 in f16 (for e4m3 too);
/// the exact kernel loses what f32 loses.
fn tolerance(element: KvElement) -> f64 {
    match element {
        KvElement::F32 => 2e-5,
        KvElement::Bf16 | KvElement::Int8 => 1e-2,
        KvElement::F16 | KvElement::Fp8 => 2e-3,
    }
}

const RAGGED: [(usize, usize); 5] = [(0, 37), (40, 1), (63, 3), (0, 1), (130, 2)];

#[test]
fn exact_attention_is_that_of_the_reference() {
    for (seed, element) in KvElement::ALL.into_iter().enumerate() {
        for (heads, kv_heads, width) in [(2, 1, 5), (6, 2, 24), (20, 1, 9), (3, 3, 64)] {
            let mut case = case(layer(heads, kv_heads, width), element, &RAGGED);
            case.padding = 2;
            case.margin = 3;
            // Some of these shapes are the tensor cores'.
            check(
                &case,
                seed as u64 + 1,
                if width % 8 == 0 { tolerance(element) } else { 2e-5 },
            );
        }
    }
}

#[test]
fn decode_reads_each_dtype_and_width() {
    let mut seed = 0;
    for element in [KvElement::Bf16, KvElement::F16, KvElement::Int8, KvElement::Fp8] {
        for (heads, kv_heads, width) in [(4, 2, 64), (3, 1, 16), (8, 1, 96), (16, 2, 128), (4, 2, 208)] {
            seed += 1;
            let mut case = case(
                layer(heads, kv_heads, width),
                element,
                &[(90, 1), (0, 1), (200, 1), (16, 1)],
            );
            case.step = Step::Decode;
            case.padding = 1;
            let kernels = check(&case, seed, tolerance(element)).kernels;
            assert!(kernels[0].starts_with("attention_decode_"), "{kernels:?}");
        }
    }
}

#[test]
fn prefill_reads_each_dtype_and_width() {
    let mut seed = 20;
    for element in [KvElement::Bf16, KvElement::F16, KvElement::Int8, KvElement::Fp8] {
        for (heads, kv_heads, width) in [(2, 1, 64), (3, 1, 32), (5, 1, 96), (2, 2, 128), (3, 1, 256)] {
            seed += 1;
            let mut case = case(
                layer(heads, kv_heads, width),
                element,
                &[(0, 70), (33, 20), (90, 1)],
            );
            case.margin = 1;
            let kernels = check(&case, seed, tolerance(element)).kernels;
            assert!(kernels[1].starts_with("attention_prefill_"), "{kernels:?}");
        }
    }
}

#[test]
fn many_heads_decode_in_large_tiles() {
    let mut case = case(layer(40, 1, 16), KvElement::Bf16, &[(300, 1), (7, 1)]);
    case.step = Step::Decode;
    case.padding = 1;
    check(&case, 9, tolerance(KvElement::Bf16));
}

#[test]
fn a_split_context_is_joined() {
    for element in [KvElement::F32, KvElement::Bf16, KvElement::Int8] {
        for (tokens, step) in [(1, Step::Decode), (30, Step::Mixed)] {
            let mut case = case(layer(4, 1, 64), element, &[(1_500, tokens), (90, 1)]);
            case.multiprocessors = 5;
            case.step = step;
            assert!(check(&case, 3, tolerance(element)).joined > 0);
        }
    }
}

#[test]
fn masks_and_caps_hold() {
    let mut seed = 100;
    for element in [KvElement::F32, KvElement::Bf16] {
        for causal in [true, false] {
            for sliding_window in [None, Some(1), Some(7), Some(70)] {
                for soft_cap in [None, Some(0.8)] {
                    seed += 1;
                    let layer = AttentionLayer {
                        causal,
                        sliding_window,
                        soft_cap,
                        ..layer(4, 2, 16)
                    };
                    check(&case(layer, element, &RAGGED), seed, tolerance(element));
                }
            }
        }
    }
}

#[test]
fn blocks_may_have_any_number_of_tokens() {
    for (seed, block_tokens) in [5, 8, 24, 64, 128].into_iter().enumerate() {
        for element in [KvElement::F32, KvElement::Bf16, KvElement::Int8] {
            let mut case = case(layer(4, 2, 16), element, &RAGGED);
            case.block_tokens = block_tokens;
            case.layer.sliding_window = Some(50);
            check(&case, seed as u64 + 200, tolerance(element));
        }
    }
}

#[test]
fn a_common_beginning_is_attended_to_together() {
    let sequences = [(600, 1), (610, 1), (704, 1), (592, 1), (900, 1), (5, 3)];
    for (seed, element) in [KvElement::F32, KvElement::Bf16, KvElement::Int8]
        .into_iter()
        .enumerate()
    {
        for multiprocessors in [1, 9] {
            let mut case = case(layer(8, 2, 64), element, &sequences[..5]);
            case.common = 592;
            case.multiprocessors = multiprocessors;
            assert_eq!(check(&case, seed as u64, tolerance(element)).shared, 4);
        }
    }
    let mut mixed = case(layer(3, 1, 5), KvElement::F32, &sequences);
    mixed.sequences[5] = (600, 3);
    mixed.common = 320;
    assert_eq!(check(&mixed, 7, tolerance(KvElement::F32)).shared, 5);
}

#[test]
fn no_tokens_make_zeros_only() {
    let mut case = case(layer(4, 2, 64), KvElement::Bf16, &[]);
    case.padding = 3;
    check(&case, 1, 0.0);
}

#[test]
fn the_parameter_struct_is_as_large_as_the_kernels_say() {
    let ours: Vec<_> = galerne_cuda_shim::kernels()
        .into_iter()
        .filter(|(name, _)| name.starts_with("attention_"))
        .collect();
    assert!(ours.len() > 20, "{ours:?}");
    for (kernel, bytes) in ours {
        assert_eq!(bytes, size_of::<AttentionParams>(), "{kernel}");
    }
}

/// The launch for sequences with many rows.
fn large_tiles(layer: &AttentionLayer, shape: &PlanShape, kv: KvLayer) -> Launch {
    let tables = Tables {
        plan: DevicePtr(4_096),
        blocks: DevicePtr(4_096),
        blocks_stride: 1,
        partial: DevicePtr(4_096),
    };
    let views = (DeviceView::NONE, DeviceView::NONE);
    attention(layer, shape, views, kv, tables, Step::Mixed).swap_remove(1)
}

#[test]
fn warpgroups_are_used_where_they_fit_and_only_if_asked_for() {
    for (width, element, expected) in [
        (128, KvElement::Bf16, "attention_prefill_sm90_bf16_128"),
        (64, KvElement::F16, "attention_prefill_sm90_f16_64"),
        (80, KvElement::Bf16, "attention_prefill_bf16_96"),
        (128, KvElement::Int8, "attention_prefill_int8_128"),
        (128, KvElement::F32, "attention_exact_f32"),
    ] {
        let layer = layer(8, 2, width);
        let kv = KvLayer::new(DevicePtr(4_096), 1 << 20, &layer, 64, element);
        let shape = with_warpgroups(PlanShape::new(&layer, 132), &kv, 132);
        assert_eq!(large_tiles(&layer, &shape, kv).kernel, expected);
        let unasked = large_tiles(&layer, &PlanShape::new(&layer, 132), kv);
        assert!(!unasked.kernel.contains("sm90"));
    }
}

#[test]
fn pools_that_are_a_matrix_are_copied_by_boxes() {
    // Block bytes, tokens of a block, expected rows of a box and of a block.
    for (block_bytes, block_tokens, expected) in [
        (1 << 20, 64, Some((64, 4_096))),
        (1 << 20, 256, Some((128, 4_096))),
        (1 << 20, 8, Some((8, 4_096))),
        (1 << 20, 4, None),
        (1 << 20, 96, None),
        // Another layer's rows are of another width.
        ((1 << 20) + 128, 64, None),
    ] {
        let layer = layer(8, 2, 128);
        let kv = KvLayer::new(
            DevicePtr(4_096),
            block_bytes,
            &layer,
            block_tokens,
            KvElement::Bf16,
        );
        let shape = with_warpgroups(PlanShape::new(&layer, 132), &kv, 132);
        let launch = large_tiles(&layer, &shape, kv);
        // As `AttentionSm90Params` in the kernel's file: two numbers behind the others', then the map at a multiple of 128.
        assert_eq!((launch.params.len(), size_of::<AttentionParams>()), (256, 120));
        let number = |at: usize| u32::from_ne_bytes(launch.params[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!((number(120), number(124)), expected.unwrap_or((0, 0)));
        let map = expected.map(|(box_rows, _)| TensorMap {
            at: 128,
            base: DevicePtr(4_096),
            width: 128,
            box_rows,
        });
        assert_eq!(launch.tensor_map, map);
    }
}
